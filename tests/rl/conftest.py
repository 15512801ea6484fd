"""Small deterministic worlds with every kind of space, and agents for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from morphogen.rl import PPO, ActionConfig, HeadConfig, PolicyConfig, PPOConfig

TREE = (
    HeadConfig(name="op"),
    HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2)}),
    HeadConfig(name="blueprint", given=("op", "slot"), relevant_when={"op": (1,)}),
)
ACTION_SPACES: dict[str, tuple[spaces.Space[Any], ActionConfig]] = {
    "categorical": (spaces.Discrete(4), ActionConfig()),
    "factored": (spaces.MultiDiscrete([3, 2, 2]), ActionConfig(heads=TREE)),
    "gaussian": (spaces.Box(-1.0, 1.0, (2,)), ActionConfig()),
    "squashed": (spaces.Box(-2.0, 3.0, (2,)), ActionConfig(squash=True)),
}
OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "mlp": spaces.Box(-np.inf, np.inf, (3,)),
    "cnn": spaces.Box(0, 255, (1, 8, 8), np.uint8),
}


class World(gym.Env[Any, Any]):
    """Episodes of a few random steps, half of them cut off; the reward is 1 for acting as the observation says."""

    def __init__(self, action: str = "categorical", observation: str = "mlp", masks: bool = False, longest: int = 9) -> None:
        self.action_space = ACTION_SPACES[action][0]
        self.observation_space = OBSERVATION_SPACES[observation]
        self._masks, self._longest = masks, longest

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._left, self._cut = int(self.np_random.integers(1, self._longest)), bool(self.np_random.integers(2))
        return self._seen(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        wanted = self._target % 2
        reward = float(np.sum(action) > 0.5) == wanted
        over = self._left == 0
        return self._seen(), float(reward), over and not self._cut, over and self._cut, self._info()

    def _seen(self) -> Any:
        self._target = int(self.np_random.integers(2))
        if self.observation_space.dtype == np.uint8:
            return np.full((1, 8, 8), 255 * self._target, np.uint8)
        noise = self.np_random.normal(size=3)
        return np.array([self._target, noise[0], noise[1]], np.float32)

    def _info(self) -> dict[str, Any]:
        if not self._masks:
            return {}
        factored = isinstance(self.action_space, spaces.MultiDiscrete)
        mask = self.np_random.random(3 + 6 + 12 if factored else 4) < 0.5
        mask[0] = True  # the first entry of every row stays allowed
        mask[3::2] |= factored
        return {"action_mask": mask}


def worlds(num_envs: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP, **options: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: World(**options)] * num_envs, autoreset_mode=mode)


def agent(action: str = "categorical", observation: str = "mlp", *, emit: Any = None, **settings: Any) -> PPO:
    """A small agent in three worlds; ``masks``, ``longest``, ``num_envs`` and ``mode`` are the worlds'."""
    world = {name: settings.pop(name) for name in ("masks", "longest", "num_envs", "mode") if name in settings}
    small: dict[str, Any] = {
        "rollout_steps": 8,
        "minibatch_size": 12,
        "epochs": 2,
        "action": ACTION_SPACES[action][1],
        "policy": PolicyConfig(hidden=(8,), channels=(2,)),
    }
    env = worlds(action=action, observation=observation, **world)
    return PPO(env, PPOConfig(**{**small, **settings}), **({} if emit is None else {"emit": emit}))


def same_weights(first: PPO, second: PPO) -> bool:
    pairs = zip(first.policy.parameters(), second.policy.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.fixture
def kit() -> SimpleNamespace:
    return SimpleNamespace(agent=agent, worlds=worlds, World=World, same_weights=same_weights, actions=tuple(ACTION_SPACES))
