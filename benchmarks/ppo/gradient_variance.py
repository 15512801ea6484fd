"""Does gradient-variance scaling help? CartPole with and without it, the same seeds.

    python benchmarks/ppo/gradient_variance.py [--seeds 5] [--steps 30000] [--json PATH]

The measure is the mean over training of the mean return of the last hundred episodes, so that learning sooner counts.
Differences are paired by seed, with 95 % Student intervals.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch

from morphogen.recipes.results import interval
from morphogen.rl import PPO, GradientVarianceConfig, PPOConfig, Updated

RESULT = Path(__file__).parents[1] / "results" / "ppo_gradient_variance.json"
ARMS = {
    "off": None,
    "alpha 0.1": GradientVarianceConfig(alpha=0.1),
    "alpha 1": GradientVarianceConfig(alpha=1.0),
}


def run(scaling: GradientVarianceConfig | None, seed: int, steps: int) -> tuple[float, list[float]]:
    """Return the mean return over training and the factor after each update."""
    events: list[Updated] = []
    config = PPOConfig(
        num_envs=8,
        rollout_steps=32,
        minibatch_size=256,
        epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=1e-3,
        gradient_variance=scaling,
        seed=seed,
    )
    PPO("CartPole-v1", config, emit=events.append).learn(steps)
    returns = [event.mean_return for event in events if event.episodes]
    return sum(returns) / len(returns), [event.gradient_factor for event in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in ARMS}
    factors: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(options.seeds):
        for name, scaling in ARMS.items():
            mean, factor = run(scaling, seed, options.steps)
            found[name].append(mean)
            factors[name] += [min(factor), max(factor), factor[-1]]
            print(f"{name}, seed {seed}: mean return {mean:.1f}, factor {min(factor):.2f} to {max(factor):.2f}", flush=True)
    rows = {
        name: {
            "returns": [round(value, 2) for value in values],
            "mean": round(sum(values) / len(values), 2),
            "minus_off": dataclasses.asdict(interval([a - b for a, b in zip(values, found["off"], strict=True)])),
            "factor": {"lowest": min(factors[name][::3]), "highest": max(factors[name][1::3]), "last": factors[name][2::3]},
        }
        for name, values in found.items()
    }
    command = f"python benchmarks/ppo/gradient_variance.py --seeds {options.seeds} --steps {options.steps}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    options.json.write_text(json.dumps({"command": command, "versions": versions, "arms": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row['mean']} ({row['minus_off']})", file=sys.stderr)


if __name__ == "__main__":
    main()
