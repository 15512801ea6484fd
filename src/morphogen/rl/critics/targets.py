"""Targets for critics that learn a distribution: returns that scatter as returns do.

Shapes: T rollout steps, N environments, S samples of a return, B rows, C critics, M samples of a row in a minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_returns(
    rewards_TN: Tensor,
    continues_TN: Tensor,
    bootstrap_TNS: Tensor,
    *,
    gamma: float,
    lam: float,
    choices_TNS: Tensor,
    valid_TN: Tensor | None = None,
) -> Tensor:
    """Return S equally likely returns of each row, [T, N, S], with no gradient; a new tensor.

    From the last row back, with t one row after the other within an environment:

        target_t = reward_t + gamma * (target_{t+1} where the episode goes on and choice_t < lam, else bootstrap_t)

    Each sample follows the rewards for a number of rows that is drawn anew, then takes one sample of the critic's distribution
    there. The mean over choices is the lambda-return of bootstrap means. At ``lam`` 1 a sample is the return itself, its
    distribution exact but for the end of the rollout; below 1 it is as right as the critic's own.

    All rows are computed at once, in log2(T) steps.

    Args:
        rewards_TN: Reward of the action of each row.
        continues_TN: 1 (or True) where the next row goes on with the same episode; what it says of the last row has no effect.
        bootstrap_TNS: Samples of the return from the state after each row: 0 where it was terminal, those of the final
            observation where the episode was truncated.
        gamma: Discount, in [0, 1].
        lam: Weight of later rows, in [0, 1].
        choices_TNS: Noise, uniform in [0, 1).
        valid_TN: False for filler rows between episodes. Whatever they hold, even NaN, changes nothing; their targets are 0.

    Source: SR(lambda) of Nam, Kim and Park 2021, GMAC: A Distributional Perspective on Actor-Critic Framework (arXiv
    2105.11366), for any number of samples and not row by row.

    Example:
        >>> rewards_TN, goes_on_TN = torch.ones(3, 1), torch.tensor([[1], [1], [0]])
        >>> last_TNS = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]], [[-8.0, 8.0]]])
        >>> sample_returns(rewards_TN, goes_on_TN, last_TNS, gamma=0.5, lam=1.0, choices_TNS=torch.zeros(3, 1, 2)).squeeze(1)
        tensor([[ 0.7500,  2.7500],
                [-0.5000,  3.5000],
                [-3.0000,  5.0000]])
    """
    follows_TNS = (choices_TNS < lam) & continues_TN.bool().unsqueeze(-1)
    follows_TNS[-1] = False
    # target_t = sums_t + factors_t * target_{t+1}; each pass joins runs of rows to runs of twice the length.
    sums_TNS = torch.where(follows_TNS, 0.0, bootstrap_TNS.float()).mul_(gamma).add_(rewards_TN.unsqueeze(-1))
    factors_TNS = follows_TNS.to(sums_TNS.dtype).mul_(gamma)
    if valid_TN is not None:
        filler_TN1 = ~valid_TN.bool().unsqueeze(-1)
        sums_TNS.masked_fill_(filler_TN1, 0.0)
        factors_TNS.masked_fill_(filler_TN1, 0.0)
    length = 1
    while length < len(sums_TNS):
        head = len(sums_TNS) - length
        sums_TNS = torch.cat((sums_TNS[:head].addcmul(factors_TNS[:head], sums_TNS[length:]), sums_TNS[head:]))
        factors_TNS = torch.cat((factors_TNS[:head] * factors_TNS[length:], factors_TNS[head:]))
        length *= 2
    return sums_TNS.detach()


def choose_samples(targets_BS: Tensor, noise_BM: Tensor) -> Tensor:
    """Return M of the S samples of each row, [B, M]: one from each of M equal parts, each as likely as any other.

    Bootstrapped samples rise along S, so columns that are the same for all rows would pull a whole minibatch up or down. One
    from each part scatters less than M drawn freely.

    Args:
        targets_BS: As from :func:`sample_returns`, rows flattened.
        noise_BM: Noise, uniform in [0, 1), on the device of the targets.

    Example:
        >>> choose_samples(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), noise_BM=torch.tensor([[0.9, 0.2]]))
        tensor([[1., 2.]])
    """
    num_samples, num_chosen = targets_BS.shape[-1], noise_BM.shape[-1]
    if num_chosen > num_samples:
        raise ValueError(f"`noise_BM` must have at most {num_samples} columns, got {num_chosen}. A row has no more samples.")
    parts_M = torch.arange(num_chosen, device=noise_BM.device)
    # Rounding may carry noise just below 1 to the next whole number.
    columns_BM = (noise_BM + parts_M).mul_(num_samples / num_chosen).long().clamp_max_(num_samples - 1)
    return targets_BS.gather(-1, columns_BM)


def lowest_samples(samples_CBS: Tensor) -> Tensor:
    """Return the samples [B, S] of that critic whose mean is lowest, row by row: one of two distributions, never a mixture.

    Example:
        >>> lowest_samples(torch.tensor([[[0.0, 4.0]], [[1.0, 2.0]]]))
        tensor([[1., 2.]])
    """
    best_B = samples_CBS.mean(-1).argmin(0)
    return samples_CBS.gather(0, best_B[None, ..., None].expand(1, *samples_CBS.shape[1:])).squeeze(0)
