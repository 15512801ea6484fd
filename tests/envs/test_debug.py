"""Norms of parameters and gradients are those of torch, layer by layer, in whichever process the networks are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from morphogen import tasks
from morphogen.control import Op
from morphogen.envs import GrowthVectorEnv
from morphogen.envs.debug import DebugStatistics, debug_statistics


@pytest.fixture
def grown(begin: Any) -> Any:
    """Return two environments whose first slot was sown."""
    game = begin(2)
    actions = np.zeros((2, 8), dtype=int)
    actions[:, 0] = Op.GERMINATE
    game.env.step(actions)
    return game.env


def test_every_parameter_is_there_with_its_norms(grown: GrowthVectorEnv) -> None:
    episode = grown._executor._rows._episodes[0]  # pyright: ignore[reportAttributeAccessIssue]
    first, second = grown.debug_statistics()
    expected = dict(episode.model.named_parameters())
    assert first.names == tuple(expected) and second.names == first.names
    for place, parameter in enumerate(expected.values()):
        assert first.weight_norms[place] == pytest.approx(float(parameter.detach().norm()), rel=1e-6)
        norm = np.nan if parameter.grad is None else float(parameter.grad.norm())
        assert first.gradient_norms[place] == pytest.approx(norm, rel=1e-6, nan_ok=True)
    assert np.isfinite(first.gradient_norms).any() and np.isnan(first.gradient_norms).any()  # the new seed has none yet
    assert first.worst == first.names[int(np.nanargmax(first.ratios))]


def test_asking_changes_nothing(begin: Any, assert_same: Any) -> None:
    asked, silent = begin(2), begin(2)
    for _ in range(4):
        asked.env.debug_statistics()
        assert_same(silent.play(1), asked.play(1))


def test_before_the_first_step_there_are_no_gradients() -> None:
    built = tasks.get("digits").build(seed=0)
    found = debug_statistics(built.model)
    assert np.isnan(found.gradient_norms).all() and (found.weight_norms > 0).any() and found.worst == ""


def test_what_is_not_finite_is_the_worst() -> None:
    found = DebugStatistics(("a", "b", "c", "d"), np.array([1.0, np.inf, 9.0, np.nan]), np.array([1.0, 1e9, 1.0, 1.0]))
    assert found.worst == "b"


def test_workers_say_the_same(grown: GrowthVectorEnv, game_on: Any) -> None:
    env = GrowthVectorEnv("digits", 2, executor="processes", num_workers=1, **grown.config.model_dump(exclude_unset=True))
    env.reset(seed=0)
    actions = np.zeros((2, 8), dtype=int)
    actions[:, 0] = Op.GERMINATE
    env.step(actions)
    for ours, theirs in zip(grown.debug_statistics(), env.debug_statistics(), strict=True):
        assert ours.names == theirs.names
        np.testing.assert_array_equal(ours.gradient_norms, theirs.gradient_norms)
        np.testing.assert_array_equal(ours.weight_norms, theirs.weight_norms)
    env.close()
