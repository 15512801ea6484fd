"""What is to be had on the row "invalid-actions": a learner that wastes nothing, after as many random steps.

70 states, of each the one action that is right among 15 valid ones. The learner draws valid actions uniformly for 2,048 steps,
knows that every state has one right action, and remembers each try. Then it takes the right action where it found it, else a
valid one that was not wrong before. Printed: its mean return per 100 steps over 200 runs, the deviation of runs, and the share
of runs that reach 90.

    python benchmarks/ppo/invalid_actions_limit.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STATES, VALID, STEPS, TRIALS, RUNS = 70, 15, 2048, 4000, 200


def valid_actions(state: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the right action and 14 others."""
    others = np.delete(np.arange(STATES), state)
    return np.concatenate([[state], generator.choice(others, VALID - 1, replace=False)])


def run(generator: np.random.Generator) -> float:
    """Return what one learner gets per 100 steps."""
    wrong, found = np.zeros((STATES, STATES), dtype=bool), np.zeros(STATES, dtype=bool)
    for _ in range(STEPS):
        state = int(generator.integers(STATES))
        action = int(generator.choice(valid_actions(state, generator)))
        found[state] |= action == state
        wrong[state, action] |= action != state
    right = 0
    for _ in range(TRIALS):
        state = int(generator.integers(STATES))
        valid = valid_actions(state, generator)
        right += bool(found[state]) or int(generator.choice(valid[~wrong[state, valid]])) == state
    return 100.0 * right / TRIALS


def main() -> None:
    """Print mean, deviation and the share that reaches 90."""
    returns = np.array([run(np.random.default_rng(seed)) for seed in range(RUNS)])
    print(f"mean {returns.mean():.1f}, deviation {returns.std():.1f}, {np.mean(returns >= 90):.0%} of runs reach 90")


if __name__ == "__main__":
    main()
