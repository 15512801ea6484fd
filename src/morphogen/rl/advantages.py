"""Generalised advantage estimation (Schulman et al. 2016, equation 16); the end of an episode is told from the end of the data.

Shapes: T steps, N environments, B rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
MIN_DEVIATION = 1e-8


def estimate_advantages(
    rewards_TN: NDArray[np.floating],
    values_TN: NDArray[np.floating],
    next_values_TN: NDArray[np.floating],
    continues_TN: NDArray[np.bool_],
    *,
    gamma: float,
    gae_lambda: float,
) -> Array:
    """Return the advantage of each row, float64 [T, N].

    delta_t = reward_t + gamma * next_value_t - value_t
    advantage_t = delta_t + gamma * gae_lambda * continue_t * advantage_{t+1}

    Args:
        rewards_TN: Rewards.
        values_TN: Value of the state each row starts in.
        next_values_TN: Value of the state it leads to: 0 where the episode terminated; that of the true final observation where
            it was truncated, or where the data ends.
        continues_TN: Whether the next row of that environment goes on with the same episode.
        gamma: Discount, in [0, 1].
        gae_lambda: Weight of later rows, in [0, 1]; 0 is one step of bootstrapping, 1 the return as it was.

    Example:
        >>> ones, zeros = np.ones((2, 1)), np.zeros((2, 1))
        >>> estimate_advantages(ones, zeros, zeros, np.array([[True], [False]]), gamma=0.5, gae_lambda=1.0)
        array([[1.5],
               [1. ]])
    """
    deltas_TN = rewards_TN.astype(np.float64) + gamma * next_values_TN - values_TN
    carry_TN = gamma * gae_lambda * continues_TN
    advantages_TN = np.empty_like(deltas_TN)
    running_N = np.zeros(deltas_TN.shape[1])
    for step in range(len(deltas_TN) - 1, -1, -1):
        running_N = deltas_TN[step] + carry_TN[step] * running_N
        advantages_TN[step] = running_N
    return advantages_TN


def explained_variance(predicted: NDArray[np.floating], returns: NDArray[np.floating]) -> float:
    """Return ``1 - Var(returns - predicted) / Var(returns)``: 1 is perfect, 0 is a constant's; NaN for constant returns."""
    variance = float(np.var(returns))
    return 1.0 - float(np.var(returns - predicted)) / variance if variance > 0 else float("nan")


def normalize_advantages(advantage_B: Tensor) -> Tensor:
    """Return the advantages with mean 0 and deviation 1; as they are where there are fewer than two, or all are equal.

    Example:
        >>> normalize_advantages(torch.tensor([1.0, 3.0]))
        tensor([-0.7071,  0.7071])
    """
    if len(advantage_B) < 2:
        return advantage_B
    deviation, mean = torch.std_mean(advantage_B)
    return (advantage_B - mean) / (deviation + MIN_DEVIATION)
