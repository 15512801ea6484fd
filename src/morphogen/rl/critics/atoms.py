"""Distributions on finitely many values, in rising order, with a probability for each.

Shapes: B rows, K values, S samples, L levels (probabilities). The integral I(u) of the quantile function from 0 to u is a
polyline; means of parts of the distribution are differences of it, and so are exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantile(values_BK: Tensor, probabilities_BK: Tensor, level: float) -> Tensor:
    """Return the first value [B] at which the cumulative probability reaches ``level``.

    Example:
        >>> quantile(torch.tensor([[-1.0, 0.0, 4.0]]), torch.tensor([[0.25, 0.5, 0.25]]), level=0.3)
        tensor([0.])
    """
    reached_BK = probabilities_BK.cumsum(-1)
    return values_BK.gather(-1, _first_reaching(reached_BK, torch.tensor([level], device=values_BK.device))).squeeze(-1)


def lower_mean(values_BK: Tensor, probabilities_BK: Tensor, level: float) -> Tensor:
    """Return the mean [B] of the lowest ``level`` of the probability.

    Example:
        >>> lower_mean(torch.tensor([[-1.0, 0.0, 4.0]]), torch.tensor([[0.25, 0.5, 0.25]]), level=0.5)
        tensor([-0.5000])
    """
    return _integral(values_BK, probabilities_BK, torch.tensor([level], device=values_BK.device)).squeeze(-1) / level


def equally_likely(values_BK: Tensor, probabilities_BK: Tensor, num: int) -> Tensor:
    """Return the means [B, S] of ``num`` parts of equal probability, from the lowest part to the highest.

    Their mean is that of the distribution for every ``num``, which samples at the middles of the parts would miss.

    Example:
        >>> equally_likely(torch.tensor([[-1.0, 0.0, 4.0]]), torch.tensor([[0.25, 0.5, 0.25]]), num=2)
        tensor([[-0.5000,  2.0000]])
    """
    levels_L = torch.linspace(0.0, 1.0, num + 1, device=values_BK.device)
    return _integral(values_BK, probabilities_BK, levels_L).diff(dim=-1) * num


def _integral(values_BK: Tensor, probabilities_BK: Tensor, levels_L: Tensor) -> Tensor:
    """Return I at each level, [B, L]."""
    reached_BK = probabilities_BK.cumsum(-1)
    at_BL = _first_reaching(reached_BK, levels_L)
    before_BK = F.pad(reached_BK, (1, 0)).gather(-1, at_BL)
    integral_BL = F.pad((probabilities_BK * values_BK).cumsum(-1), (1, 0)).gather(-1, at_BL)
    return integral_BL + (levels_L - before_BK) * values_BK.gather(-1, at_BL)


def _first_reaching(reached_BK: Tensor, levels_L: Tensor) -> Tensor:
    """Return the index [B, L] of the first value whose cumulative probability reaches each level, rounding errors or not."""
    levels_BL = levels_L.expand(*reached_BK.shape[:-1], -1).contiguous()
    return torch.searchsorted(reached_BK, levels_BL).clamp_max(reached_BK.shape[-1] - 1)
