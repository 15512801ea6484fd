"""The loss of PPO, for one minibatch.

Shapes: B rows, A outputs of the actor, H heads, Q critics, K outputs of a critic, Z target samples.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from morphogen.rl.actions import Evaluation
from morphogen.rl.critics import Critic
from morphogen.rl.minibatches import Rows

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here before ``exp``: e**20 is far outside any clip range, and finite."""


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The clipped surrogate and what is watched about it; scalars, of which the first alone carries a gradient.

    Attributes:
        loss: To be differentiated: its gradient is that of ``value``, its own value means nothing.
        value: The clipped surrogate, negated.
        kl: Mean of (ratio - 1) - log ratio over whole actions: an unbiased, never negative estimate of KL(old || new).
        clip_fraction: Share of ratios outside the clip range.
    """

    loss: Tensor
    value: Tensor
    kl: Tensor
    clip_fraction: Tensor


def policy_loss(
    evaluation: Evaluation, rows: Rows, advantage_B: Tensor, clip_range: float, ratio: Literal["joint", "per_head"]
) -> PolicyLoss:
    """Return the clipped surrogate (Schulman et al. 2017, equation 7), negated, as a mean over rows.

    r = exp(log_prob - log_prob of the rollout)
    loss = -mean_B( sum_H( min(r * advantage, clip(r, 1 - clip_range, 1 + clip_range) * advantage) ) )

    With "joint" there is one ratio, of the whole action; with "per_head" one for each head, and heads that do not matter for
    the action taken have none. Both have the same gradient where the ratio is 1.
    """
    one_head = evaluation.log_prob_BH.shape[1] == 1
    per_head = ratio == "per_head" and not one_head
    relevant_BH = evaluation.relevant_BH if per_head else None
    log_prob_BH = evaluation.log_prob_BH if one_head or per_head else evaluation.log_prob_BH.sum(1, keepdim=True)
    old_BH = rows.log_prob_BH if one_head or per_head else rows.log_prob_BH.sum(1, keepdim=True)
    advantage_B1 = advantage_B[:, None]
    with torch.no_grad():
        log_ratio_BH = (log_prob_BH - old_BH).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        excess_BH = log_ratio_BH.expm1()  # r - 1
        near_BH = excess_BH.clamp(-clip_range, clip_range)
        # r * advantage = (r - 1) * advantage + advantage, and the last term is on both sides of the minimum.
        gain_BH, limited_BH = excess_BH * advantage_B1, near_BH * advantage_B1
        surrogate_BH = torch.minimum(gain_BH, limited_BH).add_(advantage_B1)
        slope_BH = gain_BH.add(advantage_B1).mul_(gain_BH <= limited_BH)
        if relevant_BH is not None:
            surrogate_BH, slope_BH = surrogate_BH * relevant_BH, slope_BH * relevant_BH
        log_ratio_B, excess_B = log_ratio_BH, excess_BH
        if per_head:
            log_ratio_B = log_ratio_BH.sum(1).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            excess_B = log_ratio_B.expm1()
        kl = (excess_B - log_ratio_B).mean()
        clip_fraction = torch.mean(excess_BH != near_BH, dtype=torch.float32)
        value = surrogate_BH.mean() * -float(log_prob_BH.shape[1])
    # The surrogate's gradient in closed form: autograd through its parts would take four times as long.
    return PolicyLoss((log_prob_BH * slope_BH).sum() * (-1.0 / len(slope_BH)), value, kl, clip_fraction)


def value_loss(critic: Critic, critic_QBK: Tensor, rows: Rows, target_BZ: Tensor, clip_range: float | None) -> Tensor:
    """Return the critics' loss, a mean over rows and critics; each critic is clipped by itself."""
    old_BQK = rows.critic_BQK if clip_range is not None else None
    losses = [
        critic.loss(critic_BK, target_BZ, None if old_BQK is None else old_BQK[:, index], clip_range).mean()
        for index, critic_BK in enumerate(critic_QBK)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
