"""Knobs of the job that trains a population."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_validator

from morphogen.envs.config import GrowthEnvConfig
from morphogen.pbt.config import PBTConfig
from morphogen.pbt.spaces import Categorical, Float, Hyperparameter, Int, LogFloat, Logit, Ordered, Value
from morphogen.recipes.job_config import JobConfig
from morphogen.recipes.train_config import AGENT, TrainConfig
from morphogen.rl.config import STRUCTURAL, PPOConfig

_UNSAFE = re.compile(r"[^\w.-]+")

_SEARCHED: Mapping[str, Mapping[str, Any]] = {
    "learning_rate": {"kind": "log_float", "low": 1e-5, "high": 1e-2},
    "entropy_coef": {"kind": "log_float", "low": 1e-4, "high": 0.1},
    "clip_range": {"kind": "float", "low": 0.05, "high": 0.4},
}
POPULATIONS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {"total_steps": 100_000, "perturbation_interval": 5_000, "hyperparameters": _SEARCHED, "synchronous": True},
    "growth": {"total_steps": 40_000, "perturbation_interval": 2_000, "hyperparameters": _SEARCHED, "synchronous": True},
}
"""What `pbt` leaves out, by kind of member; the rest is as in PBTConfig."""
_OF_THE_JOB = {"seed": "chance comes from `pbt.seed`", "num_threads": "each member uses one"}
"""Settings of an agent that the job decides -> how."""
_BY_CIRCUMSTANCE = (
    *("truncation_ratio", "significance", "resample_probability", "min_gap", "burn_in", "ready_fraction"),
    *("optimizer_exploit_strategy", "elite"),
)
"""Settings of a population that have an effect only beside some others, so that they are written only where they were given."""
_NOT_TUNABLE = frozenset({"schedule_steps"})
_INSIDE = 0.37  # of the way from low to high: a value that is neither whole nor a bound


class PBTJobConfig(JobConfig):
    """One job: a population of agents is trained, and the best of them is kept.

    What `pbt` leaves out is as in :data:`POPULATIONS`. Of a growth member, what `ppo` leaves out is as in `morphogen train`.

    Attributes:
        job: Always "pbt".
        member: What the members are. "ppo": agents in a Gymnasium environment; "growth": agents that learn when and where
            networks grow, as in `morphogen train`.
        env: For "ppo": id of a registered environment; "module:Name-v0" imports ``module`` first.
        env_kwargs: For "ppo": given to every environment when it is made; plain data.
        task: For "growth": what the networks are trained on; see `morphogen tasks`.
        growth_env: For "growth": the environments, their episodes and what they pay; None for the defaults.
        score: What members are compared by. "training": the mean return of the episodes that ended within the interval;
            "evaluation": that of episodes with the most probable actions in environments of their own, alike for all members.
        evaluation_episodes: For the score "evaluation": how many.
        engine: Who runs members: "inline", "processes" or "ray". It changes no number of a synchronous run.
        num_workers: For "processes": how many; None for one for each core.
        engine_options: Further options of the engine, such as ``address`` of a Ray cluster.
        ppo: What the agents have in common. Where it says no ``schedule_steps``, schedules end with the job.
        pbt: The population: its size, its steps, what is searched, who takes over whom.

    Raises:
        ValueError: A setting is out of range, or would have no effect.

    Example:
        >>> config = PBTJobConfig(env="CartPole-v1", pbt={"population_size": 4, "truncation_ratio": 0.25})
        >>> config.pbt.num_exploited, sorted(config.pbt.hyperparameters)
        (1, ['clip_range', 'entropy_coef', 'learning_rate'])
    """

    job: Literal["pbt"] = "pbt"
    member: Literal["ppo", "growth"] = "ppo"
    env: str | None = Field(default=None, min_length=1)
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    task: str | None = None
    growth_env: GrowthEnvConfig | None = None
    score: Literal["training", "evaluation"] = "training"
    evaluation_episodes: int = Field(default=10, ge=1)
    engine: Literal["inline", "processes", "ray"] = "inline"
    num_workers: int | None = Field(default=None, ge=1)
    engine_options: dict[str, Any] = Field(default_factory=dict)
    ppo: PPOConfig = PPOConfig()
    pbt: PBTConfig = PBTConfig(**POPULATIONS["ppo"])

    @property
    def run_name(self) -> str:
        """Return what the members learn in, and the job."""
        return f"{_UNSAFE.sub('-', self.subject)}-pbt"

    @property
    def subject(self) -> str:
        """The environment or the task."""
        return str(self.env if self.member == "ppo" else self.task)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the engine."""
        return self.engine_options if self.num_workers is None else {**self.engine_options, "num_workers": self.num_workers}

    def agent(self, seed: int = 0) -> PPOConfig:
        """Return the agent of a member, before its hyperparameters."""
        steps = self.pbt.total_steps
        whole = self.ppo if self.member == "ppo" else self._train_config().agent()
        return whole.replace(schedule_steps=self.ppo.schedule_steps or steps, seed=seed, num_threads=1)

    def _train_config(self) -> TrainConfig:
        values: dict[str, Any] = {"task": self.task, "env": self.growth_env, "ppo": self.ppo}
        return TrainConfig(**values)

    @model_validator(mode="before")
    @classmethod
    def _on_top_of_the_defaults(cls, given: Any) -> Any:
        values = dict(given)
        growth = values.get("member") == "growth"
        pbt = values.get("pbt", {})
        if isinstance(pbt, Mapping):
            population = POPULATIONS["growth" if growth else "ppo"]
            values["pbt"] = PBTConfig(**{**population, **cast("Mapping[str, Any]", pbt)})
        if growth and isinstance(values.get("task"), str):
            of_job: dict[str, Any] = {name: values[name] for name in ("task", "ppo") if name in values}
            of_job["env"] = values.get("growth_env") or {}
            train = TrainConfig(**of_job)
            values |= {"growth_env": train.env, "ppo": train.ppo}
        return values

    @field_serializer("ppo", mode="wrap")
    def _what_members_share(self, ppo: PPOConfig, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = {*self.pbt.hyperparameters, *_OF_THE_JOB}
        if self.member == "growth":
            left_out |= {"rollout_steps", "gamma"} - ppo.model_fields_set
        return {name: value for name, value in write(ppo).items() if name not in left_out}

    @field_serializer("pbt", mode="wrap")
    def _what_has_an_effect(self, pbt: PBTConfig, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = set(_BY_CIRCUMSTANCE) - pbt.model_fields_set
        return {name: value for name, value in write(pbt).items() if name not in left_out}

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        problem = self._members() or self._scoring() or self._engines() or self._shared() or self._tuned() or self._steps()
        if problem:
            raise ValueError(problem)
        return self

    def _members(self) -> str:
        mine, other = ("env", "task") if self.member == "ppo" else ("task", "env")
        if getattr(self, mine) is None:
            example = "env: CartPole-v1" if mine == "env" else "task: mnist1d"
            return f'`{mine}` must be given with the member "{self.member}", for example {example}.'
        idle = [name for name in (other, "env_kwargs" if other == "env" else "growth_env") if getattr(self, name)]
        if idle:
            return f'`{idle[0]}` must be left out with the member "{self.member}": it would have no effect.'
        if self.growth_env is not None and self.growth_env.executor != "inline" and self.engine != "inline":
            return (
                f'`growth_env.executor` must be "inline" with the engine "{self.engine}", got "{self.growth_env.executor}": '
                "members have processes of their own already."
            )
        return ""

    def _scoring(self) -> str:
        if self.score == "training" and self.evaluation_episodes != 10:
            return '`evaluation_episodes` must be left out with the score "training": it would have no effect.'
        if self.pbt.metric != "score":
            return f'`pbt.metric` must be left out, got "{self.pbt.metric}": these members are compared by their return.'
        return ""

    def _engines(self) -> str:
        if self.num_workers is not None and self.engine != "processes":
            return f'`num_workers` must be left out with the engine "{self.engine}": it would have no effect.'
        if self.engine_options and self.engine == "inline":
            return '`engine_options` must be left out with the engine "inline": it has none.'
        if "num_workers" in self.engine_options:
            return "`engine_options` must not hold `num_workers`: it is a setting of its own. Set it there."
        return ""

    def _shared(self) -> str:
        default = PPOConfig() if self.member == "ppo" else AGENT
        for name, how in _OF_THE_JOB.items():
            if getattr(self.ppo, name) != getattr(default, name):
                return f"`ppo.{name}` must be left out, got {getattr(self.ppo, name)!r}: {how}."
        for name in self.pbt.hyperparameters.keys() & self.ppo.model_fields_set:
            if getattr(self.ppo, name) != getattr(default, name):
                return (
                    f"`ppo.{name}` must be left out, got {getattr(self.ppo, name)!r}: it is searched, so that it would have no "
                    "effect. Take it out of one of `ppo` and `pbt.hyperparameters`."
                )
        return ""

    def _tuned(self) -> str:
        agent = self.agent()
        live = PPOConfig.model_fields.keys() - STRUCTURAL - _NOT_TUNABLE
        for name, space in self.pbt.hyperparameters.items():
            where = f"`pbt.hyperparameters.{name}`"
            if name in STRUCTURAL:
                return f"{where} must be left out: what is built hangs on it, so that an agent cannot change it."
            if name not in live:
                near = difflib.get_close_matches(name, live, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(sorted(live))}."
                return f"{where} must be a live setting of PPOConfig. {hint}"
            if name == "gamma" and self.member == "growth":
                return f"{where} must be left out for growth: there the discount is `growth_env.reward.gamma`."
            problem = _unusable(agent, name, space)
            if problem:
                return f"{where} must hold values that the agent takes: {problem}"
        return ""

    def _steps(self) -> str:
        agent, space = self.agent(), self.pbt.hyperparameters.get("rollout_steps")
        rollout = agent.rollout_steps if space is None else max(int(value) for value in _probes(space))
        steps = rollout * agent.num_envs
        if self.pbt.perturbation_interval < steps:
            return (
                f"`pbt.perturbation_interval` must be at least a rollout, {rollout} steps of {agent.num_envs} environments = "
                f"{steps}, got {self.pbt.perturbation_interval}: some intervals would pass without an update. Make it "
                "longer, or set `ppo.rollout_steps`."
            )
        return ""


def _unusable(agent: PPOConfig, name: str, space: Hyperparameter) -> str:
    """Return why ``agent`` could not take a value of ``space``, "" if it can take them all."""
    for value in _probes(space):
        try:
            taken = getattr(agent.replace(**{name: value}), name)
        except ValueError as error:
            return str(error)
        if taken != value:
            return f"of {value!r} it would make {taken!r}. Use another kind."
    return ""


def _probes(space: Hyperparameter) -> tuple[Value, ...]:
    """Return values that stand for all of ``space``."""
    match space:
        case Int():
            return space.low, space.high
        case Float() | LogFloat() | Logit():
            return space.low, space.high, space.low + _INSIDE * (space.high - space.low)
        case Categorical() | Ordered():
            return space.values
