"""Events of growth; ``tick`` is the clock of the model."""

from __future__ import annotations

import dataclasses

from morphogen.growth.lifecycle import Stage
from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageChanged(Event):
    """A slot moved from ``previous`` to ``stage``."""

    tick: int
    slot: str
    previous: Stage
    stage: Stage
    ticks_in_previous: int
    reason: str
    blueprint: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateRefused(Event):
    """A gate did not let a seed pass; ``reasons`` says what was missing."""

    tick: int
    slot: str
    gate: Stage
    reasons: tuple[str, ...]
