"""Events of the job that trains a population; what members do is reported by the population, see `morphogen.pbt.events`."""

from __future__ import annotations

import dataclasses
from typing import Any

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationStarted(Event):
    """A job begins; ``command`` runs it again.

    Attributes:
        member: Kind of the members.
        subject: The environment or task that they learn in.
        population_size: Members.
        total_steps: Steps of each.
        interval_steps: Steps between two decisions about a member.
        kinds: What is searched -> kind of the hyperparameter.
        choices: Names of those that take one of some values -> the values.
        mode: Whether "max" or "min" is better.
        engine: Who runs members.
        command: Runs it again.
        config: All settings.
        versions: What results depend on most.
    """

    member: str
    subject: str
    population_size: int
    total_steps: int
    interval_steps: int
    kinds: dict[str, str]
    choices: dict[str, tuple[Any, ...]]
    mode: str
    engine: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationFaulted(Event):
    """The job had to stop; what is in its directory is whole, and it can be resumed."""

    kind: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationFinished(Event):
    """The job is done, and its best member saved; ``wall_seconds`` and ``cpu_seconds``, of training, are over all sittings."""

    best: int
    score: float
    hyperparameters: dict[str, Any]
    wall_seconds: float
    cpu_seconds: float
