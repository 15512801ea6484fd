"""The ring of snapshots is a value: good generations oldest first, at most one on probation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from morphogen.state import Generation, Ring, Snapshot


def taken(step: int) -> Snapshot:
    return Snapshot({"model": {"w": torch.tensor(float(step))}}, {}, {})


def steps(ring: Ring) -> list[tuple[int, bool]]:
    return [(generation.step, generation.good) for generation in ring.generations]


def test_a_candidate_is_replaced_and_promoted() -> None:
    ring = Ring(capacity=2).with_candidate(1, taken(1))
    assert steps(ring) == [(1, False)]
    assert ring.candidate == ring.generations[0]
    assert steps(ring.with_candidate(2, taken(2))) == [(2, False)]
    ring = ring.promoted().with_candidate(2, taken(2))
    assert steps(ring) == [(1, True), (2, False)]
    assert [generation.step for generation in ring.good] == [1]


def test_the_oldest_good_generation_falls_out_beyond_the_capacity() -> None:
    ring = Ring(capacity=2)
    for step in range(5):
        ring = ring.with_candidate(step, taken(step)).promoted()
    assert steps(ring) == [(3, True), (4, True)]
    assert ring.candidate is None
    assert steps(ring.with_candidate(5, taken(5))) == [(3, True), (4, True), (5, False)]


def test_rewinding_further_leaves_the_older_ones() -> None:
    ring = Ring(capacity=3)
    for step in range(3):
        ring = ring.with_candidate(step, taken(step)).promoted()
    assert steps(ring.before(ring.good[-1])) == [(0, True), (1, True)]
    assert steps(ring.before(ring.good[0])) == []
    assert steps(ring) == [(0, True), (1, True), (2, True)]  # a value: the ring itself never changed


def test_a_ring_is_frozen_and_holds_at_least_one() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Ring().capacity = 3
    with pytest.raises(ValueError, match="`capacity` must be at least 1, got 0"):
        Ring(capacity=0)
    assert Generation(3, taken(3), 3) != Generation(3, taken(3), 3)  # snapshots are compared by identity
