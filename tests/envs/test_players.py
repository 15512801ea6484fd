"""Players: built-in and trained policies in the same environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from morphogen import control, tasks
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.episode import Episode
from morphogen.envs.frames import Frames
from morphogen.envs.masks import action_masks, sample_choices
from morphogen.envs.players import LearnedPlayer, Player, PolicyPlayer, control_observation
from morphogen.recipes.policy_file import load_policy

TICKS = 14
MakePlayer = Callable[[GrowthVectorEnv], Player]


def played(make: MakePlayer, seeds: Sequence[int], ticks: int = TICKS) -> tuple[np.ndarray, np.ndarray]:
    """Return choices [T, N, H] and rewards [T, N] of one whole episode for each seed."""
    env = GrowthVectorEnv("digits", len(seeds), total_steps=2 * ticks, tick_steps=2)
    player = make(env)
    observation, info = env.reset(seed=list(seeds))
    player.begin(seeds)
    choices, rewards = [], []
    for _ in range(ticks):
        choices.append(player.choose(env, observation, info))
        observation, reward, _, _, info = env.step(choices[-1])
        rewards.append(reward)
    env.close()
    return np.stack(choices), np.stack(rewards)


def test_a_built_in_policy_sees_in_the_frames_what_it_sees_of_the_model() -> None:
    task, config = tasks.get("digits"), GrowthEnvConfig(total_steps=60, tick_steps=2)
    episode, frames = Episode(task, config, seed=3, number=0), Frames.empty(1, config.num_slots)
    generator, stages, refused, tried = np.random.default_rng(1), set(), 0, 0
    while not episode.over:
        episode.write(frames, 0)
        seen = control_observation(frames, 0, episode.menu)
        views = control.view_slots(episode.model)
        assert (seen.tick, seen.total_ticks, seen.metric) == (episode.memory.tick, 30, episode.memory.metrics[-1])
        for view, own in zip(seen.slots, views, strict=True):
            named = own.blueprint if episode.model.slot(own.name).state.has_seed else None
            assert view.tried == tuple(dict.fromkeys(name for name in _in_menu(episode) if name in own.tried))
            assert vars(view) == {**vars(own), "tried": view.tried, "blueprint": named}
            stages.add(own.stage)
            refused += bool(view.refusals)
            tried += bool(view.tried)
        assert control.action_mask(seen.slots) == control.action_mask(views)
        episode.step(sample_choices(action_masks(frames, episode.menu), generator)[0])
    assert len(stages) >= 6 and refused and tried  # else nothing was compared


def _in_menu(episode: Episode) -> list[str]:
    return [sowing.blueprint for sowing in episode.menu.blueprints]


@pytest.mark.parametrize("name", control.names())
def test_every_action_of_a_built_in_policy_has_a_representation_and_is_executed(name: str) -> None:
    choices, rewards = played(lambda env: PolicyPlayer(name, env.menu), seeds=(0, 1))
    assert np.isfinite(rewards).all()
    ops = set(choices[:, :, 0].ravel().tolist())
    expected = {"wait": {0}, "random": set(range(4)), "periodic": {0, 1, 2}, "heuristic": {0, 1, 2}}[name]
    assert expected <= ops


@pytest.mark.parametrize("task", ["mnist1d", "text"])
def test_what_other_tasks_sow_has_a_representation_too(task: str) -> None:
    env = GrowthVectorEnv(task, 1, num_blueprints=5)
    for sowing in env.menu.blueprints:
        action = control.Action(op=control.Op.GERMINATE, slot=env.menu.slots[0], sowing=sowing)
        assert env.menu.action(env.menu.choices(action)) == action


def test_chance_hangs_on_the_seed_of_the_environment_alone() -> None:
    def drawn(*seeds: int) -> np.ndarray:
        return played(lambda env: PolicyPlayer("random", env.menu), seeds, ticks=8)[0]

    together, alone = drawn(7, 8), drawn(8)
    np.testing.assert_array_equal(together[:, 1], alone[:, 0])
    assert (together[:, 0] != together[:, 1]).any()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_trained_policy_plays_the_same_whoever_plays_beside(small_policy: Path, deterministic: bool) -> None:
    policy = load_policy(small_policy)

    def chosen(*seeds: int) -> np.ndarray:
        return played(lambda env: LearnedPlayer(policy, deterministic=deterministic), seeds, ticks=6)[0]

    together, alone = chosen(7, 8, 9), chosen(9)
    np.testing.assert_array_equal(together[:, 2], alone[:, 0])
    assert len(set(map(tuple, together.reshape(-1, together.shape[-1])))) > 2  # it does something


def test_a_player_that_begins_anew_has_forgotten_everything(small_policy: Path) -> None:
    player = LearnedPlayer(load_policy(small_policy))
    first = played(lambda env: player, (4,), ticks=4)[0]
    np.testing.assert_array_equal(played(lambda env: player, (4,), ticks=4)[0], first)


def test_an_unknown_policy_is_refused() -> None:
    env = GrowthVectorEnv("digits", 1)
    with pytest.raises(ValueError, match="Did you mean 'heuristic'"):
        PolicyPlayer("heurstic", env.menu)
