"""A fault is that of one environment alone: it pays for it, there and then and once, and no other notices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from morphogen import tasks
from morphogen.envs import GrowthVectorEnv
from morphogen.envs.episode import Episode
from morphogen.errors import EnvironmentFault
from morphogen.governor.faults import KINDS


def _episode(env: GrowthVectorEnv, row: int) -> Episode:
    return env._executor._rows._episodes[row]


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("kind", ["nan_input", "nan_gradient"])
def test_nan_ends_the_episode_in_the_step_that_has_it_once_and_no_other(
    begin: Any, assert_same: Any, kind: str, step: int
) -> None:
    sound, faulty = begin(2, seeds=[4, 6]), begin(2, seeds=[4, 6], inject={0: [f"{kind}@{step}"]})
    penalty = faulty.env.config.reward.fault_penalty
    at = step // 2
    for tick in range(7):
        expected, found = sound.play(1), faulty.play(1)
        assert_same(expected, found, [1], [1])
        if tick < at:
            assert_same(expected, found)
        assert bool(found["terminated"][0, 0]) == (tick in (at, at + 3, at + 6))
        if not found["terminated"].any():
            continue
        terms, final = faulty.info["reward_terms"], faulty.info["final_info"]
        assert final["_reason"].tolist() == found["terminated"][0].tolist()
        assert terms["fault"].tolist() == [-penalty if tick == at else 0.0, 0.0]
        assert final["rolled_back"][0] == (tick == at)
        assert bool(final["reason"][0]) == (tick == at) and not final["reason"][1]
        assert np.isfinite(found["reward"]).all()
    assert penalty > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 7, 12])
@pytest.mark.parametrize("grown", [False, True])
def test_no_kind_of_fault_is_a_crash_or_anybody_elses(begin: Any, assert_same: Any, step: int, grown: bool) -> None:
    kinds = list(KINDS)
    seeds, long = [3] * (len(kinds) + 1), {"total_steps": 20, "num_blueprints": 4}
    inject = {row: [f"{kind}@{step}"] for row, kind in enumerate(kinds)}
    sound = begin(1, seeds=[3], **long)
    game = begin(len(seeds), seeds=seeds, inject=inject, **long)
    if not grown:
        for each in (sound, game):
            each.actions = lambda each=each: np.zeros((each.env.num_envs, 8), int)
    ended: dict[int, int] = {}
    for tick in range(10):
        expected, found = sound.play(1), game.play(1)
        assert_same(expected, found, 0, len(kinds))
        assert np.isfinite(found["reward"]).all() and np.isfinite(found["observation"]).all()
        for row in np.flatnonzero(found["terminated"][0]):
            ended.setdefault(int(row), tick)
    at_once = {kind for row, kind in enumerate(kinds) if ended.get(row) == step // 2}
    if not grown:
        assert {"nan_input", "inf_input", "nan_output", "nan_gradient", "inf_gradient", "nan_weight", "buffers_nan"} <= at_once


def test_a_fault_that_does_not_fit_ends_its_episode_and_says_so(begin: Any) -> None:
    game = begin(2, inject={1: ["momentum_scale@0"]})
    assert game.play(1)["terminated"].tolist() == [[False, True]]
    assert "momentum_scale@0 injected" in game.info["final_info"]["reason"][1]
    assert game.play(1)["terminated"].tolist() == [[False, False]]


def _grown(begin: Any) -> Any:
    """Two environments of which both hold a seed that acts."""
    game = begin(2, total_steps=40)
    for tick in range(12):
        actions = np.zeros((2, 8), int)
        wanted = 1 if tick == 0 else 2
        actions[:, 0] = np.where(game.info["action_mask"]["slot"][:, wanted, 0], wanted, 0)
        *_, game.info = game.env.step(actions)
        if (game.env.frames.slot("alpha")[:, 0] > 0).all():
            return game
    raise AssertionError("no seed came to act")


def test_a_seed_that_breaks_in_the_last_step_of_a_tick_ends_the_episode_in_that_tick(begin: Any) -> None:
    game, steps = _grown(begin), []
    episode = _episode(game.env, 0)

    def break_it(*_: Any) -> None:
        steps.append(episode.training.cursor.step)
        if len(steps) == 2:  # the governor has looked already
            with torch.no_grad():
                next(episode.model.slot("block1").seed.parameters()).fill_(math.nan)

    episode.training.built.optimizer.register_step_post_hook(break_it)
    before = game.env.frames.copy()
    _, reward, terminated, _, game.info = game.env.step(np.zeros((2, 8), int))
    assert terminated.tolist() == [True, False] and np.isfinite(reward).all()
    final = game.info["final_info"]
    assert "weight or buffer is nan" in final["reason"][0] and final["rolled_back"].tolist() == [1.0, 0.0]
    assert final["metric"][0] == before.run("metric")[0] and final["tick"][0] == before.run("tick")[0] + 1
    game.play(2)


class _Broken(Exception):
    pass


def _failing(error: Exception, when: list[bool]) -> Any:
    task = tasks.get("digits")
    original = task.objective

    class Objective(type(original)):
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if when and when.pop(0):
                raise error
            return super().loss(outputs, targets)

    return dataclasses.replace(task, objective=Objective())


def test_an_error_of_torchs_is_a_fault_of_one_environment_and_the_run_goes_on(game_on: Any) -> None:
    when: list[bool] = []
    env = GrowthVectorEnv(_failing(torch.OutOfMemoryError("no memory"), when), 2, total_steps=6, tick_steps=2)
    game = game_on(env)
    game.play(1)
    when[:] = [False, False, False, True]  # the second environment's last batch
    played = game.play(1)
    assert played["terminated"].tolist() == [[False, True]]
    assert game.info["final_info"]["reason"][1] == "OutOfMemoryError: no memory"
    assert game.info["reward_terms"]["fault"].tolist() == [0.0, -env.config.reward.fault_penalty]
    assert game.play(2)["terminated"].tolist() == [[True, False], [False, False]]
    env.close()


def test_two_failures_in_a_row_are_nobodys_bad_luck(game_on: Any) -> None:
    when: list[bool] = []
    env = GrowthVectorEnv(_failing(RuntimeError("broken kernel"), when), 1, total_steps=6, tick_steps=2)
    game = game_on(env)
    when[:] = [True, True]
    game.play(1)
    with pytest.raises(EnvironmentFault, match="environment 0 raised RuntimeError in tick 0 of episode 1: broken kernel"):
        game.play(1)
    env.close()


def test_a_bug_is_raised_and_names_its_environment(game_on: Any) -> None:
    when: list[bool] = []
    env = GrowthVectorEnv(_failing(_Broken("a bug"), when), 2, total_steps=6, tick_steps=2)
    game = game_on(env)
    when[:] = [False, False, True]
    with pytest.raises(EnvironmentFault, match="environment 1 raised _Broken") as caught:
        game.play(1)
    assert caught.value.env_index == 1 and isinstance(caught.value.__cause__, _Broken)
    with pytest.raises(ValueError, match="did not come to its end"):
        game.play(1)
    game_on(env).play(1)
    env.close()
