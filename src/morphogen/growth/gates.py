"""Gates: pure checks before a seed moves on. A refused gate is a value with one typed reason for each check."""

from __future__ import annotations

import dataclasses
import enum

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
    FINITE = "finite parameters and gradients"
    ALPHA_AT_TARGET = "alpha at its target"
    AT_REST = "no ramp under way"
    CONTRIBUTION_MEASURED = "a fresh contribution"
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

    TRAINING asks nothing. BLENDING: dwell, a gradient, finite. HOLDING: dwell, alpha at its target, at rest. FOSSILIZED:
    dwell, at rest, finite, a fresh contribution of at least ``min_contribution``.
    """
    dwell = {
        Stage.BLENDING: config.min_training_ticks,
        Stage.HOLDING: config.min_blending_ticks,
        Stage.FOSSILIZED: config.min_holding_ticks,
    }.get(stage)
    if dwell is None:
        return GateResult(stage, ())
    checks = [CheckResult(Check.DWELL, state.ticks_in_stage >= dwell, state.ticks_in_stage, dwell)]
    if stage in (Stage.BLENDING, Stage.FOSSILIZED):
        finite = _fresh(sensors.finite, clock, config)
        checks.append(CheckResult(Check.FINITE, finite == 1.0, finite, 1.0))
    if stage is Stage.BLENDING:
        gradient = _fresh(sensors.gradient_norm, clock, config)
        checks.append(CheckResult(Check.GRADIENT, gradient is not None and gradient > 0.0, gradient, 0.0))
    if stage is Stage.HOLDING:
        checks.append(CheckResult(Check.ALPHA_AT_TARGET, state.alpha == state.alpha_target, state.alpha, state.alpha_target))
    if stage in (Stage.HOLDING, Stage.FOSSILIZED):
        checks.append(CheckResult(Check.AT_REST, state.ramp is None, None, None))
    if stage is Stage.FOSSILIZED:
        value = _fresh(sensors.contribution, clock, config)
        least = config.min_contribution
        checks.append(CheckResult(Check.CONTRIBUTION_MEASURED, value is not None, value, None))
        checks.append(CheckResult(Check.CONTRIBUTION, value is not None and value >= least, value, least))
    return GateResult(stage, tuple(checks))


def _fresh(reading: Reading | None, clock: int, config: GateConfig) -> float | None:
    if reading is None or clock - reading.tick > config.max_reading_age_ticks:
        return None
    return reading.value
