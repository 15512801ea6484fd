"""Events of the train job; each update is reported by the agent itself, as ``Updated``."""

from __future__ import annotations

import dataclasses
from typing import Any

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStarted(Event):
    """A job begins; ``command`` runs it again. ``parameters`` are the policy's."""

    task: str
    metric_name: str
    total_steps: int
    episode_steps: int
    parameters: int
    num_envs: int
    slots: tuple[str, ...]
    command: str
    config: dict[str, Any]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeFinished(Event):
    """A network was trained to its end, or to where the governor ended it; ``step`` is that of the update it went into.

    The fields are those of :class:`~morphogen.recipes.recorded_growth.FinishedEpisode`.
    """

    env: int
    ticks: int
    total_reward: float
    metric: float
    parameters: int
    relative_flops: float
    rolled_back: bool
    terms: dict[str, float]
    ops: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesAveraged(Event):
    """Means over the episodes that finished since the last update.

    Attributes:
        episodes: How many.
        mean_return: Undiscounted.
        metric: At their ends, on the decision split.
        parameters: Of the networks then.
        relative_flops: Of training, over those of the host alone.
        rollbacks: How many of the episodes the governor ended, over all updates.
        term: What each term of the reward gave.
        op: Share of each op among all decisions.
    """

    episodes: int
    mean_return: float
    metric: float
    parameters: float
    relative_flops: float
    rollbacks: int
    term: dict[str, float]
    op: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFaulted(Event):
    """The job had to stop; what was learned by then was saved, and it can be resumed."""

    kind: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFinished(Event):
    """The job is done, the policy saved. Means are over the last ``episodes`` episodes; ``wall_seconds`` is of all sittings."""

    updates: int
    episodes: int
    mean_return: float
    metric: float
    parameters: float
    rollbacks: int
    wall_seconds: float
