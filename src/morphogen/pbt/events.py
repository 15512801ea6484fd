"""What a population says while it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from morphogen.telemetry.events import Event, Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberReported(Event):
    """A member came to the end of an interval.

    Attributes:
        member: Its place.
        interval: Number of the interval.
        score: What it came to.
        hyperparameters: In use during it.
        metrics: Whatever else it said.
        cpu_seconds: Of training.
    """

    member: int
    interval: int
    score: float
    hyperparameters: Mapping[str, bool | int | float | str]
    metrics: Mapping[str, float]
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberLost(Event):
    """A member raised, hung, died, or was not finite.

    Attributes:
        member: Its place.
        interval: Number of the interval.
        problem: What happened.
    """

    member: int
    interval: int
    problem: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberExploited(Event):
    """A member took over another one, or only explored.

    Attributes:
        event_number: Of the decision.
        member: Who changed.
        interval: After which of its intervals.
        reason: "worse", "not finite", "lost" or "explore".
        source: Whom it took over; itself where it only explored.
        source_interval: After which of the source's intervals.
        score_before: Of the member.
        source_score: Of the source.
        strategy: What became of moments.
        hyperparameters_before: Of the member.
        hyperparameters: Of the member afterwards.
    """

    event_number: int
    member: int
    interval: int
    reason: str
    source: int
    source_interval: int
    score_before: float
    source_score: float
    strategy: str
    hyperparameters_before: Mapping[str, bool | int | float | str]
    hyperparameters: Mapping[str, bool | int | float | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRefused(Event):
    """A source was of no use: its snapshot was lost or damaged, or did not fit; the next best one is tried.

    Attributes:
        member: Who wanted it.
        source: Which.
        reason: Why not.
    """

    member: int
    source: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationReconfigured(Event):
    """A run went on with settings other than those before, as it was asked to.

    Attributes:
        changes: Setting by setting, in words.
        total_steps: Steps of each member, now.
        config: All settings of the population, now.
    """

    changes: tuple[str, ...]
    total_steps: int
    config: Mapping[str, Json]
