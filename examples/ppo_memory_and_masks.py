"""PPO with memory, masked actions and heads that depend on each other, in a small Gymnasium environment of one's own.

A lamp shows a colour in the first step alone. Later one may wait, or name a colour, of which only some are on offer: the right
one pays.

Run it: python examples/ppo_memory_and_masks.py
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from morphogen.rl import PPO, ActionConfig, HeadConfig, PolicyConfig, PPOConfig, Updated

COLOURS, STEPS = 4, 6


class Lamp(gym.Env[Any, Any]):
    """Name the colour that was shown at the beginning."""

    observation_space = gym.spaces.Box(0.0, 1.0, (COLOURS + 1,), np.float32)
    action_space = gym.spaces.MultiDiscrete([2, COLOURS])  # wait or name; which colour

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.colour, self.step_number = int(self.np_random.integers(COLOURS)), 0
        return self.seen(shown=True), {"action_mask": self.mask()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        op, colour = int(action[0]), int(action[1])
        self.step_number += 1
        reward = 0.0 if op == 0 else 1.0 if colour == self.colour else -1.0
        over = op == 1 or self.step_number == STEPS
        return self.seen(shown=False), reward, over, False, {"action_mask": self.mask()}

    def seen(self, shown: bool) -> Any:
        lamp = np.eye(COLOURS, dtype=np.float32)[self.colour] * shown
        return np.append(lamp, np.float32(self.step_number / STEPS))

    def mask(self) -> dict[str, Any]:
        """The right colour and one other are on offer, none in the first step."""
        offered = np.zeros((2, COLOURS), dtype=bool)  # given the op: a row for waiting, a row for naming
        offered[0, 0] = True
        offered[1, [self.colour, int(self.np_random.integers(COLOURS))]] = True
        return {"op": np.array([True, self.step_number > 0]), "colour": offered}


def train(memory: Any) -> float:
    """Train an agent and return its mean return over 200 episodes; the best there is is 1."""
    heads = (HeadConfig(name="op"), HeadConfig(name="colour", given=("op",), relevant_when={"op": (1,)}))
    config = PPOConfig(
        rollout_steps=64,
        minibatch_size=256,
        epochs=6,
        learning_rate=3e-3,
        gamma=0.97,
        entropy_coef=0.01,
        action=ActionConfig(heads=heads),
        policy=PolicyConfig(hidden=(32,), memory=memory, memory_width=32),
    )
    env = SyncVectorEnv([Lamp] * 8, autoreset_mode=AutoresetMode.SAME_STEP)
    agent = PPO(env, config)

    def show(agent: PPO, event: Updated) -> None:
        if event.update % 20 == 0:
            print(f"  step {event.step:,}: return {event.mean_return:.2f}, entropy {event.entropy:.2f}, KL {event.kl:.4f}")

    agent.learn(30_000, show)
    return agent.evaluate(200, SyncVectorEnv([Lamp] * 8)).mean_return


if __name__ == "__main__":
    for memory, name in (("none", "without memory"), ("lstm", "with an LSTM")):
        print(name)
        print(f"{name}: {train(memory):.2f}")
