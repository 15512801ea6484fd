"""Knobs of the grow job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from morphogen.governor.config import GovernorConfig
from morphogen.growth.config import GrowthConfig
from morphogen.growth.newborn import NewbornConfig
from morphogen.recipes.job_config import JobConfig

Arm = Literal["static", "reference", "grown"]
_UNSAFE = re.compile(r"[^\w.-]+")
ARMS: tuple[Arm, ...] = ("static", "reference", "grown")


class GrowConfig(JobConfig):
    """One grow job: the same task trained three ways, several times, and compared.

    Attributes:
        job: Always "grow"; a config without it is one of a grow job too.
        task: Name of a task.
        policy: Who decides in the grown arm: the name of a built-in policy or of a trained one that comes with morphogen, a
            run directory of `morphogen train`, or a policy file.
        seed: Root seed of the first repeat; repeat i uses ``seed + i``.
        repeats: Runs of each arm. All arms of a repeat share data order and host initialisation.
        arms: What to train.
        device: Where to train.
        total_steps: Training steps of a run; None for the task's.
        inject: Faults to inject into the grown arm, written ``kind@step``.
        checkpoint_every_ticks: Decisions between checkpoints.
        newborn: Optimisation of newborn seeds.
        growth: Slots and gates.
        governor: Detection and recovery. No batches are passed over: after a rewind they come in another order.
    """

    job: Literal["grow"] = "grow"
    task: str = "mnist1d"
    policy: str = "heuristic"
    seed: int = Field(default=0, ge=0)
    repeats: int = Field(default=5, ge=1)
    arms: tuple[Arm, ...] = Field(default=ARMS, min_length=1)
    device: str = "cpu"
    total_steps: int | None = Field(default=None, ge=1)
    inject: tuple[str, ...] = ()
    checkpoint_every_ticks: int = Field(default=10, ge=1)
    newborn: NewbornConfig = NewbornConfig()
    growth: GrowthConfig = GrowthConfig()
    governor: GovernorConfig = GovernorConfig(skip_window_steps=0)

    @property
    def run_name(self) -> str:
        """Return task and policy."""
        return f"{self.task}-{_UNSAFE.sub('-', Path(self.policy).stem)}"
