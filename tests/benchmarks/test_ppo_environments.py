"""The environments of the PPO benchmarks have the rules that their docstring says, and masks that are exact."""

from __future__ import annotations

import copy
import itertools
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

SEEDS = range(5)
WAIT, GERMINATE, PRUNE, FOSSILIZE = range(4)
TRIPLES = list(itertools.product(range(4), repeat=3))


def act(env: Any, op: int, slot: int = 0, blueprint: int = 0) -> tuple[float, dict[str, Any]]:
    """Take one step of Grow; return reward and info."""
    _, reward, terminated, _, info = env.step(np.array([op, slot, blueprint]))
    assert not terminated
    return reward, info


def play_at_random(env: Any, seed: int) -> tuple[float, int]:
    """Return the return of an episode of valid actions of a flat Grow, and its steps."""
    chance = np.random.default_rng(seed)
    (_, info), total, truncated, steps = env.reset(seed=seed), 0.0, False, 0
    while not truncated:
        _, reward, _, truncated, info = env.step(chance.choice(np.flatnonzero(info["action_mask"])))
        total, steps = total + reward, steps + 1
    return total, steps


@pytest.mark.parametrize("name", ["Grow", "Grow-hidden", "Grow-flat"])
@pytest.mark.parametrize("seed", SEEDS)
def test_filling_and_emptying_all_slots_in_turn_gives_sixteen(ppo: SimpleNamespace, name: str, seed: int) -> None:
    env, total = ppo.environments.make(name), 0.0
    env.reset(seed=seed)
    for step in range(32):
        op, slot = (GERMINATE, FOSSILIZE)[step // 4 % 2], step % 4
        triple = (op, slot, env.unwrapped.wanted[slot] if op == GERMINATE else 0)
        action = 16 * triple[0] + 4 * triple[1] + triple[2] if name == "Grow-flat" else np.array(triple)
        _, reward, terminated, truncated, _ = env.step(action)
        total += reward
        assert (terminated, truncated) == (False, step == 31)
    assert total == pytest.approx(16.0)
    assert env.unwrapped.invalid_actions == 0


def test_random_valid_actions_give_half_a_point_and_are_never_invalid(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow-flat")
    played = [play_at_random(env, seed) for seed in range(400)]
    assert {steps for _, steps in played} == {32}
    assert statistics.fmean(total for total, _ in played) == pytest.approx(0.5, abs=0.2)
    assert env.unwrapped.invalid_actions == 0


def test_rewards(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow")
    env.reset(seed=0)
    wanted = env.wanted
    assert act(env, WAIT, 3, 3)[0] == 0.0
    assert act(env, GERMINATE, 0, wanted[0])[0] == 0.0
    assert act(env, GERMINATE, 1, (wanted[1] + 1) % 4)[0] == 0.0
    assert act(env, GERMINATE, 2, 0)[0] == 0.0
    assert act(env, FOSSILIZE, 0)[0] == 1.0
    assert act(env, FOSSILIZE, 1)[0] == pytest.approx(-0.1)
    assert act(env, PRUNE, 2)[0] == pytest.approx(-0.05)
    assert env.invalid_actions == 0
    assert env.stages == (0, 0, 0, 0)
    assert env.wanted[2:] == wanted[2:], "pruning draws no new blueprint"


def test_a_slot_is_ripe_for_the_third_decision_after_its_germination(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow")
    _, info = env.reset(seed=0)
    allowed = [bool(info["action_mask"]["slot"][FOSSILIZE, 1])]
    for op in (GERMINATE, WAIT, WAIT):
        _, info = act(env, op, 1)
        allowed.append(bool(info["action_mask"]["slot"][FOSSILIZE, 1]))
    assert allowed == [False, False, False, True]


@pytest.mark.parametrize(("op", "slot"), [(PRUNE, 1), (FOSSILIZE, 1), (FOSSILIZE, 0), (GERMINATE, 0)])
def test_an_invalid_action_costs_a_tenth_and_does_nothing(ppo: SimpleNamespace, op: int, slot: int) -> None:
    env = ppo.environments.make("Grow")
    env.reset(seed=0)
    act(env, GERMINATE, 0, 2)
    idle = copy.deepcopy(env)
    observation, reward, *_ = env.step(np.array([op, slot, 3]))
    assert reward == pytest.approx(-0.1)
    assert env.invalid_actions == 1
    assert (observation == idle.step(np.array([WAIT, 0, 0]))[0]).all()


def test_fossilising_draws_every_blueprint(ppo: SimpleNamespace) -> None:
    env, drawn = ppo.environments.make("Grow"), set[tuple[int, int]]()
    for seed in range(40):
        env.reset(seed=seed)
        before = env.wanted
        for op in (GERMINATE, WAIT, WAIT, FOSSILIZE):
            act(env, op)
        assert env.wanted[1:] == before[1:]
        drawn.add((before[0], env.wanted[0]))
    assert {after for before, after in drawn if before == 0} == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_allow_what_has_an_effect_and_nothing_else(ppo: SimpleNamespace, seed: int) -> None:
    env, chance = ppo.environments.make("Grow-flat"), np.random.default_rng(seed)
    _, info = env.reset(seed=seed)
    for _ in range(12):
        grow, flat = env.unwrapped, info["action_mask"]
        given = ppo.environments.masks(grow.shown_stages)
        for op, slot, blueprint in TRIPLES:
            trial = copy.deepcopy(grow)
            act(trial, op, slot, blueprint)
            valid = trial.invalid_actions == grow.invalid_actions
            assert valid == given["slot"][op, slot]
            first = (slot, blueprint) == (0, 0) if op == WAIT else blueprint == 0 or op == GERMINATE
            assert flat[16 * op + 4 * slot + blueprint] == (valid and first)
        assert (given["op"] == given["slot"].any(axis=1)).all()
        _, _, _, _, info = env.step(chance.choice(np.flatnonzero(flat)))


def test_the_mask_per_dimension_covers_every_valid_action_and_lets_invalid_ones_through(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow-per-dimension")
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.array([GERMINATE, 0, 0]))
    mask, slots = info["action_mask"], ppo.environments.masks(env.unwrapped.stages)["slot"]
    assert (mask == env.get_wrapper_attr("action_masks")()).all()
    covered = [mask[op] and mask[4 + slot] and mask[8 + blueprint] for op, slot, blueprint in TRIPLES]
    valid = [slots[op, slot] for op, slot, _ in TRIPLES]
    assert all(cover for cover, needed in zip(covered, valid, strict=True) if needed)
    assert any(cover and not needed for cover, needed in zip(covered, valid, strict=True))


def test_hidden_ages_are_in_neither_observation_nor_mask(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow-hidden")
    env.reset(seed=0)
    steps = [env.step(np.array([op, 0, 0])) for op in (GERMINATE, WAIT, WAIT)]
    assert env.stages == (2, 0, 0, 0)
    young, ripe = steps[0], steps[2]
    assert (young[0][:-1] == ripe[0][:-1]).all()
    for part in ("op", "slot"):
        assert (young[4]["action_mask"][part] == ripe[4]["action_mask"][part]).all()
    assert young[4]["action_mask"]["slot"][FOSSILIZE].tolist() == [True, False, False, False]


def test_the_observation_says_what_the_docstring_says(ppo: SimpleNamespace) -> None:
    env = ppo.environments.make("Grow")
    first, _ = env.reset(seed=3)
    blueprint = env.wanted[1]
    second = env.step(np.array([GERMINATE, 1, blueprint]))[0]
    asked = np.eye(4)[list(env.wanted)]
    assert first.shape == (33,)
    assert (first[:32].reshape(4, 8) == np.column_stack([np.tile([1, 0, 0, 0], (4, 1)), asked])).all()
    assert second[8:16].tolist() == [0, 1, 0, 1, *asked[1]]
    assert (first[-1], second[-1]) == (0, np.float32(1 / 32))


@pytest.mark.parametrize("name", ["Grow", "Grow-hidden"])
def test_grow_keeps_gymnasiums_contract(ppo: SimpleNamespace, name: str) -> None:
    check_env(ppo.environments.make(name), skip_render_check=True)


@pytest.mark.parametrize("name", ["Grow", "Grow-hidden", "Grow-flat", "Grow-per-dimension", "CartPole-position"])
def test_a_seed_settles_the_episode(ppo: SimpleNamespace, name: str) -> None:
    starts = [ppo.environments.make(name).reset(seed=seed)[0].tolist() for seed in (7, 7, 8)]
    assert starts[0] == starts[1] != starts[2]


def test_velocities_are_zero_and_positions_those_of_cartpole(ppo: SimpleNamespace) -> None:
    hidden, whole = ppo.environments.make("CartPole-position"), ppo.environments.make("CartPole-v1")
    seen, true = hidden.reset(seed=0)[0], whole.reset(seed=0)[0]
    for action in (0, 1, 1, 1):
        assert (seen == true * [1, 0, 1, 0]).all()
        assert true[[1, 3]].all()
        seen, true = hidden.step(action)[0], whole.step(action)[0]


def test_invalid_actions_shows_its_mask_and_can_be_seeded(ppo: SimpleNamespace) -> None:
    pytest.importorskip("sb3_contrib")
    episodes: list[list[list[int]]] = []
    before = np.random.get_state()  # it draws from the global generator
    for _ in range(2):
        env = ppo.environments.make("InvalidActions")
        state, info = env.reset(seed=5)
        states = [[int(state)]]
        for _ in range(5):
            assert info["action_mask"].sum() == 15
            assert info["action_mask"][state]
            state, reward, _, _, info = env.step(state)
            assert reward == 1.0
            states += [[int(state)], info["action_mask"].tolist()]
        episodes.append(states)
    np.random.set_state(before)
    assert episodes[0] == episodes[1]
    assert episodes[0][0] != episodes[0][1]
