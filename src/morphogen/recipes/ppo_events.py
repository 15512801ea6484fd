"""Events of the PPO job; each update is reported by the agent itself, as ``Updated``."""

from __future__ import annotations

import dataclasses
from typing import Any

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOStarted(Event):
    """A job begins; ``command`` runs it again."""

    env: str
    total_steps: int
    parameters: int
    observation_space: str
    action_space: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Whole episodes were played with everything frozen; returns are undiscounted, in the environment's own unit."""

    episodes: int
    mean_return: float
    std_return: float
    mean_length: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOFaulted(Event):
    """The job had to stop; what was learned by then was saved, and it can be resumed."""

    kind: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOFinished(Event):
    """The job is done: trained, evaluated and saved. ``wall_seconds`` is training time, over all sittings."""

    updates: int
    wall_seconds: float
