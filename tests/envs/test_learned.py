"""A trained policy at work: memory, masks, chance, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.choices import Layout
from morphogen.envs.learned import LearnedPolicy, sample_observations
from morphogen.envs.masks import is_possible
from morphogen.errors import CheckpointError
from morphogen.recipes.policy_file import load_policy


@pytest.fixture
def policy(small_policy: Path) -> LearnedPolicy:
    return load_policy(small_policy)


@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    env = GrowthVectorEnv("digits", 3, total_steps=8, tick_steps=2)
    _, info = env.reset(seed=0)
    return info["action_mask"]


def observations(seed: int, rows: int = 3) -> np.ndarray:
    pool = sample_observations(Layout())
    return pool[np.random.default_rng(seed).integers(len(pool), size=rows)]


def test_what_was_observed_before_is_remembered_and_a_start_forgets_it_in_its_row_alone(policy, masks) -> None:
    policy.start(3)
    policy.choose(observations(0), masks)
    before = policy.state_dict()["memory"]
    assert before.abs().max() > 0
    policy.choose(observations(1), masks, np.array([False, True, False]))
    mixed = policy.state_dict()["memory"]
    policy.start(3)
    policy.choose(observations(1), masks)
    fresh = policy.state_dict()["memory"]
    torch.testing.assert_close(mixed[:, :, 1], fresh[:, :, 1], rtol=0, atol=0)
    assert not torch.equal(mixed[:, :, 0], fresh[:, :, 0])


def test_it_goes_on_from_its_state(policy, masks) -> None:
    policy.start(3)
    policy.choose(observations(0), masks)
    other = policy.twin()
    other.load_state_dict(policy.state_dict())
    for seed in range(1, 5):
        np.testing.assert_array_equal(policy.choose(observations(seed), masks), other.choose(observations(seed), masks))
    assert torch.equal(policy.state_dict()["memory"], other.state_dict()["memory"])


def test_a_twin_shares_no_memory(policy, masks) -> None:
    policy.start(3)
    twin = policy.twin()
    policy.choose(observations(0), masks)
    assert twin.state_dict()["memory"].abs().max() == 0


def test_drawn_choices_come_from_the_generator_alone_and_vary(policy, masks) -> None:
    def drawn(seed: int) -> np.ndarray:
        policy.start(3)
        generator = torch.Generator().manual_seed(seed)
        return np.stack([policy.choose(observations(step), masks, generator=generator) for step in range(8)])

    before = torch.get_rng_state()
    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()
    assert torch.equal(before, torch.get_rng_state())


def test_masks_are_kept_in_every_environment(policy) -> None:
    env = GrowthVectorEnv("digits", 2, total_steps=8, tick_steps=2)
    observation, info = env.reset(seed=5)
    policy.start(2)
    starts, generator = np.ones(2, dtype=bool), torch.Generator().manual_seed(0)
    for _ in range(8):
        choices = policy.choose(observation, info["action_mask"], starts, generator=generator)
        assert is_possible(choices, env.frames, env.menu).all()
        observation, _, starts, _, info = env.step(choices)


def test_another_number_of_rows_is_refused(policy, masks) -> None:
    policy.start(2)
    with pytest.raises(ValueError, match="must have 2 rows, got 3"):
        policy.choose(observations(0), masks)
    with pytest.raises(ValueError, match="`num_envs` must be at least 1"):
        policy.start(0)


def test_another_layout_is_refused_with_what_to_do(policy) -> None:
    env = GrowthVectorEnv("digits", 1, num_slots=6)
    with pytest.raises(CheckpointError, match="num_slots=5 and num_blueprints=5, got 6 and 5. Give the environment as many"):
        policy.fit(env.menu, "mine")
    policy.fit(GrowthVectorEnv("digits", 1).menu)


def test_on_another_task_slots_and_length_are_its_own(policy) -> None:
    env = policy.origin.env.replace(slots=("early",))
    narrow = LearnedPolicy(*policy._parts, dataclasses.replace(policy.origin, env=env))
    assert narrow.on("digits").origin.env == env
    moved = narrow.on("mnist1d").origin.env
    assert (moved.slots, moved.total_steps, moved.tick_steps) == (None, None, None)
    assert moved.reward == env.reward
