"""Gates: each condition alone flips the result; what is not measured, or stale, is not healthy."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from morphogen.growth import GrowableModel, GrowthConfig
from morphogen.growth.config import GateConfig
from morphogen.growth.gates import Check, GateResult, Reading, SlotSensors, gate_into
from morphogen.growth.lifecycle import SlotState, Stage
from morphogen.growth.ramps import Ramp
from morphogen.state import TrainingState
from morphogen.testing import HostCase

CLOCK = 100
CONFIG = GateConfig(
    min_training_ticks=4, min_blending_ticks=6, min_holding_ticks=2, min_contribution=0.01, max_reading_age_ticks=3
)
STRICT = CONFIG.replace(min_gradient_ratio=0.5, contribution_z=2.0)
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
ONLY_STRICT = {
    Stage.BLENDING: {Check.GRADIENT_RATIO},
    Stage.HOLDING: set[Check](),
    Stage.FOSSILIZED: {Check.CONTRIBUTION_ERROR},
}


def judge(
    into: Stage, state: dict[str, Any] | None = None, config: GateConfig = CONFIG, **sensors: Reading | None
) -> GateResult:
    """The gate on a seed that is ready, but for what is given."""
    changed = dataclasses.replace(READY[into], **(state or {}))
    return gate_into(into, changed, dataclasses.replace(SENSORS, **sensors), CLOCK, config)


@pytest.mark.parametrize("into", READY, ids=lambda stage: stage.name)
def test_a_ready_seed_passes_and_every_check_is_listed(into: Stage) -> None:
    for config, expected in ((CONFIG, CHECKS[into]), (STRICT, CHECKS[into] | ONLY_STRICT[into])):
        gate = judge(into, config=config)
        assert gate.passed and bool(gate) and gate.refusals == () and gate.into is into
        assert {check.check for check in gate.checks} == expected
        assert len(gate.checks) == len(expected)


def test_training_asks_nothing() -> None:
    germinated = SlotState(stage=Stage.GERMINATED, germination=1, blueprint="norm")
    assert gate_into(Stage.TRAINING, germinated, SlotSensors(), 0, CONFIG) == GateResult(Stage.TRAINING, ())


CONTRIBUTION = (Check.CONTRIBUTION_MEASURED, Check.CONTRIBUTION)
STALE = Reading(1.0, CLOCK - 4)
AHEAD = Reading(1.0, CLOCK + 1)
FLIPS: list[tuple[Stage, dict[str, Any], dict[str, Reading | None], tuple[Check, ...]]] = [
    (Stage.BLENDING, {"ticks_in_stage": 3}, {}, (Check.DWELL,)),
    (Stage.BLENDING, {}, {"gradient_norm": None}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": Reading(0.0, CLOCK)}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": Reading(float("nan"), CLOCK)}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"gradient_norm": STALE}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"finite": None}, (Check.FINITE,)),
    (Stage.BLENDING, {}, {"finite": Reading(0.0, CLOCK)}, (Check.FINITE,)),
    (Stage.BLENDING, {}, {"finite": STALE}, (Check.FINITE,)),
    (Stage.BLENDING, {}, {"gradient_norm": AHEAD}, (Check.GRADIENT,)),
    (Stage.BLENDING, {}, {"finite": AHEAD}, (Check.FINITE,)),
    (Stage.HOLDING, {"ticks_in_stage": 5}, {}, (Check.DWELL,)),
    (Stage.HOLDING, {"alpha": 0.6999}, {}, (Check.ALPHA_AT_TARGET,)),
    (Stage.HOLDING, {"ramp": RAMP}, {}, (Check.AT_REST,)),
    (Stage.FOSSILIZED, {"ticks_in_stage": 1}, {}, (Check.DWELL,)),
    (Stage.FOSSILIZED, {"ramp": RAMP}, {}, (Check.AT_REST,)),
    (Stage.FOSSILIZED, {}, {"finite": None}, (Check.FINITE,)),
    (Stage.FOSSILIZED, {}, {"finite": Reading(0.0, CLOCK)}, (Check.FINITE,)),
    (Stage.FOSSILIZED, {}, {"contribution": None}, CONTRIBUTION),
    (Stage.FOSSILIZED, {}, {"contribution": STALE}, CONTRIBUTION),
    (Stage.FOSSILIZED, {}, {"contribution": AHEAD}, CONTRIBUTION),
    (Stage.FOSSILIZED, {}, {"finite": STALE}, (Check.FINITE,)),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(0.0099, CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(-0.5, CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {}, {"contribution": Reading(float("nan"), CLOCK)}, (Check.CONTRIBUTION,)),
]


@pytest.mark.parametrize(("into", "state", "sensors", "refusals"), FLIPS)
def test_each_condition_alone_flips_the_result(
    into: Stage, state: dict[str, Any], sensors: dict[str, Reading | None], refusals: tuple[Check, ...]
) -> None:
    for config in (CONFIG, STRICT):
        gate = judge(into, state, config, **sensors)
        assert not gate.passed and not gate
        assert gate.refusals == refusals


ERROR = (Check.CONTRIBUTION_ERROR, Check.CONTRIBUTION)
STRICT_FLIPS: list[tuple[Stage, dict[str, Reading | None], tuple[Check, ...]]] = [
    (Stage.BLENDING, {"gradient_ratio": None}, (Check.GRADIENT_RATIO,)),
    (Stage.BLENDING, {"gradient_ratio": Reading(0.499, CLOCK)}, (Check.GRADIENT_RATIO,)),
    (Stage.BLENDING, {"gradient_ratio": Reading(float("nan"), CLOCK)}, (Check.GRADIENT_RATIO,)),
    (Stage.BLENDING, {"gradient_ratio": STALE}, (Check.GRADIENT_RATIO,)),
    (Stage.BLENDING, {"gradient_ratio": AHEAD}, (Check.GRADIENT_RATIO,)),
    (Stage.FOSSILIZED, {"contribution_error": None}, ERROR),
    (Stage.FOSSILIZED, {"contribution_error": Reading(0.001, CLOCK - 4)}, ERROR),
    (Stage.FOSSILIZED, {"contribution_error": Reading(0.001, CLOCK + 1)}, ERROR),
    (Stage.FOSSILIZED, {"contribution_error": Reading(0.0051, CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {"contribution_error": Reading(float("inf"), CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {"contribution_error": Reading(float("nan"), CLOCK)}, (Check.CONTRIBUTION,)),
    (Stage.FOSSILIZED, {"contribution": Reading(0.0119, CLOCK)}, (Check.CONTRIBUTION,)),
]


@pytest.mark.parametrize(("into", "sensors", "refusals"), STRICT_FLIPS)
def test_what_a_strict_config_asks_for_flips_the_result_there_alone(
    into: Stage, sensors: dict[str, Reading | None], refusals: tuple[Check, ...]
) -> None:
    assert judge(into, **sensors).passed
    gate = judge(into, config=STRICT, **sensors)
    assert not gate.passed and gate.refusals == refusals


@pytest.mark.parametrize(
    ("into", "sensors"),
    [
        (Stage.BLENDING, {"gradient_ratio": Reading(0.5, CLOCK)}),
        (Stage.FOSSILIZED, {"contribution_error": Reading(0.0049, CLOCK)}),
        (Stage.FOSSILIZED, {"contribution": Reading(0.0121, CLOCK)}),
    ],
)
def test_just_enough_is_enough(into: Stage, sensors: dict[str, Reading]) -> None:
    assert judge(into, config=STRICT, **sensors).passed


def test_the_bound_on_a_contribution_is_told() -> None:
    checks = {check.check: check for check in judge(Stage.FOSSILIZED, config=STRICT).checks}
    assert checks[Check.CONTRIBUTION].value == pytest.approx(0.02 - 2 * 0.001)
    assert (checks[Check.CONTRIBUTION_MEASURED].value, checks[Check.CONTRIBUTION_ERROR].value) == (0.02, 0.001)


def test_flips_cover_every_check() -> None:
    met = {(into, check) for into, _, _, refusals in FLIPS for check in refusals}
    met |= {(into, check) for into, _, refusals in STRICT_FLIPS for check in refusals}
    assert met == {(into, check) for into in CHECKS for check in CHECKS[into] | ONLY_STRICT[into]}
    assert {check for _, check in met} == set(Check)


@pytest.mark.parametrize("into", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_there_is_no_gate_but_between_neighbours(stage: Stage, into: Stage) -> None:
    state = SlotState(stage=stage, germination=1, blueprint="norm")
    if (stage, into) == (Stage.GERMINATED, Stage.TRAINING) or (into in READY and READY[into].stage is stage):
        assert gate_into(into, state, SENSORS, CLOCK, CONFIG).into is into
        return
    with pytest.raises(ValueError, match=f"a gate must be one of GERMINATED to TRAINING, .*, got {stage.name} to {into.name}"):
        gate_into(into, state, SENSORS, CLOCK, CONFIG)


def test_sensors_need_no_telemetry() -> None:
    """Nobody listens to the model's events, and a seed goes through every gate by what `sense` and the clock say."""
    case = HostCase("NC")
    config = GrowthConfig(gates=GateConfig(min_gradient_ratio=1e-6, contribution_z=1.64))
    model = GrowableModel(case.build(), case.points, case.example(), config=config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    state = TrainingState(model, optimizer)
    model.germinate("late", "mlp")
    assert model.advance("late")
    assert model.advance("late").refusals == (Check.DWELL, Check.FINITE, Check.GRADIENT, Check.GRADIENT_RATIO)
    seen: list[Stage] = []
    for _ in range(20):
        optimizer.zero_grad()
        model(case.example()).square().mean().backward()
        model.sense()
        optimizer.step()
        model.tick()
        stage = model.stages()["late"]
        if stage is Stage.HOLDING:
            assert not model.fossilize("late")
            model.record_contribution("late", 0.1, 0.01)
            model.fossilize("late")
        elif stage is not Stage.FOSSILIZED:
            model.advance("late")
        seen.append(model.stages()["late"])
    assert set(seen) == {Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED}
    state.verify()


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
def test_a_negative_knob_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        GateConfig(**{field: -1})
