"""Playing whole episodes with everything frozen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from morphogen.rl.prediction import Predictor
from morphogen.rl.vector import Stepper


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Episodes played.

    Attributes:
        returns: Undiscounted return of each, in the environment's own unit.
        lengths: Steps of each.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean_return(self) -> float:
        """Mean of the returns."""
        return float(np.mean(self.returns))

    @property
    def std_return(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))

    @property
    def mean_length(self) -> float:
        """Mean of the lengths."""
        return float(np.mean(self.lengths))


def evaluate(
    predictor: Predictor, env: VectorEnv[Any, Any, Any], episodes: int, *, deterministic: bool, seed: int
) -> EvaluationResult:
    """Return ``episodes`` whole episodes; each environment plays its share, so that those that end soon are not favoured."""
    if episodes < 1:
        raise ValueError(f"`episodes` must be at least 1, got {episodes}. Ask for at least one.")
    distribution = predictor.policy.distribution
    stepper = Stepper(env, distribution.read_mask if distribution.mask_width else None)
    stream = None if deterministic else torch.Generator().manual_seed(seed)
    left = [episodes // env.num_envs + (index < episodes % env.num_envs) for index in range(env.num_envs)]
    returns, lengths = list[float](), list[int]()
    try:
        step, state = stepper.reset(seed), None
        while any(left):
            actions, state = predictor.act(step.observation_ND, state, step.start_N, step.mask_NM, stream)
            step = stepper.step(actions)
            for episode in step.episodes:
                if left[episode.env]:
                    left[episode.env] -= 1
                    returns.append(episode.total_reward)
                    lengths.append(episode.length)
    finally:
        stepper.detach()
    return EvaluationResult(tuple(returns), tuple(lengths))


def id_of(env: VectorEnv[Any, Any, Any]) -> str:
    """Return the id to make more environments like ``env`` from; ValueError if it has none."""
    spec = env.spec or getattr(env.unwrapped, "spec", None)
    if spec is None:
        raise ValueError(
            "`env` must be given: the environments of training were not made from an id. Pass a vector environment."
        )
    return spec.id
