"""Events of the grow job."""

from __future__ import annotations

import dataclasses
from typing import Any

from morphogen.growth import Stage
from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A job begins; ``command`` runs it again."""

    task: str
    policy: str
    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    repeats: int
    metric_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmStarted(Event):
    """One arm of one repeat begins."""

    parameters: int
    slots: tuple[str, ...]
    total_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TickMeasured(Event):
    """What was measured at the end of a tick, on the decision split; the training loss is the last step's."""

    tick: int
    train_loss: float
    metric: float
    parameters: int
    stages: dict[str, Stage]
    alphas: dict[str, float]
    learning_rate: float
    governor: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided(Event):
    """What the policy did, other than wait."""

    tick: int
    op: str
    slot: str | None
    blueprint: str | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultInjected(Event):
    """A fault asked for with ``inject`` was put into the run."""

    fault: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmFinished(Event):
    """One arm of one repeat is trained; the test split was looked at once, now."""

    test_metric: float
    decision_metric: float
    parameters: int
    train_flops: int
    wall_seconds: float
    rollbacks: int
    skipped_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The job is done."""

    rows: tuple[Any, ...]
    paired_difference: Any
