"""How the coefficient follows the divergence, and what its state and config are to each other."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, strategies as st

from morphogen.errors import StateMismatch
from morphogen.rl.kl_penalty import KLPenalty, KLPenaltyConfig, KLPenaltyState, next_state

ADAPTIVE = KLPenaltyConfig(kind="adaptive", coefficient=1.0, target=0.01, min_coefficient=0.125, max_coefficient=8.0)
PID = KLPenaltyConfig(
    kind="pid",
    coefficient=1.0,
    target=0.01,
    proportional=20.0,
    integral=5.0,
    derivative=10.0,
    min_coefficient=0.0,
    max_coefficient=4.0,
)
KLS = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30)


def coefficients(config: KLPenaltyConfig, kls: list[float]) -> list[float]:
    penalty = KLPenalty(config)
    path = []
    for kl in kls:
        penalty.update(kl)
        path.append(penalty.coefficient)
    return path


@pytest.mark.parametrize(
    ("kl", "coefficient"), [(0.0151, 2.0), (0.0149, 1.0), (0.01, 1.0), (0.0067, 1.0), (0.0066, 0.5), (0.0, 0.5), (-1e-9, 0.5)]
)
def test_adaptive_doubles_above_and_halves_below_its_band(kl: float, coefficient: float) -> None:
    assert coefficients(ADAPTIVE, [kl]) == [coefficient]


def test_adaptive_stays_within_bounds_and_comes_back() -> None:
    assert coefficients(ADAPTIVE, [1.0] * 5) == [2.0, 4.0, 8.0, 8.0, 8.0]
    assert coefficients(ADAPTIVE, [1.0] * 5 + [0.0] * 2)[-1] == 2.0
    assert coefficients(ADAPTIVE, [0.0] * 5) == [0.5, 0.25, 0.125, 0.125, 0.125]
    wide = ADAPTIVE.replace(tolerance=3.0, factor=1.25)
    assert coefficients(wide, [0.029, 0.031, 0.0034, 0.0033]) == [1.0, 1.25, 1.25, 1.0]


def test_fixed_is_fixed() -> None:
    assert coefficients(KLPenaltyConfig(kind="fixed", coefficient=0.3), [0.0, 1.0, 5.0]) == [0.3] * 3


@given(kls=KLS)
def test_pid_is_the_positional_form(kls: list[float]) -> None:
    gentle = PID.replace(proportional=0.2, integral=0.01, derivative=0.1, max_coefficient=100.0)
    errors = [kl - 0.01 for kl in kls]
    change = errors[-1] - errors[-2] if len(errors) > 1 else 0.0
    expected = 1.0 + 0.2 * errors[-1] + 0.01 * math.fsum(errors) + 0.1 * change
    assert coefficients(gentle, kls)[-1] == pytest.approx(expected)


def test_pid_on_target_stands_still() -> None:
    """A proportional term that moved the previous coefficient would drift for ever at a constant error."""
    proportional = PID.replace(integral=0.0, derivative=0.0)
    assert coefficients(proportional, [0.02] * 10) == [pytest.approx(1.2)] * 10
    assert coefficients(PID, [0.01] * 10) == [1.0] * 10


@given(kls=KLS)
def test_every_kind_stays_within_bounds(kls: list[float]) -> None:
    assert all(0.125 <= value <= 8.0 for value in coefficients(ADAPTIVE, kls))
    assert all(0.0 <= value <= 4.0 for value in coefficients(PID, kls))


def test_the_integral_does_not_wind_up() -> None:
    integral = PID.replace(proportional=0.0, derivative=0.0)
    path = coefficients(integral, [1.0] * 1000 + [0.0] * 10)
    assert path[999] == 4.0
    assert path[1000:1002] == [pytest.approx(3.95), pytest.approx(3.9)]  # leaves the bound at once


def test_pid_holds_a_toy_process_at_its_target() -> None:
    """The divergence here falls with the coefficient, as it does in training."""
    penalty = KLPenalty(PID.replace(proportional=10.0, integral=10.0, derivative=0.0, coefficient=0.1, max_coefficient=50.0))
    for _ in range(200):
        kl = 0.03 / (0.5 + penalty.coefficient)
        penalty.update(kl)
    assert kl == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
@pytest.mark.parametrize("config", [ADAPTIVE, PID, KLPenaltyConfig(kind="fixed")])
def test_what_was_not_measured_moves_nothing(config: KLPenaltyConfig, kl: float) -> None:
    penalty = KLPenalty(config)
    before = penalty.state_dict()
    with pytest.raises(ValueError, match="`kl` must be finite"):
        penalty.update(kl)
    assert penalty.state_dict() == before


@pytest.mark.parametrize("config", [ADAPTIVE, PID, KLPenaltyConfig(kind="fixed", coefficient=0.3)])
def test_state_goes_through_json_and_goes_on_alike(config: KLPenaltyConfig) -> None:
    source, target = KLPenalty(config), KLPenalty(config)
    for kl in (0.03, 0.001, 0.02):
        source.update(kl)
    target.load_state_dict(json.loads(json.dumps(source.state_dict(), allow_nan=False)))
    assert target.state_dict() == source.state_dict()
    for kl in (0.02, 0.5):
        source.update(kl)
        target.update(kl)
    assert target.state_dict() == source.state_dict()
    target.reset()
    assert target.state_dict() == KLPenalty(config).state_dict()


def test_the_config_stays_the_targets() -> None:
    source, target = KLPenalty(ADAPTIVE), KLPenalty(ADAPTIVE.replace(target=0.5, max_coefficient=2.0))
    for _ in range(3):
        source.update(1.0)
    target.load_state_dict(source.state_dict())
    assert target.config.target == 0.5
    assert target.coefficient == 2.0  # 8 does not fit its bounds
    fixed = KLPenalty(KLPenaltyConfig(kind="fixed", coefficient=0.3))
    fixed.load_state_dict(KLPenalty(KLPenaltyConfig(kind="fixed", coefficient=0.9)).state_dict())
    assert fixed.coefficient == 0.3


def test_reconfiguring_acts_at_once_and_keeps_the_state() -> None:
    penalty = KLPenalty(ADAPTIVE)
    penalty.update(1.0)
    penalty.reconfigure(ADAPTIVE.replace(target=2.0))
    assert penalty.coefficient == 2.0
    penalty.update(1.0)
    assert penalty.coefficient == 1.0
    penalty.reconfigure(ADAPTIVE.replace(target=2.0, max_coefficient=8.0, coefficient=4.0))
    assert penalty.coefficient == 4.0
    penalty.reconfigure(KLPenaltyConfig(kind="fixed", coefficient=0.3))
    assert penalty.coefficient == 0.3


STATE: dict[str, Any] = {"kind": "adaptive", "coefficient": 2.0, "error_sum": 0.0, "previous_error": None}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "pid"}, "`kind` is 'pid', this penalty's is 'adaptive'"),
        ({"coefficient": -1.0}, "`coefficient` is -1.0, expected a number >= 0"),
        ({"coefficient": math.nan}, "`coefficient` is nan, expected a finite number"),
        ({"coefficient": "2"}, "`coefficient` is '2', expected a finite number"),
        ({"error_sum": None}, "`error_sum` is None"),
        ({"previous_error": math.inf}, "`previous_error` is inf"),
        ({"gain": 1.0}, "`gain` is unknown"),
        ({"kind": ...}, "`kind` is missing"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, Any], problem: str) -> None:
    penalty = KLPenalty(ADAPTIVE)
    penalty.update(1.0)
    before = penalty.state_dict()
    with pytest.raises(StateMismatch, match=problem):
        penalty.load_state_dict({name: value for name, value in (STATE | change).items() if value is not ...})
    assert penalty.state_dict() == before
    penalty.load_state_dict(STATE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fixed", "target": 0.01}, '`target` must be left out for kind="fixed", got 0.01: it would have no effect'),
        ({"kind": "fixed", "max_coefficient": 5.0}, "`max_coefficient` must be left out"),
        ({"kind": "adaptive", "target": 0.01, "integral": 1.0}, "`integral` must be left out"),
        ({"kind": "pid", "target": 0.01, "proportional": 1.0, "factor": 3.0}, "`factor` must be left out"),
        ({"kind": "adaptive"}, "`target` must be given"),
        ({"kind": "adaptive", "target": 0.01, "coefficient": 0.0}, "`coefficient` must lie within"),
        ({"kind": "adaptive", "target": 0.01, "min_coefficient": 0.0}, "`min_coefficient` must be > 0"),
        ({"kind": "adaptive", "target": 0.01, "tolerance": 1.0}, "`tolerance` must be greater than 1"),
        ({"kind": "pid", "target": 0.01}, "`proportional`, `integral` or `derivative` must be > 0"),
        ({"kind": "linear"}, "`kind` must be 'fixed', 'adaptive' or 'pid'"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLPenaltyConfig(**settings)


def test_a_config_can_be_replaced_again() -> None:
    assert ADAPTIVE.replace(target=0.02).replace(target=0.01) == ADAPTIVE
    assert next_state(KLPenaltyState(1.0), 1.0, ADAPTIVE) == KLPenaltyState(2.0)
