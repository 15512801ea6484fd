"""Environments of the PPO benchmarks that Gymnasium does not have, and ``make`` for all of them by name.

"CartPole-position" is CartPole-v1 with velocities of zero: only a policy with memory can balance it for long.

"Grow" has four slots that something can grow in, and an action of three parts: operation, slot, blueprint. An episode is cut
off after 32 steps. Each slot asks for a blueprint, drawn at random.

    WAIT       nothing happens; slot and blueprint are irrelevant
    GERMINATE  an empty slot begins to grow a blueprint, any
    PRUNE      an occupied slot becomes empty; reward -0.05; the blueprint is irrelevant
    FOSSILIZE  a slot that has grown for 3 steps, that of its germination included, becomes empty and asks for a new blueprint;
               reward +1 if it had grown the one that it asked for, else -0.1; the blueprint is irrelevant

Any other action has no effect, reward -0.1, and is counted in ``invalid_actions``. What is valid of a slot depends on the
operation, and is in ``info["action_mask"]``: "op" [4], "slot" [4 operations, 4]; every blueprint is valid. Observed are, of
each slot, empty, growing, ripe, "grows what it asks for", the blueprint asked for (one-hot), and the time. The best return
is 16.

"Grow-flat" has the same decisions in one Discrete(64), with an exact mask. Of actions that differ in an irrelevant part alone
the mask allows one. "Grow-per-dimension" has the best mask that allows or forbids operations, slots and blueprints each by
themselves. In "Grow-hidden" growing and ripe look the same, and the mask allows to fossilise any occupied slot: one must
remember what was germinated when.

"InvalidActions" is sb3-contrib's, with 70 actions of which 55 are masked, drawn anew at each step: name the observed number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from numpy.typing import NDArray

WAIT, GERMINATE, PRUNE, FOSSILIZE = range(4)
EMPTY, GROWING, RIPE = range(3)
NUM_SLOTS, NUM_BLUEPRINTS, RIPE_AGE, EPISODE_STEPS = 4, 4, 3, 32
ALLOWED = {WAIT: {EMPTY, GROWING, RIPE}, GERMINATE: {EMPTY}, PRUNE: {GROWING, RIPE}, FOSSILIZE: {RIPE}}
"""Stages that the slot of an operation may be in."""

Mask = NDArray[np.bool_]
Observation = NDArray[np.float32]
Stages = tuple[int, ...]
MakeEnv = Callable[[], gym.Env[Any, Any]]


class PositionOnly(gym.ObservationWrapper[Observation, int, Observation]):
    """Sets the velocities of CartPole's observation to zero."""

    SEEN = np.array([1, 0, 1, 0], np.float32)

    def observation(self, observation: Observation) -> Observation:
        return observation * self.SEEN


