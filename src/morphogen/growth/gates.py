"""Gates: pure checks before a seed moves on. A refused gate is a value with one typed reason for each check."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping

from morphogen.growth.config import GateConfig
from morphogen.growth.lifecycle import SlotState, Stage


@dataclasses.dataclass(frozen=True)
class Reading:
    """A measured value and the clock at which it was measured."""

    value: float
    tick: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotSensors:
    """What is known of a seed. None is "not measured", which is never healthy.

    Attributes:
        gradient_norm: Norm of the seed's gradient over the square root of its number of parameters.
        gradient_ratio: That, over the same of the host.
        finite: 1.0 if every parameter and gradient of the seed was finite, else 0.0.
        contribution: Metric with the slot minus metric with its alpha at 0, on the same data.
        contribution_error: Standard error of the contribution.
    """

    gradient_norm: Reading | None = None
    gradient_ratio: Reading | None = None
    finite: Reading | None = None
    contribution: Reading | None = None
    contribution_error: Reading | None = None


class Check(enum.Enum):
    """What a gate may ask for."""

    DWELL = "enough ticks in the stage"
    GRADIENT = "a measured, non-zero gradient"
    GRADIENT_RATIO = "a large enough gradient, relative to the host's"
    FINITE = "finite parameters and gradients"
    ALPHA_AT_TARGET = "alpha at its target"
    AT_REST = "no ramp under way"
    CONTRIBUTION_MEASURED = "a fresh contribution"
    CONTRIBUTION_ERROR = "a fresh standard error of the contribution"
    CONTRIBUTION = "a large enough contribution"


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """Outcome of one check; ``value`` is None where nothing (fresh) was measured."""

    check: Check
    passed: bool
    value: float | None
    threshold: float | None


@dataclasses.dataclass(frozen=True)
class GateResult:
    """Outcome of a gate: every check it made, so that a reader sees why."""

    into: Stage
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def refusals(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check.check for check in self.checks if not check.passed)

    def __bool__(self) -> bool:
        """A gate is true when it passed."""
        return self.passed


def gate_into(stage: Stage, state: SlotState, sensors: SlotSensors, clock: int, config: GateConfig) -> GateResult:
    """Return whether a seed may enter ``stage``, with every check made.

    TRAINING asks nothing. BLENDING: dwell, finite, a gradient, and with ``min_gradient_ratio`` one of that size relative to the
    host's. HOLDING: dwell, alpha at its target, at rest. FOSSILIZED: dwell, finite, at rest, a fresh contribution; with z =
    ``contribution_z``, contribution - z * contribution_error >= ``min_contribution``, and with z > 0 a fresh error.

    Args:
        stage: Where to.
        state: Of a slot whose seed is in the stage before.
        sensors: What is known of the seed; readings older than ``max_reading_age_ticks`` count as not measured.
        clock: The present clock.
        config: What is asked.

    Raises:
        ValueError: There is no gate from the state's stage into ``stage``.

    Example:
        >>> state = SlotState(stage=Stage.TRAINING, ticks_in_stage=9, germination=1, blueprint="norm")
        >>> sensors = SlotSensors(finite=Reading(1.0, 20), gradient_norm=Reading(0.0, 20))
        >>> gate_into(Stage.BLENDING, state, sensors, clock=20, config=GateConfig()).refusals
        (<Check.GRADIENT: 'a measured, non-zero gradient'>,)
    """
    if stage not in _GATES or state.stage is not _GATES[stage][0]:
        passages = ", ".join(f"{before.name} to {into.name}" for into, (before, _) in _GATES.items())
        raise ValueError(f"a gate must be one of {passages}, got {state.stage.name} to {stage.name}. Choose one of them.")
    return GateResult(stage, _GATES[stage][1](state, _Known(sensors, clock, config.max_reading_age_ticks), config))


@dataclasses.dataclass(frozen=True)
class _Known:
    """Sensors as they count now: a stale reading, or one from a later clock, is none."""

    sensors: SlotSensors
    clock: int
    max_age_ticks: int

    def __getitem__(self, name: str) -> float | None:
        reading: Reading | None = getattr(self.sensors, name)
        return reading.value if reading is not None and 0 <= self.clock - reading.tick <= self.max_age_ticks else None


def _into_training(state: SlotState, known: _Known, config: GateConfig) -> tuple[CheckResult, ...]:
    return ()


def _into_blending(state: SlotState, known: _Known, config: GateConfig) -> tuple[CheckResult, ...]:
    gradient, ratio, least = known["gradient_norm"], known["gradient_ratio"], config.min_gradient_ratio
    checks = (
        _dwell(state, config.min_training_ticks),
        _finite(known),
        CheckResult(Check.GRADIENT, gradient is not None and gradient > 0.0, gradient, 0.0),
    )
    if least == 0.0:
        return checks
    return (*checks, CheckResult(Check.GRADIENT_RATIO, ratio is not None and ratio >= least, ratio, least))


def _into_holding(state: SlotState, known: _Known, config: GateConfig) -> tuple[CheckResult, ...]:
    return (
        _dwell(state, config.min_blending_ticks),
        CheckResult(Check.ALPHA_AT_TARGET, state.alpha == state.alpha_target, state.alpha, state.alpha_target),
        _at_rest(state),
    )


def _into_fossilized(state: SlotState, known: _Known, config: GateConfig) -> tuple[CheckResult, ...]:
    value, error, least = known["contribution"], known["contribution_error"], config.min_contribution
    checks = (
        _dwell(state, config.min_holding_ticks),
        _finite(known),
        _at_rest(state),
        CheckResult(Check.CONTRIBUTION_MEASURED, value is not None, value, None),
    )
    if config.contribution_z > 0.0:
        checks = (*checks, CheckResult(Check.CONTRIBUTION_ERROR, error is not None, error, None))
        value = None if value is None or error is None else value - config.contribution_z * error
    return (*checks, CheckResult(Check.CONTRIBUTION, value is not None and value >= least, value, least))


def _dwell(state: SlotState, least: int) -> CheckResult:
    return CheckResult(Check.DWELL, state.ticks_in_stage >= least, state.ticks_in_stage, least)


def _finite(known: _Known) -> CheckResult:
    return CheckResult(Check.FINITE, known["finite"] == 1.0, known["finite"], 1.0)


def _at_rest(state: SlotState) -> CheckResult:
    return CheckResult(Check.AT_REST, state.ramp is None, None, None)


_GATES: Mapping[Stage, tuple[Stage, Callable[[SlotState, _Known, GateConfig], tuple[CheckResult, ...]]]] = {
    Stage.TRAINING: (Stage.GERMINATED, _into_training),
    Stage.BLENDING: (Stage.TRAINING, _into_blending),
    Stage.HOLDING: (Stage.BLENDING, _into_holding),
    Stage.FOSSILIZED: (Stage.HOLDING, _into_fossilized),
}
"""Stage -> the one before, and what the gate between them asks."""
