"""Knobs of the train job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, field_validator, model_validator

from morphogen import tasks
from morphogen.envs.choices import action_config
from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.rewards import require_same_gamma
from morphogen.recipes.job_config import JobConfig
from morphogen.rl.config import PPOConfig
from morphogen.rl.policy import PolicyConfig
from morphogen.rl.schedules import Linear

AGENT = PPOConfig(
    minibatch_size=64,
    epochs=6,
    learning_rate=Linear(start=1e-3, end=1e-4),
    entropy_coef=Linear(start=0.01, end=0.0),
    target_kl=0.03,
    normalize_values=True,
    policy=PolicyConfig(hidden=(64,), memory="lstm", memory_width=64),
    action=action_config(),
)
"""A recurrent policy whose heads hang together as the choices do; how long a rollout is, and the discount, say the job."""
_LEFT_TO_THE_JOB = ("rollout_steps", "gamma")


class TrainConfig(JobConfig):
    """One train job: an agent learns when and where networks grow.

    What ``ppo`` leaves out is as in :data:`AGENT`; there, ``rollout_steps`` left out is one whole episode, ``gamma`` the
    discount of the reward, and ``schedule_steps`` None the whole job.

    Attributes:
        job: Always "train".
        task: What the networks are trained on; see `morphogen tasks`.
        total_steps: Decisions, over all environments; whole rollouts are done, so up to one more than that.
        start_from: Policy to start from instead of an untrained one: a run directory, a policy file, or the name of one that
            comes with morphogen; it must have the network of ``ppo`` and the places of ``env``. The critic learns anew what
            values are.
        checkpoint_every_updates: Updates between checkpoints of the whole run.
        env: The environments: their episodes, what they pay, who runs them.
        ppo: The agent.

    Example:
        >>> config = TrainConfig(task="digits", env=GrowthEnvConfig(total_steps=12, tick_steps=2))
        >>> config.agent().rollout_steps, config.agent().gamma == config.env.reward.gamma
        (6, True)
    """

    job: Literal["train"] = "train"
    task: str = "mnist1d"
    total_steps: int = Field(default=40_000, ge=1)
    start_from: str | None = Field(default=None, min_length=1)
    checkpoint_every_updates: int = Field(default=5, ge=1)
    env: GrowthEnvConfig = GrowthEnvConfig()
    ppo: PPOConfig = AGENT

    @property
    def run_name(self) -> str:
        """Return task and job."""
        return f"{self.task}-train"

    @property
    def num_envs(self) -> int:
        """Networks that are trained at a time."""
        return self.ppo.num_envs

    @property
    def seed(self) -> int:
        """Root of all chance."""
        return self.ppo.seed

    @property
    def episode_steps(self) -> int:
        """Decisions of a whole episode."""
        task = tasks.get(self.task)
        return -(-(self.env.total_steps or task.total_steps) // (self.env.tick_steps or task.tick_steps))

    def agent(self) -> PPOConfig:
        """Return ``ppo`` with what it leaves to the job."""
        given = self.ppo.model_fields_set
        return self.ppo.replace(
            rollout_steps=self.ppo.rollout_steps if "rollout_steps" in given else self.episode_steps,
            gamma=self.env.reward.gamma,
            schedule_steps=self.ppo.schedule_steps or self.total_steps,
        )

    @field_validator("ppo", mode="before")
    @classmethod
    def _on_top_of_the_agent(cls, given: object) -> object:
        return _merged(_plain(AGENT), cast("Mapping[str, Any]", given)) if isinstance(given, Mapping) else given

    @field_serializer("ppo", mode="wrap")
    def _without_what_is_left_to_the_job(self, ppo: PPOConfig, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = set(_LEFT_TO_THE_JOB) - ppo.model_fields_set
        return {name: value for name, value in write(ppo).items() if name not in unset}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        tasks.get(self.task)  # says what there is
        if self.env.measure_test:
            raise ValueError("`env.measure_test` must be False, got True. The test split is for `morphogen evaluate` alone.")
        if "gamma" in self.ppo.model_fields_set:
            require_same_gamma(self.env.reward, self.ppo.gamma)
        return self


def _plain(config: PPOConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=set(_LEFT_TO_THE_JOB))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above`` on top, mapping by mapping; one of another kind takes its whole place."""
    if "kind" in above and above["kind"] != below.get("kind"):
        return dict(above)
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = _merged(cast("Mapping[str, Any]", under), cast("Mapping[str, Any]", value))
        merged[name] = value
    return merged
