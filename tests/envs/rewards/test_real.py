"""Rewards of real networks that were really grown: digits, six ticks of two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from morphogen.control import Op
from morphogen.envs import GrowthVectorEnv
from morphogen.envs.rewards import PRESETS, TERMS, RewardConfig
from morphogen.growth.config import GateConfig, GrowthConfig

_TICKS = 6
_GATES = GateConfig(min_training_ticks=1, min_blending_ticks=0, min_holding_ticks=0, min_contribution=-1.0)
_GROWTH = GrowthConfig(embargo_ticks=0, gates=_GATES)
_SETTINGS: dict[str, Any] = {"total_steps": 2 * _TICKS, "tick_steps": 2, "growth": _GROWTH}

Paid = list[dict[str, np.ndarray]]
Chooses = Callable[[dict[str, Any], int], np.ndarray]


def _play(env: GrowthVectorEnv, choose: Chooses) -> tuple[Paid, np.ndarray]:
    """Return what each term paid in each step of an episode, and the rewards [T, N]."""
    _, info = env.reset(seed=3)
    paid, rewards = Paid(), list[np.ndarray]()
    for tick in range(_TICKS):
        _, reward_N, ended_N, _, info = env.step(choose(info, tick))
        assert ended_N.all() == (tick == _TICKS - 1)
        paid.append(info["reward_terms"])
        rewards.append(reward_N)
        np.testing.assert_allclose(reward_N, sum(paid[-1].values()), atol=1e-12)
    return paid, np.stack(rewards)


def _any_possible(rng: np.random.Generator) -> Chooses:
    """Draw ops but WAIT where there are any, on any slot."""

    def choose(info: dict[str, Any], tick: int) -> np.ndarray:
        mask, chosen = info["action_mask"], []
        for row in range(len(mask["op"])):
            possible = np.flatnonzero(mask["op"][row])
            op = rng.choice(possible[1:]) if len(possible) > 1 else 0
            slot = rng.choice(np.flatnonzero(mask["slot"][row, op]))
            chosen.append([op, slot, rng.integers(4), 0, rng.integers(3), rng.integers(3), rng.integers(1, 4), 0])
        return np.array(chosen)

    return choose


def _script(*done: tuple[Op, int]) -> Chooses:
    return lambda info, tick: np.array([[*(done[tick] if tick < len(done) else (Op.WAIT, 0)), *[0] * 6]])


@pytest.fixture
def make() -> Iterator[Callable[..., GrowthVectorEnv]]:
    made = list[GrowthVectorEnv]()

    def build(num_envs: int, **reward: Any) -> GrowthVectorEnv:
        made.append(GrowthVectorEnv("digits", num_envs, reward=RewardConfig(**reward), **_SETTINGS))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.mark.parametrize("preset", ["shaped", "loss"])
def test_shaping_adds_up_to_nothing_for_any_actions(make, preset) -> None:
    gamma = 0.9
    paid, _ = _play(make(2, preset=preset, gamma=gamma), _any_possible(np.random.default_rng(1)))
    shaping = [name for name in paid[0] if TERMS[name].is_shaping]
    assert len(shaping) == 2
    for name in shaping:
        points_TN = np.stack([each[name] for each in paid])
        assert (np.abs(points_TN).max(0) > 0.01).all()
        np.testing.assert_allclose(gamma ** np.arange(_TICKS) @ points_TN, 0.0, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_waiting_earns_the_terminal_term_alone(make, preset) -> None:
    gamma = 0.995
    env = make(1, preset=preset, gamma=gamma)
    paid, reward_TN = _play(env, _script())
    terminal = paid[-1]["loss_terminal" if preset == "loss" else "terminal"]
    assert terminal[0] > 0.1
    np.testing.assert_allclose(gamma ** np.arange(_TICKS) @ reward_TN, gamma ** (_TICKS - 1) * terminal, atol=1e-9)


@pytest.mark.parametrize("preset", ["shaped", "escrow", "basic", "basic_plus"])
def test_germinating_and_pruning_pays_less_than_waiting(make, preset) -> None:
    farm = _script((Op.GERMINATE, 0), (Op.PRUNE, 0), (Op.GERMINATE, 1), (Op.PRUNE, 1), (Op.GERMINATE, 0), (Op.PRUNE, 0))
    env = make(1, preset=preset)
    farmed, waited = (_play(env, choose) for choose in (farm, _script()))
    assert farmed[0][-1]["terminal"] == waited[0][-1]["terminal"]  # the host does not feel an incubating seed
    discounts = 1.0 ** np.arange(_TICKS)
    assert discounts @ farmed[1] < discounts @ waited[1]


def test_a_seed_that_is_grown_and_kept_is_charged_and_paid_as_it_happens(make) -> None:
    grow = _script(*((op, 0) for op in (Op.GERMINATE, Op.ADVANCE, Op.ADVANCE, Op.ADVANCE, Op.FOSSILIZE)))
    env = make(1)
    paid, _ = _play(env, grow)
    points = {name: np.array([each[name][0] for each in paid]) for name in paid[0]}
    assert (points["rent"] < 0).all() and np.diff(points["rent"])[1] < 0  # at alpha 1 it costs more than in incubation
    assert points["churn"].tolist() == [-0.03, 0, 0, 0, 0, 0]
    assert np.flatnonzero(points["alpha_shock"]).tolist() == [2] and np.flatnonzero(points["attribution"]).tolist() == [4]
    assert np.flatnonzero(points["terminal"]).tolist() == [5] and not points["fault"].any()
    assert (points["stages"][:4] > 0).all() and points["stages"][5] == pytest.approx(-0.3)


def test_rent_counts_exactly_what_was_grown(make) -> None:
    env = make(1)
    env.reset(seed=0)
    env.step(np.array([[Op.GERMINATE, 1, 0, 0, 0, 0, 0, 0]]))
    frames = env.frames
    assert np.nansum(frames.slot("parameters")) == frames.run("parameters")[0] - frames.run("host_parameters")[0] > 0


def test_a_fault_ends_with_its_penalty_and_without_potential(make) -> None:
    env = make(2, gamma=0.9)
    _, info = env.reset(seed=3, options={"inject": {0: ["nan@5"]}})
    choose, paid, ended_N = _any_possible(np.random.default_rng(1)), Paid(), np.array([False, False])
    while not ended_N[0]:
        _, _, ended_N, _, info = env.step(choose(info, 0))
        paid.append(info["reward_terms"])
    assert paid[-1]["fault"].tolist() == [-1.5, 0.0] and len(paid) < _TICKS
    for name in ("progress", "stages"):
        points_T = np.array([each[name][0] for each in paid])
        assert 0.9 ** np.arange(len(paid)) @ points_T == pytest.approx(0.0, abs=1e-9)
