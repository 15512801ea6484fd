"""Acting without learning: single observations or batches, with everything frozen."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import torch
from gymnasium import Space, spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from numpy.typing import NDArray
from torch import Tensor

from morphogen.rl.normalizers import ObservationNormalizer
from morphogen.rl.policy import ActorCritic
from morphogen.rl.spaces import ObservationEncoder


@dataclasses.dataclass(frozen=True)
class Predictor:
    """What acting needs.

    Attributes:
        policy: Network and action distribution.
        encoder: Of observations.
        normalizer: Of observations; read, never updated. None: they are taken as they are.
        stream: Chance of drawn actions.
        space: Of one observation.
    """

    policy: ActorCritic
    encoder: ObservationEncoder
    normalizer: ObservationNormalizer | None
    stream: torch.Generator
    space: Space[Any]

    @torch.no_grad()
    def act(
        self,
        observation_ND: NDArray[np.float32],
        state: Tensor | None,
        start_N: NDArray[np.bool_] | None,
        mask_NM: NDArray[np.bool_] | None,
        stream: torch.Generator | None,
    ) -> tuple[NDArray[Any], Tensor | None]:
        """Return actions as the environment takes them, drawn from ``stream`` or the most probable, and the memory's state."""
        policy, device = self.policy, next(self.policy.parameters()).device
        if self.normalizer is not None:
            observation_ND = self.normalizer.normalize(observation_ND)
        observation = torch.from_numpy(observation_ND).to(device)
        mask = None if mask_NM is None else torch.from_numpy(mask_NM).to(device)
        if policy.memory is None:
            outputs, _ = policy(observation)
            actor_NA = outputs.actor
        else:
            state = policy.initial_state(len(observation_ND)) if state is None else state
            if start_N is not None:
                state = state.masked_fill(torch.from_numpy(np.asarray(start_N, dtype=bool)).to(device)[:, None], 0.0)  # pyright: ignore[reportOptionalMemberAccess]
            outputs, state = policy(observation[None], state)
            actor_NA = outputs.actor[0]
        distribution = policy.distribution
        if stream is None:
            return distribution.to_env(distribution.mode(actor_NA, mask)), state
        noise = distribution.noise((len(observation_ND),), stream).to(device)
        return distribution.to_env(distribution.draw(actor_NA, noise, mask)), state


def predict(
    predictor: Predictor,
    observation: Any,
    state: Tensor | None,
    episode_start: NDArray[np.bool_] | None,
    *,
    deterministic: bool,
    action_mask: object,
) -> tuple[Any, Tensor | None]:
    """Return what ``PPO.predict`` does."""
    single = _is_single(predictor.space, observation)
    batch = _batched(predictor.space, observation) if single else observation
    rows = predictor.encoder.encode(batch)
    if state is not None and predictor.policy.memory is None:
        raise ValueError("`state` must be None for a policy without memory, got a tensor. Leave it out.")
    if predictor.encoder.has_mask and action_mask is None:
        action_mask = batch["action_mask"]
    elif single and action_mask is not None:
        action_mask = _one_row(action_mask)
    mask_NM = None if action_mask is None else predictor.policy.distribution.read_mask(action_mask, len(rows))
    stream = None if deterministic else predictor.stream
    chosen, state = predictor.act(rows, state, episode_start, mask_NM, stream)
    return (chosen[0] if single else chosen), state


def _is_single(space: Space[Any], observation: Any) -> bool:
    """Whether ``observation`` is one of ``space``, not a batch: told by the number of dimensions of its first part."""
    while isinstance(space, spaces.Dict | spaces.Tuple):
        key: Any = next(iter(space.spaces)) if isinstance(space, spaces.Dict) else 0
        space, observation = cast("Any", space)[key], observation[key]
    return np.ndim(observation) == len(space.shape or ())


def _batched(space: Space[Any], observation: Any) -> Any:
    return (
        concatenate(space, [observation], cast("Any", create_empty_array(space, n=1))) if batch_space(space, 1) else observation
    )


def _one_row(mask: object) -> object:
    if isinstance(mask, dict):
        return {name: np.asarray(value)[None] for name, value in cast("dict[str, Any]", mask).items()}
    return np.asarray(mask)[None]
