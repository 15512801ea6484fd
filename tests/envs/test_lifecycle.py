"""What the optimizer holds through real episodes: each trainable parameter once, and nothing of what is gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from morphogen import control
from morphogen.envs.episode import Episode
from morphogen.growth import Stage
from morphogen.growth.lifecycle import LIVE

_ADVANCE, _PRUNE, _FOSSILIZE = 2, 4, 5


def _episodes(env: Any) -> list[Episode]:
    return [env._executor._rows._episodes[row] for row in range(env.num_envs)]


def _check(episode: Episode) -> None:
    episode.training.state.verify()
    optimizer = episode.training.built.optimizer
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in episode.model.parameters() if parameter.requires_grad}
    assert len(set(held)) == len(held) and set(held) == trainable
    assert {id(parameter) for parameter in optimizer.state} <= trainable
    owned = episode.model.owners()
    for group in optimizer.param_groups:
        assert {id(p) for p in group["params"]} <= {id(p) for _, p in owned[group["owner"]]}


@pytest.mark.parametrize("seed", range(3))
def test_the_optimizer_holds_what_is_trained_after_any_actions_and_faults(begin: Any, seed: int) -> None:
    inject = {0: ["nan_gradient@13"], 1: ["nan_output@20"], 2: ["inf_gradient@9"]}
    game = begin(4, seeds=range(4 * seed, 4 * seed + 4), inject=inject, total_steps=60)
    seen: set[float] = set()
    for _ in range(40):
        game.play(1)
        stages = game.env.frames.slot("stage")
        seen |= set(stages[~np.isnan(stages)].tolist())
        for episode in _episodes(game.env):
            _check(episode)
    assert len(seen) >= 5  # it was not all dormant


def _moments(episode: Episode, parameters: list[Parameter]) -> dict[int, torch.Tensor]:
    state = episode.training.built.optimizer.state
    return {id(parameter): state[parameter]["exp_avg"].clone() for parameter in parameters if parameter in state}


@pytest.mark.parametrize("op", [_PRUNE, _FOSSILIZE])
def test_fossilising_keeps_moments_and_pruning_drops_them(begin: Any, op: int) -> None:
    game = begin(1, total_steps=2000)
    episode = _episodes(game.env)[0]
    for tick in range(200):
        if game.info["action_mask"]["slot"][0, op, 0] and episode.model.stages()["block1"] is Stage.HOLDING:
            break
        wanted = 1 if tick == 0 else _ADVANCE
        choices = np.zeros((1, 8), int)
        choices[0, 0] = wanted if game.info["action_mask"]["slot"][0, wanted, 0] else 0
        *_, game.info = game.env.step(choices)
    seeds = [parameter for _, parameter in episode.model.owners()["block1"]]
    before = _moments(episode, seeds)
    assert before
    control.execute(episode.model, episode.menu.action([op, 0, 0, 0, 0, 0, 0, 0]))
    after = _moments(episode, seeds)
    if op == _FOSSILIZE:
        assert episode.model.stages()["block1"] is Stage.FOSSILIZED
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    else:
        assert episode.model.stages()["block1"] not in LIVE and not after
    _check(episode)
    game.env.step(np.zeros((1, 8), int))
    _check(episode)
