"""Knobs of the PPO job."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from morphogen.recipes.job_config import JobConfig
from morphogen.rl.config import PPOConfig

_UNSAFE = re.compile(r"[^\w.-]+")


class PPOJobConfig(JobConfig):
    """One PPO job: an agent is trained in one environment, then evaluated.

    Attributes:
        job: Always "ppo".
        env: Id of a registered Gymnasium environment; "module:Name-v0" imports ``module`` first.
        env_kwargs: Given to every environment when it is made; plain data.
        total_steps: Environment steps, over all environments; whole rollouts are done, so up to one more than that.
        evaluation_episodes: Episodes of each evaluation, with the most probable actions, in environments of their own.
        evaluate_every_steps: Steps between evaluations on the way; None: at the end alone.
        checkpoint_every_updates: Updates between checkpoints.
        video: Record evaluation episodes at the end; needs moviepy, and an environment that renders "rgb_array".
        ppo: The agent. Where it says no ``schedule_steps``, schedules end with the job.
    """

    job: Literal["ppo"] = "ppo"
    env: str = Field(min_length=1)
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    total_steps: int = Field(default=100_000, ge=1)
    evaluation_episodes: int = Field(default=10, ge=1)
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    checkpoint_every_updates: int = Field(default=10, ge=1)
    video: bool = False
    ppo: PPOConfig = PPOConfig()

    @property
    def run_name(self) -> str:
        """Return environment and algorithm."""
        return f"{_UNSAFE.sub('-', self.env)}-ppo"
