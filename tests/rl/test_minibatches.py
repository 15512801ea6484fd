"""Minibatches: every valid row once, sequences within episodes, padding that reaches nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from morphogen.rl.minibatches import Rows, batches_of, find_sequences
from morphogen.rl.rollout import Rollout


def make_rollout(seed: int, steps: int, envs: int, fillers: bool, memory: bool) -> tuple[Rollout, Rows]:
    """A rollout whose observations and rows hold their own number, step * envs + env."""
    chance = np.random.default_rng(seed)
    start = np.zeros((steps, envs), dtype=bool)
    valid = np.ones((steps, envs), dtype=bool)
    for env in range(envs):
        step = 0
        while step < steps:
            end = step + int(chance.integers(1, 6))  # the row in which the episode ends
            if fillers and end + 1 < steps:
                valid[end + 1, env] = False
            step = end + 1 + fillers
            if step < steps:
                start[step, env] = True
    number = torch.arange(steps * envs, dtype=torch.float32).view(steps, envs)
    number_B = number.flatten()[torch.from_numpy(valid.ravel())]
    rollout = Rollout(
        observation_TND=number[..., None].clone(),
        mask_TNM=None,
        action_TN=number,
        log_prob_TNH=number[..., None],
        actor_TNA=number[..., None],
        critic_QTNK=number[None, ..., None],
        next_critic_QTNK=number[None, ..., None],
        reward_TN=np.zeros((steps, envs), np.float32),
        terminated_TN=np.zeros((steps, envs), bool),
        continues_TN=np.zeros((steps, envs), bool),
        start_TN=start,
        valid_TN=valid,
        state_TSCNW=number[:, None, None, :, None].clone() if memory else None,
    )
    empty = torch.zeros(len(number_B), 1)
    return rollout, Rows(None, number_B, empty, None, None, number_B, number_B[:, None])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 15),
    envs=st.integers(1, 4),
    fillers=st.booleans(),
    memory=st.booleans(),
    size=st.integers(1, 30),
    cut=st.none() | st.integers(1, 6),
)
def test_every_valid_row_comes_once_and_meets_its_observation(
    *, seed: int, steps: int, envs: int, fillers: bool, memory: bool, size: int, cut: int | None
) -> None:
    rollout, rows = make_rollout(seed, steps, envs, fillers, memory)
    batches = batches_of(rollout, rows, cut if memory else None)
    seen = []
    for batch in batches.epoch(size, torch.Generator().manual_seed(seed)):
        numbers = batch.observation.flatten()
        numbers = numbers if batch.places_B is None else numbers[batch.places_B]
        assert torch.equal(numbers, batch.rows.action_B)
        seen += numbers.tolist()
    assert sorted(seen) == rows.action_B.tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 15),
    envs=st.integers(1, 4),
    fillers=st.booleans(),
    cut=st.none() | st.integers(1, 6),
)
def test_sequences_are_cut_at_starts_and_begin_with_the_state_of_their_first_row(
    seed: int, steps: int, envs: int, fillers: bool, cut: int | None
) -> None:
    rollout, rows = make_rollout(seed, steps, envs, fillers, memory=True)
    first_G, env_G, length_G = find_sequences(rollout.start_TN, rollout.valid_TN, cut)
    covered = np.zeros_like(rollout.valid_TN, dtype=int)
    for first, env, length in zip(first_G, env_G, length_G, strict=True):
        covered[first : first + length, env] += 1
        assert not rollout.start_TN[first + 1 : first + length, env].any()
        assert cut is None or length <= cut
    assert (covered == rollout.valid_TN).all()
    batch = batches_of(rollout, rows, cut).whole()
    assert batch.state_SCGW is not None
    assert torch.equal(batch.state_SCGW[0, 0, :, 0], batch.observation[0, :, 0])


@pytest.mark.parametrize("size", [3, 7, 10, 100])
def test_minibatches_without_memory_are_as_equal_as_can_be(size: int) -> None:
    rollout, rows = make_rollout(0, 10, 2, fillers=False, memory=False)
    sizes = [len(batch.rows) for batch in batches_of(rollout, rows, None).epoch(size, torch.Generator())]
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == max(1, round(20 / size))


def test_the_order_is_drawn_from_the_generator_alone() -> None:
    rollout, rows = make_rollout(0, 10, 2, fillers=False, memory=False)
    batches = batches_of(rollout, rows, None)
    orders = [
        [batch.rows.action_B.tolist() for batch in batches.epoch(5, torch.Generator().manual_seed(seed))] for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_padding_repeats_a_row_so_that_garbage_elsewhere_stays_out() -> None:
    rollout, rows = make_rollout(3, 12, 3, fillers=True, memory=True)
    poisoned = rollout.observation_TND.clone()
    poisoned[~torch.from_numpy(rollout.valid_TN)] = float("nan")
    clean, dirty = (
        batches_of(dataclasses.replace(rollout, observation_TND=observation), rows, None).whole().observation
        for observation in (rollout.observation_TND, poisoned)
    )
    assert torch.equal(clean, dirty)
