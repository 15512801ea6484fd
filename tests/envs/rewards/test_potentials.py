"""Shaping adds up to gamma^T * phi_T - phi_0, whatever is done and to which slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphogen.control import Op
from morphogen.envs.frames import Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import RewardConfig, StageConfig, potentials
from morphogen.growth import Stage

_GAMMAS = st.sampled_from([1.0, 0.995, 0.9, 0.5])
_SHAPING = {"progress": potentials.metric_potential, "stages": potentials.stage_potential}


@pytest.mark.parametrize("name", list(_SHAPING))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12), gamma_ends=st.tuples(_GAMMAS, st.booleans()))
def test_shaping_telescopes_over_any_frames_and_actions(random_records, name, seed, steps, gamma_ends) -> None:
    gamma, ends = gamma_ends
    config = RewardConfig(gamma=gamma)
    records = random_records(seed, steps, gamma, ends)
    phi = _SHAPING[name]
    paid_TN = np.array([getattr(potentials, name)(record, config) for record in records])
    last_N = np.where(ends, 0.0, phi(records[-1].after, config))
    expected_N = gamma**steps * last_N - phi(records[0].before, config)
    np.testing.assert_allclose(gamma ** np.arange(steps) @ paid_TN, expected_N, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_shaping_does_not_depend_on_the_action(random_records, seed) -> None:
    (record,) = random_records(seed, 1, RewardConfig().gamma, False)
    other = StepRecord(record.before, record.after, record.choices_NH * 0, record.ended_N, record.faulty_N, record.gamma)
    for name in _SHAPING:
        term = getattr(potentials, name)
        np.testing.assert_array_equal(term(record, RewardConfig()), term(other, RewardConfig()))


@pytest.mark.parametrize("fault_at", [None, 0, 9, 14])
def test_shaping_of_an_episode_adds_up_to_nothing_however_it_ends(story, play, grown, fault_at) -> None:
    config = RewardConfig()
    paid = play(story(grown(), fault_at=fault_at).records(config.gamma), config)
    for name in _SHAPING:
        assert paid.discounted_sum(name, config.gamma) == pytest.approx(0.0, abs=1e-9)
        assert fault_at == 0 or abs(paid.terms[name]).max() > 0.05


def _with_stages(*slots: dict[str, float]) -> Frames:
    frames = Frames.empty(1, len(slots))
    for place, numbers in enumerate(slots):
        for name, value in {"is_pruning": 0.0, "ticks_in_stage": 0.0, **numbers}.items():
            frames.slot(name)[0, place] = value
    return frames


def _potential(*slots: dict[str, float]) -> float:
    return float(potentials.stage_potential(_with_stages(*slots), RewardConfig(stages=StageConfig(weight=1.0)))[0])


def test_the_potential_rises_on_the_way_to_a_fossil_and_sums_over_slots() -> None:
    path = [
        (Stage.GERMINATED, 0),
        (Stage.GERMINATED, 3),
        (Stage.TRAINING, 0),
        (Stage.TRAINING, 99),
        (Stage.BLENDING, 0),
        (Stage.HOLDING, 0),
        (Stage.HOLDING, 2),
        (Stage.FOSSILIZED, 0),
    ]
    values = [_potential({"stage": stage, "ticks_in_stage": ticks}) for stage, ticks in path]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert _potential({"stage": Stage.TRAINING}, {"stage": Stage.HOLDING}, {"stage": np.nan}) == 2.0 + 5.5


def test_a_seed_on_its_way_out_has_no_potential_nor_has_an_empty_slot() -> None:
    assert _potential({"stage": Stage.BLENDING, "is_pruning": 1.0, "ticks_in_stage": 3}) == 0.0
    for stage in (Stage.DORMANT, Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING):
        assert _potential({"stage": stage, "ticks_in_stage": 3}) == 0.0
    assert _potential({"stage": Stage.FOSSILIZED, "ticks_in_stage": 30}) == 6.0


def test_germinating_and_pruning_never_gains_by_shaping(story, play) -> None:
    actions = {tick: (Op.GERMINATE if tick % 10 == 0 else Op.PRUNE, 0) for tick in range(40) if tick % 10 in (0, 2)}
    paid = play(story(actions, metric=lambda tick: 0.1).records(RewardConfig().gamma), RewardConfig()).terms["stages"]
    assert paid.max() > 0.05  # the offer
    assert np.cumsum(RewardConfig().gamma ** np.arange(40) * paid)[-1] == pytest.approx(0.0, abs=1e-12)


def test_potentials_that_would_pay_for_going_back_are_refused() -> None:
    with pytest.raises(ValueError, match="`potentials` must rise"):
        StageConfig(potentials=(1.0, 2.0, 2.0, 3.0, 4.0))
    with pytest.raises(ValueError, match=r"`dwell_cap` must be <= 0\.5"):
        StageConfig(dwell_cap=2.0)
