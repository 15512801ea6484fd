"""From a rollout to what the update learns from: advantages, and the returns that critics should have predicted.

Shapes: T steps, N environments, B valid rows, Q critics, K outputs of a critic, Z target samples.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.rl.advantages import estimate_advantages, explained_variance
from morphogen.rl.config import PPOConfig
from morphogen.rl.critics import Critic, lowest_samples, sample_returns
from morphogen.rl.minibatches import Rows
from morphogen.rl.normalizers import ValueNormalizer
from morphogen.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Experience:
    """One rollout, digested.

    Attributes:
        rows: Its valid rows, step by step.
        explained_variance: Of the returns, by the values of the rollout.
    """

    rows: Rows
    explained_variance: float


@torch.no_grad()
def digest(
    rollout: Rollout, critic: Critic, normalizer: ValueNormalizer | None, config: PPOConfig, generator: torch.Generator
) -> Experience:
    """Return the rows of ``rollout`` with advantages and targets.

    The value normaliser is updated in between: old values are read in its old frame, targets written in its new one.

    Args:
        rollout: What happened.
        critic: What its critics' outputs mean.
        normalizer: Between the critics' frame and returns, updated here; None: they are the same.
        config: Discount, lambda, and what the loss will need.
        generator: All chance of sampled targets.
    """
    valid_TN = rollout.valid_TN
    device = rollout.observation_TND.device
    value_TN = _values(critic, rollout.critic_QTNK, normalizer)
    next_TN = _values(critic, rollout.next_critic_QTNK, normalizer) * ~rollout.terminated_TN
    # Filler rows may hold anything; zeros carry nothing on.
    reward_TN, value_TN, next_TN = (np.where(valid_TN, array, 0.0) for array in (rollout.reward_TN, value_TN, next_TN))
    advantage_TN = estimate_advantages(
        reward_TN, value_TN, next_TN, rollout.continues_TN, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    return_TN = advantage_TN + value_TN
    valid = None if valid_TN.all() else torch.from_numpy(np.flatnonzero(valid_TN)).to(device)
    if critic.is_distributional:
        target_TNZ = _sampled(rollout, reward_TN, critic, normalizer, config=config, generator=generator)
    else:
        target_TNZ = torch.from_numpy(return_TN.astype(np.float32)[..., None]).to(device)
    target_BZ = _flat(target_TNZ, valid)
    if normalizer is not None:
        normalizer.update(target_BZ)
        target_BZ = normalizer.normalize(target_BZ)
    compared = config.kl_penalty is not None
    rows = Rows(
        mask_BM=None if rollout.mask_TNM is None else _flat(rollout.mask_TNM, valid),
        action_B=_flat(rollout.action_TN, valid),
        log_prob_BH=_flat(rollout.log_prob_TNH, valid),
        actor_BA=_flat(rollout.actor_TNA, valid) if compared else None,
        critic_BQK=None if config.value_clip_range is None else _flat(rollout.critic_QTNK.permute(1, 2, 0, 3), valid),
        advantage_B=_flat(torch.from_numpy(advantage_TN.astype(np.float32)).to(device), valid),
        target_BZ=target_BZ,
    )
    return Experience(rows, explained_variance(value_TN[valid_TN], return_TN[valid_TN]))


def lowest_value(critic: Critic, critic_QBK: Tensor) -> Tensor:
    """Return the value of each row, the lowest of its critics' (Fujimoto et al. 2018), in their frame."""
    value_QB = critic.value(critic_QBK)
    return value_QB[0] if len(value_QB) == 1 else value_QB.amin(0)


def _values(critic: Critic, critic_QTNK: Tensor, normalizer: ValueNormalizer | None) -> NDArray[np.float32]:
    value_TN = lowest_value(critic, critic_QTNK)
    return (value_TN if normalizer is None else normalizer.denormalize(value_TN)).cpu().numpy()


def _sampled(
    rollout: Rollout,
    reward_TN: NDArray[np.floating],
    critic: Critic,
    normalizer: ValueNormalizer | None,
    *,
    config: PPOConfig,
    generator: torch.Generator,
) -> Tensor:
    """Return samples of each row's return; bootstrap samples come from the critic whose mean is lowest."""
    device = rollout.observation_TND.device
    bootstrap_TNZ = lowest_samples(critic.samples(rollout.next_critic_QTNK, config.critic.target_samples))
    if normalizer is not None:
        bootstrap_TNZ = normalizer.denormalize(bootstrap_TNZ)
    terminated_TN = torch.from_numpy(rollout.terminated_TN).to(device)
    return sample_returns(
        torch.from_numpy(reward_TN.astype(np.float32)).to(device),
        torch.from_numpy(rollout.continues_TN).to(device),
        bootstrap_TNZ.masked_fill(terminated_TN[..., None], 0.0),
        gamma=config.gamma,
        lam=config.gae_lambda,
        choices_TNS=torch.rand(bootstrap_TNZ.shape, generator=generator).to(device),
        valid_TN=torch.from_numpy(rollout.valid_TN).to(device),
    )


def _flat(tensor_TN: Tensor, valid_B: Tensor | None) -> Tensor:
    rows = tensor_TN.flatten(0, 1)
    return rows if valid_B is None else rows[valid_B]
