"""Gates: each condition alone flips the result; what is not measured, or stale, is not healthy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from morphogen.growth.config import GateConfig
from morphogen.growth.gates import Check, GateResult, Reading, SlotSensors, gate_into
from morphogen.growth.lifecycle import SlotState, Stage
from morphogen.growth.ramps import Ramp

CLOCK = 100
CONFIG = GateConfig(
    min_training_ticks=4, min_blending_ticks=6, min_holding_ticks=2, min_contribution=0.01, max_reading_age_ticks=3
)
SENSORS = SlotSensors(
    gradient_norm=Reading(0.5, CLOCK),
    gradient_ratio=Reading(1.0, CLOCK),
    finite=Reading(1.0, CLOCK),
    contribution=Reading(0.02, CLOCK),
    contribution_error=Reading(0.001, CLOCK),
)
RAMP = Ramp(start=0.0, target=1.0, num_ticks=5)
READY = {
    Stage.BLENDING: SlotState(stage=Stage.TRAINING, ticks_in_stage=4, germination=1, blueprint="norm"),
    Stage.HOLDING: SlotState(
        stage=Stage.BLENDING, ticks_in_stage=6, germination=1, blueprint="norm", alpha=0.7, alpha_target=0.7
    ),
    Stage.FOSSILIZED: SlotState(
        stage=Stage.HOLDING, ticks_in_stage=2, germination=1, blueprint="norm", alpha=1.0, alpha_target=1.0
    ),
}
CHECKS = {
    Stage.BLENDING: {Check.DWELL, Check.FINITE, Check.GRADIENT},
    Stage.HOLDING: {Check.DWELL, Check.ALPHA_AT_TARGET, Check.AT_REST},
    Stage.FOSSILIZED: {Check.DWELL, Check.AT_REST, Check.FINITE, Check.CONTRIBUTION_MEASURED, Check.CONTRIBUTION},
}


def judge(into: Stage, state: dict[str, Any] | None = None, **sensors: Reading | None) -> GateResult:
    """The gate on a seed that is ready, but for what is given."""
    changed = dataclasses.replace(READY[into], **(state or {}))
    return gate_into(into, changed, dataclasses.replace(SENSORS, **sensors), CLOCK, CONFIG)


@pytest.mark.parametrize("into", READY, ids=lambda stage: stage.name)
def test_a_ready_seed_passes_and_every_check_is_listed(into: Stage) -> None:
    gate = judge(into)
    assert gate.passed and bool(gate) and gate.refusals == () and gate.into is into
    assert {check.check for check in gate.checks} == CHECKS[into]


def test_training_asks_nothing() -> None:
    germinated = SlotState(stage=Stage.GERMINATED, germination=1, blueprint="norm")
    assert gate_into(Stage.TRAINING, germinated, SlotSensors(), 0, CONFIG) == GateResult(Stage.TRAINING, ())


CONTRIBUTION = (Check.CONTRIBUTION_MEASURED, Check.CONTRIBUTION)
STALE = Reading(1.0, CLOCK - 4)
FLIPS: list[tuple[Stage, dict[str, Any], dict[str, Reading | None], tuple[Check, ...]]] = [
    (Stage.BLENDING, {"ticks_in_stage": 3}, {}, (Check.DWELL,)),
    (Stage.BLENDING, {}, {"gradient_norm": None}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": Reading(0.0, CLOCK)}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": Reading(float("nan"), CLOCK)}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": STALE}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"finite": None}, (Check.FINITE,)),
    (Stage.BLENDING, {}, {"finite": Reading(0.0, CLOCK)}, (Check.FINITE,)),
    (Stage.BLENDING, {}, {"finite": STALE}, (Check.FINITE,)),
    (Stage.HOLDING, {"ticks_in_stage": 5}, {}, (Check.DWELL,)),
    (Stage.HOLDING, {"alpha": 0.6999}, {}, (Check.ALPHA_AT_TARGET,)),
    (Stage.HOLDING, {"ramp": RAMP}, {}, (Check.AT_REST,)),
    (Stage.FOSSILIZED, {"ticks_in_stage": 1}, {}, (Check.DWELL,)),
    (Stage.FOSSILIZED, {"ramp": RAMP}, {}, (Check.AT_REST,)),
    (Stage.FOSSILIZED, {}, {"finite": None}, (Check.FINITE,)),
    (Stage.FOSSILIZED, {}, {"finite": Reading(0.0, CLOCK)}, (Check.FINITE,)),
    (Stage.FOSSILIZED, {}, {"contribution": None}, CONTRIBUTION),
    (Stage.FOSSILIZED, {}, {"contribution": STALE}, CONTRIBUTION),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(0.0099, CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(-0.5, CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(float("nan"), CLOCK)}, (Check.CONTRIBUTION,)),
]


@pytest.mark.parametrize(("into", "state", "sensors", "refusals"), FLIPS)
def test_each_condition_alone_flips_the_result(
    into: Stage, state: dict[str, Any], sensors: dict[str, Reading | None], refusals: tuple[Check, ...]
) -> None:
    gate = judge(into, state, **sensors)
    assert not gate.passed and not gate
    assert gate.refusals == refusals


def test_flips_cover_every_check() -> None:
    assert {(into, check) for into, _, _, refusals in FLIPS for check in refusals} == {
        (into, check) for into, checks in CHECKS.items() for check in checks
    }


@pytest.mark.parametrize("name", ["finite", "gradient_norm", "contribution"])
def test_a_reading_of_the_greatest_age_is_still_fresh(name: str) -> None:
    into = Stage.BLENDING if name == "gradient_norm" else Stage.FOSSILIZED
    reading = dataclasses.replace(getattr(SENSORS, name), tick=CLOCK - 3)
    assert judge(into, **{name: reading}).passed


def test_a_negative_contribution_passes_only_where_configured() -> None:
    sensors = dataclasses.replace(SENSORS, contribution=Reading(-0.5, CLOCK))
    lenient = CONFIG.replace(min_contribution=-1.0)
    assert gate_into(Stage.FOSSILIZED, READY[Stage.FOSSILIZED], sensors, CLOCK, lenient).passed
    assert not gate_into(Stage.FOSSILIZED, READY[Stage.FOSSILIZED], sensors, CLOCK, GateConfig()).passed


@pytest.mark.parametrize("field", [name for name in GateConfig.model_fields if name != "min_contribution"])
def test_a_negative_time_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        GateConfig(**{field: -1})
