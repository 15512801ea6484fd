"""What the governor sees and what it finds. Frozen records, free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """One training step as seen before the optimizer's step.

    Attributes:
        step: The caller's step number; by default the governor's count of observations, from 0.
        loss: The training loss.
        grad_norm: Global 2-norm of the gradients; None when there are none.
        signals: What else was measured at this step, by name; see :class:`morphogen.governor.sensors.Sensors`.
        metrics: Further numbers given to ``observe``, for user-written detectors.
    """

    step: int
    loss: float
    grad_norm: float | None = None
    signals: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Evidence of a fault.

    Attributes:
        detector: Name of the detector.
        message: One line for a person.
        value: What was seen.
        threshold: What it crossed; None where there is no number to cross.
        window_steps: Steps of history the threshold came from; 0 for none.
        lasted_steps: Steps since the fault first showed, this one included and alarms in between not, as far as the detector
            remembers.
        non_finite: Whether the fault is NaN or Inf, so that the step must not be taken whatever happens.
        in_state: Whether the run itself is damaged already, so that skipping the step cannot help.
        warning: Whether it is no fault yet: the step is taken, but the state is not trusted for a while.
    """

    detector: str
    message: str
    value: float
    threshold: float | None = None
    window_steps: int = 0
    lasted_steps: int = 1
    non_finite: bool = False
    in_state: bool = False
    warning: bool = False