class Grow(gym.Env[Observation, NDArray[np.int64]]):
    """Four slots, as described above; ages are -1 in empty slots."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, hidden_ages: bool = False) -> None:
        self.hidden_ages = hidden_ages
        self.action_space = spaces.MultiDiscrete([4, NUM_SLOTS, NUM_BLUEPRINTS])
        width = NUM_SLOTS * len(_features(hidden_ages, EMPTY, False, 0)) + 1
        self.observation_space = spaces.Box(0.0, 1.0, (width,), np.float32)
        self.invalid_actions = 0

    def _start(self) -> None:
        self._steps = 0
        self._ages, self._grown = [-1] * NUM_SLOTS, [0] * NUM_SLOTS
        self._wanted: list[int] = self.np_random.integers(NUM_BLUEPRINTS, size=NUM_SLOTS).tolist()
        self.stages: Stages = (EMPTY,) * NUM_SLOTS

    @property
    def wanted(self) -> tuple[int, ...]:
        """The blueprint that each slot asks for."""
        return tuple(self._wanted)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self._start()
        return self._observe()

    def step(self, action: NDArray[np.int64]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        op, slot, blueprint = action.tolist()
        reward = self._act(op, slot, blueprint)
        self._ages = [age if age < 0 else age + 1 for age in self._ages]
        self.stages = tuple([EMPTY if age < 0 else GROWING if age < RIPE_AGE else RIPE for age in self._ages])
        self._steps += 1
        observation, info = self._observe()
        return observation, reward, False, self._steps == EPISODE_STEPS, info

    def _act(self, op: int, slot: int, blueprint: int) -> float:
        if self.stages[slot] not in ALLOWED[op]:
            self.invalid_actions += 1
            return -0.1
        if op == GERMINATE:
            self._ages[slot], self._grown[slot] = 0, blueprint
        elif op == PRUNE:
            self._ages[slot] = -1
            return -0.05
        elif op == FOSSILIZE:
            fits = self._grown[slot] == self._wanted[slot]
            self._ages[slot] = -1
            self._wanted[slot] = int(self.np_random.integers(NUM_BLUEPRINTS))
            return 1.0 if fits else -0.1
        return 0.0

    def _observe(self) -> tuple[Observation, dict[str, Any]]:
        seen: list[float] = []
        for stage, grown, wanted in zip(self.stages, self._grown, self._wanted, strict=True):
            seen += _features(self.hidden_ages, stage, stage != EMPTY and grown == wanted, wanted)
        seen.append(self._steps / EPISODE_STEPS)
        mask = {part: mask.copy() for part, mask in masks(self.shown_stages).items()}
        return np.array(seen, np.float32), {"action_mask": mask}

    @property
    def shown_stages(self) -> Stages:
        """The stages as the mask has them: where ages are hidden, what grows may be ripe."""
        return tuple([RIPE if stage == GROWING else stage for stage in self.stages]) if self.hidden_ages else self.stages


class Remasked(gym.Wrapper[Observation, NDArray[np.int64], Observation, NDArray[np.int64]]):
    """Grow with another mask of the same decisions, in ``info`` and where sb3-contrib looks for it."""

    def __init__(self, env: Grow, mask: Callable[[Stages], Mask]) -> None:
        super().__init__(env)
        self._grow, self._mask = env, mask

    def action_masks(self) -> Mask:
        """Return what is valid now."""
        return self._mask(self._grow.shown_stages).copy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, info | {"action_mask": self.action_masks()}

    def step(self, action: NDArray[np.int64]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), terminated, truncated, info | {"action_mask": self.action_masks()}


@functools.cache
def _features(hidden_ages: bool, stage: int, fits: bool, wanted: int) -> tuple[float, ...]:
    stages = [stage == EMPTY] if hidden_ages else [stage == EMPTY, stage == GROWING, stage == RIPE]
    return tuple(float(feature) for feature in (*stages, fits, *(wanted == blueprint for blueprint in range(NUM_BLUEPRINTS))))


@functools.cache
def masks(stages: Stages) -> dict[str, Mask]:
    """Return which operations are valid of some slot, and which slots are valid of each operation; read-only arrays."""
    slot = np.array([[stage in ALLOWED[op] for stage in stages] for op in range(4)])
    op = slot.any(axis=1)
    for mask in (op, slot):
        mask.setflags(write=False)
    return {"op": op, "slot": slot}


@functools.cache
def flat_mask(stages: Stages) -> Mask:
    """Return the mask over [operation, slot, blueprint] as one row, with irrelevant parts at their first value; read-only."""
    mask = np.zeros((4, NUM_SLOTS, NUM_BLUEPRINTS), np.bool_)
    slot = masks(stages)["slot"]
    mask[WAIT, 0, 0] = True
    mask[GERMINATE] = slot[GERMINATE, :, None]
    mask[[PRUNE, FOSSILIZE], :, 0] = slot[[PRUNE, FOSSILIZE]]
    mask = mask.reshape(-1)
    mask.setflags(write=False)
    return mask


@functools.cache
def per_dimension_mask(stages: Stages) -> Mask:
    """Return operations, slots, blueprints, one after the other: allowed is what is valid with some other part; read-only."""
    by_op = masks(stages)
    mask = np.concatenate([by_op["op"], by_op["slot"].any(axis=0), np.ones(NUM_BLUEPRINTS, np.bool_)])
    mask.setflags(write=False)
    return mask


def flat_grow() -> gym.Env[Observation, int]:
    """Return Grow with one Discrete(64) instead of three parts."""

    def parts(action: int) -> NDArray[np.int64]:
        return np.array([action // 16, action // 4 % 4, action % 4])

    return TransformAction(Remasked(Grow(), flat_mask), parts, spaces.Discrete(4 * NUM_SLOTS * NUM_BLUEPRINTS))


class InvalidActions(gym.Wrapper[np.int64, int, np.int64, int]):
    """Puts the mask of sb3-contrib's environment into ``info``; it draws from numpy's global generator, so seeds go there."""

    def __init__(self) -> None:
        from sb3_contrib.common.envs import InvalidActionEnvDiscrete  # needed here alone

        super().__init__(InvalidActionEnvDiscrete(dim=70, n_invalid_actions=55))

    def action_masks(self) -> Mask:
        """Return which actions are valid; where sb3-contrib looks for it."""
        return np.array(self.env.get_wrapper_attr("action_masks")())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.int64, dict[str, Any]]:
        if seed is not None:
            np.random.seed(seed)
            self.env.action_space.seed(seed)
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, action: int) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), terminated, truncated, {**info, "action_mask": self.action_masks()}


OWN = {
    "CartPole-position": lambda: PositionOnly(gym.make("CartPole-v1")),
    "Grow": Grow,
    "Grow-flat": flat_grow,
    "Grow-per-dimension": lambda: Remasked(Grow(), per_dimension_mask),
    "Grow-hidden": lambda: Grow(hidden_ages=True),
    "InvalidActions": InvalidActions,
}


def make(name: str) -> gym.Env[Any, Any]:
    """Return a new environment: one of these, or Gymnasium's of that id."""
    return OWN[name]() if name in OWN else gym.make(name)
