"""Events of the governor."""

from __future__ import annotations

import dataclasses

from morphogen.governor.findings import Finding
from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSkipped(Event):
    """An optimizer step was not taken; parameters and optimizer are as before the batch."""

    reason: str
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback(Event):
    """The run was put back to an earlier snapshot.

    Attributes:
        reason: The first finding's message.
        findings: The evidence.
        from_step: Step at which the fault was seen.
        to_step: Step at which the snapshot was taken.
        parts: Parts of the run that were put back.
        optimizer_strategy: "restore", "reset" or "zero_momentum".
        learning_rate_factor: Factor applied to every learning rate after the rewind.
        penalty: As configured, for whoever trains a policy.
        count: Rewinds since the run last got past a fault, this one included.
    """

    reason: str
    findings: tuple[Finding, ...]
    from_step: int
    to_step: int
    parts: tuple[str, ...]
    optimizer_strategy: str
    learning_rate_factor: float
    penalty: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelShiftAccepted(Event):
    """The data changed, not the run: a known-good state shows the same level, or alarms came and went for a whole probation.

    Statistics start anew.
    """

    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartQuarantined(Event):
    """A part of the model that did not act yet was at fault and was taken out; the rest of the run was not touched.

    Attributes:
        owner: The part, such as a slot.
        findings: The evidence.
        penalty: As configured, for whoever trains a policy.
    """

    owner: str
    findings: tuple[Finding, ...]
    penalty: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collapsed(Event):
    """The last rewind did not help. The run was put back to the oldest good snapshot, and ``TrainingCollapsed`` is raised.

    Attributes:
        reason: The first finding's message.
        findings: The evidence.
        to_step: Step at which the snapshot was taken that the run is left at.
        rewinds: Rewinds that were made for this fault.
    """

    reason: str
    findings: tuple[Finding, ...]
    to_step: int
    rewinds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something unusual that is no fault yet: the step was taken, and no snapshot is for a while."""

    findings: tuple[Finding, ...]
