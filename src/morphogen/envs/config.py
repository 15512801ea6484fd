"""Knobs of growth as an environment."""

from __future__ import annotations

import difflib
from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from morphogen.config import Config
from morphogen.envs.choices import Layout
from morphogen.envs.rewards import RewardConfig
from morphogen.governor import GovernorConfig
from morphogen.governor.config import ExplosionConfig
from morphogen.growth.config import GrowthConfig
from morphogen.growth.newborn import NewbornConfig
from morphogen.tasks import Task
from morphogen.tasks.devices import resolve_device

Executors = Literal["inline", "processes"]
EXECUTORS: tuple[Executors, ...] = get_args(Executors)

GOVERNOR = GovernorConfig(
    snapshot_every=8,
    probation_steps=2,
    skip_window_steps=0,
    explosion=ExplosionConfig(window_steps=32, lag_steps=2, min_steps=8, lone_run_steps=2),
)
"""Times are ticks here. The rules whose limits need 64 observations do not come into play in short episodes."""


class GrowthEnvConfig(Config):
    """Growth as an environment: what one episode is, what it pays, and who runs it.

    Attributes:
        slots: Growth points to use, in this order; None for all of the task.
        num_slots: Places for slots in actions and observations; those beyond the task's stay empty.
        num_blueprints: Places for blueprints, likewise.
        total_steps: Training steps of an episode; None for the task's.
        tick_steps: Training steps between decisions; None for the task's.
        reward: What is paid.
        measure_test: Measure the test split where an episode ends. For evaluation alone.
        executor: "inline": one environment after the other in this process. "processes": shared out over workers.
        num_workers: Processes, for "processes" alone; None for one for each core, at most one for each environment.
        worker_deadline_seconds: For "processes" alone: how long a worker may take for a step, a reset, or to come back to where
            it was, before it is killed and replaced; None to wait for ever.
        device: Where to train.
        newborn: Optimisation of newborn seeds.
        growth: Slots and gates.
        governor: Detection and recovery. It observes the mean loss of a tick, so its times are ticks.
    """

    slots: tuple[str, ...] | None = Field(default=None, min_length=1)
    num_slots: int = Field(default=5, ge=1)
    num_blueprints: int = Field(default=5, ge=1)
    total_steps: int | None = Field(default=None, ge=1)
    tick_steps: int | None = Field(default=None, ge=1)
    reward: RewardConfig = RewardConfig()
    measure_test: bool = False
    executor: Executors = "inline"
    num_workers: int | None = Field(default=None, ge=1)
    worker_deadline_seconds: float | None = Field(default=None, gt=0.0)
    device: str = "cpu"
    newborn: NewbornConfig = NewbornConfig()
    growth: GrowthConfig = GrowthConfig()
    governor: GovernorConfig = GOVERNOR

    @property
    def layout(self) -> Layout:
        """The places of actions and observations."""
        return Layout(self.num_slots, self.num_blueprints)

    @field_validator("executor", mode="before")
    @classmethod
    def _known_executor(cls, name: object) -> object:
        if name in EXECUTORS:
            return name
        near = difflib.get_close_matches(str(name), EXECUTORS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`executor` must be one of {', '.join(EXECUTORS)}, got {name!r}.{hint}")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        for name in ("num_workers", "worker_deadline_seconds"):
            if getattr(self, name) is not None and self.executor == "inline":
                raise ValueError(f'`{name}` must be left out with the executor "inline": it would have no effect.')
        return self


def check_task(task: Task, config: GrowthEnvConfig) -> None:
    """Check that ``task`` can be trained as ``config`` says, before anything is built.

    Raises:
        ValueError: ``slots`` names something else than growth points of the task, each once, or the device is not here.
    """
    points, slots = list(task.points), config.slots or ()
    unknown = [name for name in slots if name not in points]
    if unknown:
        near = difflib.get_close_matches(unknown[0], points, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Leave it out to use all."
        raise ValueError(f"`slots` must be growth points of {task.name}, {', '.join(points)}, got {unknown[0]!r}. {hint}")
    if len(set(slots)) < len(slots):
        raise ValueError(f"`slots` must name each growth point once, got {list(slots)}. Take the second one out.")
    resolve_device(config.device)
