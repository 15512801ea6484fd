"""Knobs of the evaluate job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from morphogen.recipes.job_config import JobConfig

_UNSAFE = re.compile(r"[^\w.-]+")
FIRST_HELD_OUT_SEED = 2**32
"""Environment seeds of evaluations start here; those of training are below."""
SEEDS_PER_ROOT = 1_000_000


class EvaluateConfig(JobConfig):
    """One evaluation: a trained policy and others play the same episodes, on seeds that no training uses.

    Attributes:
        job: Always "evaluate".
        policy: Run directory, policy file, or name of a policy that comes with morphogen.
        against: Built-in policies to compare with.
        task: Task to play; None for the one the policy was trained on.
        episodes: Of each player, each on a seed of its own, the same for all players.
        seed: Episode i has the environment seed ``2**32 + 1_000_000 * seed + i``.
        deterministic: Let the trained policy take its most probable choices instead of drawing them as in training.
        num_envs: Episodes played at the same time; no result depends on it.
        executor: "inline" or "processes"; no result depends on it.
        num_workers: Processes, for "processes" alone; None for one for each core.
        total_steps: Training steps of an episode; None for those of training, or the task's where it is another one.
        tick_steps: Training steps between decisions, likewise.
        device: Where networks are trained.
        resamples: Of each bootstrap interval.
    """

    job: Literal["evaluate"] = "evaluate"
    policy: str = Field(min_length=1)
    against: tuple[str, ...] = Field(default=("wait", "random", "periodic", "heuristic"), min_length=1)
    task: str | None = None
    episodes: int = Field(default=30, ge=2, le=SEEDS_PER_ROOT)
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    num_envs: int = Field(default=8, ge=1)
    executor: Literal["inline", "processes"] = "inline"
    num_workers: int | None = Field(default=None, ge=1)
    total_steps: int | None = Field(default=None, ge=1)
    tick_steps: int | None = Field(default=None, ge=1)
    device: str = "cpu"
    resamples: int = Field(default=10_000, ge=100)

    @property
    def run_name(self) -> str:
        """Return what is evaluated."""
        return f"{_UNSAFE.sub('-', Path(self.policy).stem)}-evaluate"

    @property
    def seeds(self) -> tuple[int, ...]:
        """Environment seeds of the episodes."""
        first = FIRST_HELD_OUT_SEED + SEEDS_PER_ROOT * self.seed
        return tuple(range(first, first + self.episodes))

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        twice = [name for place, name in enumerate(self.against) if name in self.against[:place]]
        if twice:
            raise ValueError(f"`against` must name each policy once, got {twice[0]!r} twice. Leave one out.")
        if self.num_workers is not None and self.executor == "inline":
            raise ValueError('`num_workers` must be left out with the executor "inline": it would have no effect.')
        return self
