"""A PPO agent as a member."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal

from gymnasium.vector import VectorEnv

from morphogen.pbt.member import Trained
from morphogen.pbt.members.handover import with_moments
from morphogen.pbt.selection import MAX_SCORES
from morphogen.pbt.spaces import Value
from morphogen.pbt.strategies import Strategy
from morphogen.rl import PPO
from morphogen.state import RandomStreams


class PPOMember:
    """An agent as a member of a population.

    Takes over policy, critics, normalisers, controllers and progress of the source, moments by the strategy. Its streams are
    derived anew, its environments begin new episodes, the memory's state is reset. Hyperparameters are live settings of
    :class:`~morphogen.rl.PPOConfig` by name.

    Args:
        agent: Its config should say ``schedule_steps``; else schedules end with each interval.
        score: "training": mean return of the episodes that ended within the interval, of the last 100 at most; of those before
            where none ended, and right after a takeover of those of the source. "evaluation": of whole episodes in
            environments of their own, with the most probable actions.
        evaluation_episodes: How many.
        evaluation_env: Makes the environments of an evaluation; None: new ones of the id of those of training.
        evaluation_seed: Of the evaluations: members with the same seed that are as far play the same episodes.

    Attributes:
        agent: As given.
    """

    def __init__(
        self,
        agent: PPO,
        *,
        score: Literal["training", "evaluation"] = "training",
        evaluation_episodes: int = 10,
        evaluation_env: Callable[[], VectorEnv[Any, Any, Any]] | None = None,
        evaluation_seed: int = 0,
    ) -> None:
        """Have trained nothing."""
        if score not in ("training", "evaluation"):
            raise ValueError(f"`score` must be training or evaluation, got {score!r}. Choose one of these words.")
        self.agent, self._score, self._evaluation_episodes = agent, score, evaluation_episodes
        self._inherited_returns: tuple[float, ...] = ()
        self._evaluation_env, self._evaluation_streams = evaluation_env, RandomStreams(evaluation_seed)

    def train(self, until: int) -> Trained:
        """Train up to ``until`` steps, whole rollouts at a time."""
        before = self.agent.num_episodes
        if until > self.agent.num_steps:
            self.agent.learn(until - self.agent.num_steps)
        if self._score == "evaluation":
            returns = self._evaluated()
        else:
            new = self.agent.num_episodes - before
            returns = self.agent.recent_returns[-new:] if new else self._known_returns()
        score = statistics.fmean(returns) if returns else float("nan")
        return Trained(score, tuple(returns[-MAX_SCORES:]), {"episodes": float(self.agent.num_episodes)})

    def _known_returns(self) -> tuple[float, ...]:
        """Return those of its own recent episodes; of the source's, until one of its own has ended."""
        return self.agent.recent_returns or self._inherited_returns

    def _evaluated(self) -> tuple[float, ...]:
        seed = self._evaluation_streams.integer("evaluation", self.agent.num_steps) % 2**31
        env = None if self._evaluation_env is None else self._evaluation_env()
        try:
            return self.agent.evaluate(self._evaluation_episodes, env, seed=seed).returns
        finally:
            if env is not None:
                env.close()

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return all that travels, as a snapshot."""
        return {"snapshot": self.agent.portable_snapshot(), "recent_returns": list(self._known_returns())}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Take over another agent; moments start anew, streams and episodes stay."""
        self.agent.adopt(values["snapshot"], "reset")

    def adopt(self, values: Mapping[str, Any], optimizer: Strategy, seed: int) -> None:
        """Take over another agent, moments by the strategy; streams and episodes begin from ``seed``."""
        snapshot = values["snapshot"]
        if isinstance(optimizer, str):
            self.agent.adopt(snapshot, optimizer, seed=seed)
        else:
            self.agent.adopt(with_moments(snapshot, optimizer), "copy", seed=seed)
        self._inherited_returns = tuple(values["recent_returns"])

    def apply_hyperparameters(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Reconfigure the agent; returns what its config and, for the rate, its optimizer hold."""
        self.agent.reconfigure(**values)
        live: dict[str, Value] = {name: getattr(self.agent.config, name) for name in values}
        if "learning_rate" in values:
            live["learning_rate"] = next(iter(self.agent.state.learning_rates().values()))
        return live

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves: the agent, its environments, its live settings."""
        return {
            "snapshot": self.agent.state.capture(reuse=False),
            "config": self.agent.config.model_dump(mode="json"),
            "inherited_returns": list(self._inherited_returns),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.agent.config = type(self.agent.config)(**state["config"])
        self.agent.state.restore(state["snapshot"])
        self._inherited_returns = tuple(state["inherited_returns"])

    def close(self) -> None:
        """Close the environments."""
        self.agent.close()
