"""Each pure term: its sign, its size, what it does not see."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphogen.control import Op
from morphogen.envs.frames import Frames
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import CreditConfig, RentConfig, RewardConfig, terms
from morphogen.growth import Stage

_CONFIG = RewardConfig(gamma=0.995)


def _record(
    op: Op, *, before: dict[str, float] | None = None, after: dict[str, float] | None = None, **run: float
) -> StepRecord:
    """A step at slot 1 of 2; numbers of the slot before and after, ``run`` after."""
    frames = []
    for numbers in (before or {}, after or {}):
        made = Frames.empty(1, 2)
        made.run("tick")[0], made.run("total_ticks")[0], made.run("host_parameters")[0] = 3, 40, 562
        made.run("quarantined")[0] = 0
        made.slot("stage")[0] = Stage.DORMANT
        for name, value in {"parameters": 0.0, **numbers}.items():
            made.slot(name)[0, 1] = value
        frames.append(made)
    ended, faulty = bool(run.pop("ended", False)), bool(run.pop("faulty", False))
    for name, value in run.items():
        frames[1].run(name)[0] = value
    return StepRecord(frames[0], frames[1], np.array([[op, 1]]), np.array([ended]), np.array([faulty]), 0.995)


def _rent(parameters: float, alpha: float, stage: Stage = Stage.BLENDING, **config: float) -> float:
    record = _record(Op.WAIT, after={"stage": stage, "alpha": alpha, "parameters": parameters})
    return float(terms.rent(record, RewardConfig(rent=RentConfig(**config)))[0])


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).map(sorted),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_rent_is_monotone_in_parameters_and_alpha(sizes, alphas) -> None:
    assert _rent(sizes[0], alphas[0]) >= _rent(sizes[1], alphas[1])
    if sizes[1] - sizes[0] > 1:
        assert _rent(sizes[0], alphas[0]) > _rent(sizes[1], alphas[0])
    if alphas[1] - alphas[0] > 1e-6 and sizes[1] > 1:
        assert _rent(sizes[1], alphas[0]) > _rent(sizes[1], alphas[1])


def test_rent_of_a_whole_episode() -> None:
    assert 40 * _rent(2400, 1.0) == pytest.approx(-0.2 * math.log(1 + 2400 / 562)) == pytest.approx(-0.33, abs=0.01)
    assert _rent(0, 0.0, Stage.DORMANT) == 0.0
    assert _rent(2400, 0.5, Stage.FOSSILIZED) == _rent(2400, 1.0)  # no discount for a fossil at half alpha
    assert _rent(2400, 0.0, Stage.TRAINING) < 0.0  # it is trained already


def test_a_tiny_host_does_not_make_rent_explode() -> None:
    record = _record(Op.WAIT, after={"stage": Stage.HOLDING, "alpha": 1.0, "parameters": 200.0}, host_parameters=20.0)
    assert 40 * terms.rent(record, _CONFIG)[0] == pytest.approx(-0.2 * math.log(2))


def test_the_terminal_term_is_the_level_reached_not_the_last_change() -> None:
    ended = _record(Op.WAIT, ended=True, metric=0.8, metric_1=0.799, start_metric=0.1)
    ended.before.run("tick")[0] = 39
    assert terms.terminal(ended, _CONFIG)[0] == pytest.approx(7.0)
    assert terms.terminal(_record(Op.WAIT, metric=0.8, start_metric=0.1), _CONFIG)[0] == 0.0


def test_a_fault_is_no_way_to_be_paid_early() -> None:
    fault = _record(Op.WAIT, ended=True, faulty=True, metric=0.8, start_metric=0.1)  # at tick 3, 36 more would follow
    assert terms.terminal(fault, _CONFIG)[0] == pytest.approx(7.0 * 0.995**36)
    assert terms.fault(fault, _CONFIG)[0] == -1.5
    assert terms.fault(_record(Op.WAIT, quarantined=2.0), _CONFIG)[0] == pytest.approx(-0.2)
    unknown = _record(Op.WAIT, ended=True, faulty=True, metric=np.nan, start_metric=0.1)
    assert terms.terminal(unknown, _CONFIG)[0] == 0.0


_SEED = {
    "stage": Stage.HOLDING,
    "ticks_in_stage": 5.0,
    "contribution": 0.06,
    "contribution_error": 0.01,
    "metric_at_birth": 0.3,
}


def _fossilized(op: Op = Op.FOSSILIZE, *, metric: float = 0.7, all_off: float = 0.6, **seed: float) -> float:
    becomes = seed.pop("becomes", Stage.FOSSILIZED)
    record = _record(op, before={**_SEED, **seed}, after={"stage": becomes})
    record.before.run("metric")[0], record.before.run("all_off_metric")[0] = metric, all_off
    return float(terms.attribution(record, _CONFIG)[0])


def test_a_fossil_is_paid_for_its_contribution_less_its_error() -> None:
    assert _fossilized() == pytest.approx(0.2 * math.tanh(1.0))
    assert _fossilized(contribution=0.08) > _fossilized() > _fossilized(contribution_error=0.03) > 0
    assert 0.19 < _fossilized(contribution=1e6, all_off=-1e6, metric_at_birth=-1e6) <= 0.2


def test_a_fossil_is_paid_once_and_only_if_it_became_one() -> None:
    for op in set(Op) - {Op.FOSSILIZE}:
        assert _fossilized(op) == 0.0
    assert _fossilized(becomes=Stage.HOLDING) == 0.0  # a fault rewound the run


def test_a_seed_that_hurts_the_whole_is_charged_however_much_the_host_leans_on_it() -> None:
    assert _fossilized(contribution=0.3, all_off=0.75) < -0.1  # ransomware: all seeds off is better
    assert _fossilized(contribution=0.3, metric=0.2, all_off=-0.1) < -0.1  # the run is worse off than at its birth
    assert _fossilized(contribution=-0.1) < -0.1
    assert _fossilized(contribution=0.3, all_off=0.69) == pytest.approx(0.2 * math.tanh(0.2))  # at most what all give


def test_what_is_not_known_is_not_credited() -> None:
    assert _fossilized(contribution=np.nan) == 0.0
    assert _fossilized(contribution_error=np.inf) == 0.0 == _fossilized(contribution_error=np.nan)
    assert _fossilized(contribution_error=np.nan, contribution=-0.1) < 0.0
    assert _fossilized(metric_at_birth=np.nan) == _fossilized()


def test_the_credit_since_birth_does_not_live_off_one_lucky_measurement() -> None:
    record = _record(Op.FOSSILIZE, before={**_SEED, "contribution": 0.5}, after={"stage": Stage.FOSSILIZED})
    record.before.run("all_off_metric")[0] = 0.0
    for name, value in {"metric": 0.7, "metric_1": 0.32, "metric_2": 0.6}.items():
        record.before.run(name)[0] = value
    assert terms.attribution(record, _CONFIG)[0] == pytest.approx(0.2 * math.tanh(0.02 / 0.05))


def test_a_rush_to_fossilise_is_paid_in_part_but_harm_in_full() -> None:
    assert _fossilized(ticks_in_stage=1.0) == pytest.approx(_fossilized() / 3)
    assert _fossilized(ticks_in_stage=1.0, contribution=-0.1) == _fossilized(contribution=-0.1)


def test_actions_cost_what_their_config_says() -> None:
    paid = {op: float(terms.churn(_record(op), _CONFIG)[0]) for op in Op}
    assert paid == {
        Op.GERMINATE: -0.03,
        Op.PRUNE: -0.03,
        Op.SET_ALPHA_TARGET: -0.02,
        Op.WAIT: 0,
        Op.ADVANCE: 0,
        Op.FOSSILIZE: 0,
    }
    assert [float(terms.activity(_record(op), _CONFIG)[0]) for op in Op] == [0.0] + [-0.01] * 5


def test_pruning_the_young_costs() -> None:
    def paid(op: Op, age: float) -> float:
        return float(terms.hasty_prune(_record(op, before={"age_ticks": age}), _CONFIG)[0])

    assert paid(Op.PRUNE, 4.0) == -0.1
    assert paid(Op.PRUNE, 5.0) == paid(Op.ADVANCE, 4.0) == paid(Op.WAIT, 4.0) == 0.0


def _shock(before: float, after: float, **run: float) -> float:
    record = _record(Op.WAIT, before={"alpha": before, "parameters": 2400.0}, after={"alpha": after}, **run)
    return float(terms.alpha_shock(record, _CONFIG)[0])


def test_slow_ramps_disturb_less_than_fast_ones_up_or_down() -> None:
    assert _shock(0.5, 0.5) == 0.0
    assert _shock(0.0, 1.0) == _shock(1.0, 0.0) == pytest.approx(-0.05 * math.log(1 + 2400 / 562))
    assert _shock(0.0, 1.0) < 2 * _shock(0.0, 0.5) < 0.0
    assert _shock(1.0, 0.0, faulty=True, ended=True) == 0.0  # nobody chose that


def test_fossils_that_deserve_credit_count_at_the_end_and_saturate() -> None:
    def paid(count: int, contribution: float = 0.06) -> float:
        frames = Frames.empty(1, 9)
        for name, value in {"tick": 39, "total_ticks": 40, "metric": 0.7, "all_off_metric": 0.2}.items():
            frames.run(name)[0] = value
        frames.slot("stage")[0, :count] = Stage.FOSSILIZED
        frames.slot("contribution")[0] = contribution
        frames.slot("contribution_error")[0] = 0.01
        record = StepRecord(frames, frames, np.array([[0, 0]]), np.array([True]), np.array([False]), 0.995)
        return float(terms.fossils(record, _CONFIG)[0])

    assert paid(0) == 0.0 == paid(3, contribution=-0.01)
    assert 0 < paid(1) < paid(2) < paid(9) <= 0.2


def test_loss_terminal_is_a_clamped_fraction_and_survives_a_loss_that_is_none() -> None:
    def paid(loss: float, earlier: float = np.nan) -> float:
        record = _record(Op.WAIT, ended=True, loss=loss)
        record.before.run("tick")[0], record.before.run("loss")[0] = 39, earlier
        return float(terms.loss_terminal(record, _CONFIG)[0])

    assert paid(0.0) == 10.0 and paid(math.log(10)) == pytest.approx(0.0) and paid(1e6) == -10.0
    assert paid(0.5) > paid(0.6)
    assert paid(np.inf) == paid(np.nan) == 0.0 and paid(np.nan, earlier=0.5) == paid(0.5)


def test_final_rent_is_for_what_is_left() -> None:
    left = _record(Op.WAIT, after={"stage": Stage.TRAINING, "alpha": 0.0, "parameters": 2400.0}, ended=True)
    left.before.run("tick")[0] = 39
    assert terms.final_rent(left, _CONFIG)[0] == pytest.approx(-0.2 * math.log(1 + 2400 / 562))
    assert terms.final_rent(dataclasses.replace(left, ended_N=np.array([False])), _CONFIG)[0] == 0.0


def test_no_standard_error_no_doubt() -> None:
    config = RewardConfig(credit=CreditConfig(error_z=0.0))
    record = _record(Op.FOSSILIZE, before={**_SEED, "contribution_error": np.nan}, after={"stage": Stage.FOSSILIZED})
    record.before.run("metric")[0], record.before.run("all_off_metric")[0] = 0.7, 0.6
    assert terms.attribution(record, config)[0] == pytest.approx(0.2 * math.tanh(0.06 / 0.05))
