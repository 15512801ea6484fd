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
