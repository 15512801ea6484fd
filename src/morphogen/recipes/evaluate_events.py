"""Events of the evaluate job."""

from __future__ import annotations

import dataclasses
from typing import Any

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationStarted(Event):
    """A job begins; ``command`` runs it again."""

    task: str
    policy: str
    trained_on: str
    trained_by: str
    players: tuple[str, ...]
    episodes: int
    metric_name: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodePlayed(Event):
    """One player played one episode; the test split was looked at once, at its end."""

    player: str
    seed: int
    test_metric: float
    metric: float
    total_return: float
    parameters: int
    host_parameters: int
    relative_flops: float
    ticks: int
    rolled_back: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationFinished(Event):
    """Every player has played every episode."""

    rows: tuple[Any, ...]
    differences: tuple[Any, ...]
    sentences: tuple[str, ...]
