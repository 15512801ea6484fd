"""Members of the job that trains a population, made alike in this process, in workers and on Ray."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from gymnasium.vector import VectorEnv

from morphogen.pbt.member import Trained
from morphogen.pbt.members import PPOMember
from morphogen.pbt.records import Hyperparameters
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.recorded_growth import RecordedGrowth
from morphogen.recipes.train import recent_of
from morphogen.rl.ppo import PPO
from morphogen.rl.vector import make_vector

_MAX_EVALUATION_ENVS = 8


class GrowthMember(PPOMember):
    """An agent that learns when to grow; it also says what the networks of an interval came to."""

    def train(self, until: int) -> Trained:
        """Train up to ``until`` decisions."""
        trained = super().train(until)
        recent = recent_of(growth_of(self.agent).take_finished())
        came_to = {"metric": recent.metric, "parameters": recent.parameters, "rollbacks": float(recent.rollbacks)}
        known = {name: value for name, value in came_to.items() if math.isfinite(value)}
        return dataclasses.replace(trained, metrics={**trained.metrics, **known})


@dataclasses.dataclass(frozen=True)
class AgentFactory:
    """Makes the members of a job; importable, so that workers and Ray can.

    Args:
        config: The job's, as plain data.
    """

    config: Mapping[str, Any]

    def __call__(self, member: int, hyperparameters: Hyperparameters, seed: int) -> PPOMember:
        """Return a member that has not trained; its hyperparameters are still to be applied.

        Raises:
            ValueError: The agent does not fit the environment.
        """
        config = PBTJobConfig(**self.config)
        agent = config.agent(seed)
        environments = functools.partial(_environments, config)
        kind = GrowthMember if config.member == "growth" else PPOMember
        env = environments(agent.num_envs)
        try:
            made = PPO(env, agent)
        except (TypeError, ValueError) as error:  # TypeError: of a space that PPO cannot read
            _close(env)
            raise ValueError(f"`env` must be an environment that PPO can learn in, got {config.subject!r}: {error}") from error
        return kind(
            made,
            score=config.score,
            evaluation_episodes=config.evaluation_episodes,
            evaluation_env=functools.partial(_vector, config, min(config.evaluation_episodes, _MAX_EVALUATION_ENVS)),
            evaluation_seed=config.pbt.seed,
        )


def growth_of(agent: PPO) -> RecordedGrowth:
    """Return the environments of an agent that learns when to grow."""
    assert isinstance(agent.env, RecordedGrowth)
    return agent.env


def _environments(config: PBTJobConfig, num_envs: int) -> str | VectorEnv[Any, Any, Any]:
    """Return the id of the environments where that says all, so that a saved agent knows its environment; else make them."""
    if config.member == "ppo" and not config.env_kwargs:
        return config.subject
    return _vector(config, num_envs)


def _vector(config: PBTJobConfig, num_envs: int) -> VectorEnv[Any, Any, Any]:
    if config.member == "growth":
        return RecordedGrowth(config.subject, num_envs, config=config.growth_env)
    return make_vector(config.subject, num_envs, **config.env_kwargs)


def _close(env: str | VectorEnv[Any, Any, Any]) -> None:
    if not isinstance(env, str):
        env.close()
