"""Action masks are found wherever Gymnasium puts them, belong to the observation to act on, and are never missing."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import NormalizeReward

from morphogen.errors import EnvironmentFault
from morphogen.rl.masks import MaskReader
from morphogen.rl.vector import Step, Stepper

MODES = list(AutoresetMode)
PLACES = ["array", "integers", "list", "heads", "observation"]
LENGTHS = (2, 3, 5)


class Masked(gym.Env[Any, Any]):
    """Observes its time; the mask is its time in binary. Gives none with the last observation of an episode in ``infos``."""

    action_space: spaces.Space[Any] = spaces.Discrete(4)

    def __init__(self, length: int, place: str, missing_at: int = -1) -> None:
        self.length, self.place, self.missing_at = length, place, missing_at
        time = spaces.Box(0, 99, (1,))
        in_observation = spaces.Dict(time=time, action_mask=spaces.MultiBinary(4))
        self.observation_space: spaces.Space[Any] = in_observation if place == "observation" else time

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return self.observe()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.time += 1
        observation, info = self.observe()
        return observation, 1.0, self.time == self.length, False, info

    def observe(self) -> tuple[Any, dict[str, Any]]:
        time, mask = np.array([self.time], dtype=np.float32), binary(self.time)
        if self.place == "observation":
            return {"time": time, "action_mask": mask.astype(np.int8)}, {}
        if self.time in (self.length, self.missing_at):
            return time, {}
        forms = {"array": mask, "integers": mask.astype(np.int8), "list": mask.tolist()}
        return time, {"action_mask": forms.get(self.place, {"low": mask[:2], "high": mask[2:]})}


def binary(time: int) -> np.ndarray:
    return np.array([bool(time >> bit & 1) for bit in range(4)])


def flat(value: Any, num_envs: int) -> np.ndarray:
    parts = [value["low"], value["high"]] if isinstance(value, dict) else [value]
    assert all(part.dtype == bool and len(part) == num_envs for part in parts)
    return np.concatenate(parts, axis=1)


def vector(mode: AutoresetMode, place: str, **kwargs: int) -> VectorEnv[Any, Any, Any]:
    return SyncVectorEnv([lambda length=length: Masked(length, place, **kwargs) for length in LENGTHS], autoreset_mode=mode)


def run(env: VectorEnv[Any, Any, Any], num_steps: int = 20) -> list[Step]:
    stepper = Stepper(env, flat)
    return [stepper.reset(0), *(stepper.step(np.zeros(3, dtype=np.int64)) for _ in range(num_steps))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
def test_the_mask_is_that_of_the_observation_to_act_on(place: str, mode: AutoresetMode) -> None:
    for step in run(vector(mode, place)):
        assert step.mask_NM is not None and step.mask_NM.dtype == bool
        assert step.mask_NM.tolist() == [binary(int(time)).tolist() for time in step.observation_ND[:, 0]]


@pytest.mark.parametrize("place", PLACES)
def test_before_a_filler_row_everything_is_allowed(place: str) -> None:
    steps = run(NormalizeReward(vector(AutoresetMode.NEXT_STEP, place)))
    assert any(not step.valid_N.all() for step in steps[1:])
    for before, step in zip(steps, steps[1:], strict=False):
        assert before.mask_NM is not None
        for env, time in enumerate(before.observation_ND[:, 0]):
            expected = binary(int(time)) if step.valid_N[env] else np.ones(4, dtype=bool)
            assert before.mask_NM[env].tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", ["array", "list", "heads"])
def test_a_missing_mask_names_the_environment(place: str, mode: AutoresetMode) -> None:
    with pytest.raises(EnvironmentFault, match="environment 2: `action_mask` must be given on every step") as caught:
        run(vector(mode, place, missing_at=4))
    assert caught.value.env_index == 2
    with pytest.raises(EnvironmentFault, match=r"environment \d: `action_mask` must be given on every step"):
        run(vector(mode, place, missing_at=1))


def test_masks_that_appear_after_the_reset_are_refused() -> None:
    with pytest.raises(EnvironmentFault, match="in the infos of reset if it is in those of step"):
        run(vector(AutoresetMode.SAME_STEP, "array", missing_at=0))


@pytest.mark.parametrize("place", PLACES)
def test_masks_that_no_action_takes_are_refused_or_left_out_on_purpose(place: str) -> None:
    with pytest.raises(ValueError, match=r"`action_mask` must not be in the (infos|observation) of an environment"):
        Stepper(vector(AutoresetMode.SAME_STEP, place)).reset(0)
    stepper = Stepper(vector(AutoresetMode.SAME_STEP, place), lambda value, num_envs: None)
    assert stepper.reset(0).mask_NM is None
    assert all(stepper.step(np.zeros(3, dtype=np.int64)).mask_NM is None for _ in range(9))


def test_a_layout_may_be_a_view_that_cannot_be_written() -> None:
    everything = np.broadcast_to(np.array([True, False, True, False]), (3, 4))
    stepper = Stepper(NormalizeReward(vector(AutoresetMode.NEXT_STEP, "array")), lambda value, num_envs: everything)
    masks = [stepper.reset(0).mask_NM, *(stepper.step(np.zeros(3, dtype=np.int64)).mask_NM for _ in range(4))]
    assert all(mask is not None and mask.shape == (3, 4) for mask in masks) and not everything.all()


def test_without_masks_there_are_none() -> None:
    stepper = Stepper(SyncVectorEnv([lambda: gym.make("CartPole-v1")]), flat)
    assert stepper.reset(0).mask_NM is None and stepper.step(np.zeros(1, dtype=np.int64)).mask_NM is None


def test_a_mask_holds_zeros_and_ones() -> None:
    reader = MaskReader(False, flat, 2)
    infos = {"action_mask": np.array([[0, 1], [0, 2]])}
    reader.settle(infos)
    with pytest.raises(EnvironmentFault, match="environment 1: `action_mask` must hold 0 and 1 alone, got 2"):
        reader.read(None, infos)


def test_a_head_that_one_environment_leaves_out_is_all_allowed_there() -> None:
    infos: dict[str, Any] = {}
    env = VectorEnv[Any, Any, Any]()
    env.num_envs = 2
    for row, heads in enumerate(
        [{"low": np.array([False, True]), "high": np.array([True, False])}, {"low": np.array([True, False])}]
    ):
        infos = env._add_info(infos, {"action_mask": heads}, row)
    reader = MaskReader(False, flat, 2)
    reader.settle(infos)
    mask_NM = reader.read(None, infos)
    assert mask_NM is not None and mask_NM.tolist() == [[False, True, True, False], [True, False, True, True]]
    infos["action_mask"]["low"][:] = True
    assert not mask_NM[0, 0], "a copy"
