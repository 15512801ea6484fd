"""Events of the state floor."""

from __future__ import annotations

import dataclasses

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerReset(Event):
    """The optimizer starts anew because what was loaded holds no moments."""

    path: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentsDropped(Event):
    """A parameter changed its shape and its moments could not follow: they start anew, with the step count."""

    parameter: str
    reason: str
