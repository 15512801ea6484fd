"""A critic that says how likely each of a fixed set of returns is.

Shapes: B rows, K atoms, E = K - 1 edges between them, S samples of a return.
"""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from morphogen.rl.critics import atoms
from morphogen.rl.critics.base import Critic, check_level, check_rows


@final
class CategoricalCritic(Critic):
    """Outputs are logits of K returns z_i, evenly spaced from ``low`` to ``high``; the value is the mean of their softmax.

    loss = - sum over i of mass_i * log_softmax(outputs)_i, in nats whatever the unit of returns, so not comparable with a
    squared error. mass is the mean over the samples of a row of

    - ``sigma`` > 0 (HL-Gauss): the probability of N(target, (sigma * spacing)^2) nearest to each atom;
    - ``sigma`` = 0 (C51): each target shared by the two atoms beside it, so that the mean is kept.

    Targets beyond the ends count as the ends, so choose ends that returns do not reach. HL-Gauss widens the distribution by
    sigma spacings; its mean is off by less than 1e-5 spacings at the default sigma, but by up to 0.3 at the ends themselves.

    Args:
        low: z of the first atom, in the frame of the targets.
        high: z of the last atom.
        bins: K.
        sigma: Smoothing, in spacings.

    Source: Farebrother et al. 2024, Stop Regressing, section 3.1. There bins, here atoms end at ``low`` and ``high``; here the
    outermost atoms take the probability beyond them, there all are scaled up for it. Bellemare et al. 2017, A Distributional
    Perspective on Reinforcement Learning, section 4.

    Example:
        >>> critic = CategoricalCritic(low=-1.0, high=1.0, bins=3, sigma=0.0)
        >>> even_BK = torch.zeros(1, 3)
        >>> critic.value(even_BK), critic.cvar(even_BK, level=0.5)
        (tensor([0.]), tensor([-0.6667]))
        >>> critic.mass(torch.tensor([[0.25]]))
        tensor([[0.0000, 0.7500, 0.2500]])
    """

    is_distributional = True
    atoms_K: Tensor
    edges_E: Tensor

    def __init__(self, low: float = -10.0, high: float = 10.0, bins: int = 51, sigma: float = 0.75) -> None:
        super().__init__()
        self.num_outputs = bins
        self.low, self.high, self.sigma = low, high, sigma
        self.spacing = (high - low) / (bins - 1)
        atoms_K = torch.linspace(low, high, bins)
        self.register_buffer("atoms_K", atoms_K, persistent=False)
        self.register_buffer("edges_E", (atoms_K[1:] + atoms_K[:-1]) / 2, persistent=False)

    def value(self, outputs_BK: Tensor) -> Tensor:
        """Return the mean of the distribution, [B]."""
        return (outputs_BK.float().softmax(-1) * self.atoms_K).sum(-1)

    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        """Return the means of ``num`` equally likely parts of the distribution, [B, S]."""
        return atoms.equally_likely(*self._distribution(outputs_BK), num)

    def mass(self, targets_BS: Tensor) -> Tensor:
        """Return the probability of each atom that the targets stand for, [B, K]; it sums to 1, no gradient passes."""
        with torch.no_grad():
            targets_BS1 = targets_BS.float().clamp(self.low, self.high).unsqueeze(-1)
            if self.sigma == 0:
                return (1 - (targets_BS1 - self.atoms_K).abs_() / self.spacing).clamp_min_(0).mean(-2)
            scores_BSE = (self.edges_E - targets_BS1).mul_(1 / (math.sqrt(2) * self.sigma * self.spacing))
            below_BE = scores_BSE.erf_().mean(-2).add_(1).mul_(0.5)
            return F.pad(below_BE, (0, 1), value=1.0) - F.pad(below_BE, (1, 0))

    def loss(
        self,
        outputs_BK: Tensor,
        targets_BS: Tensor,
        old_outputs_BK: Tensor | None = None,
        clip_range: float | None = None,
    ) -> Tensor:
        """Return the cross-entropy [B], see :meth:`Critic.loss`; clipping is refused with ValueError."""
        if old_outputs_BK is not None or clip_range is not None:
            raise ValueError(
                f"`clip_range` must be None for a categorical critic, got {clip_range}. Leave value clipping off: "
                "its outputs are logits, not returns, and the gradient of its loss is bounded as it is."
            )
        check_rows(outputs_BK, targets_BS, self.num_outputs)
        return -(self.mass(targets_BS) * outputs_BK.float().log_softmax(-1)).sum(-1)

    def quantile(self, outputs_BK: Tensor, level: float) -> Tensor:
        """Return the lowest atom [B] by which the probability reaches ``level``; exact to one spacing."""
        check_level(level)
        return atoms.quantile(*self._distribution(outputs_BK), level)

    def cvar(self, outputs_BK: Tensor, level: float) -> Tensor:
        """Return the mean [B] of the lowest ``level`` of the distribution, with the smoothing of ``sigma`` in it."""
        check_level(level)
        return atoms.lower_mean(*self._distribution(outputs_BK), level)

    def initial_bias(self) -> Tensor:
        """Return the logits [K] of a normal distribution about 0, or the end nearest to it, an eighth of the range wide."""
        centre = min(max(0.0, self.low), self.high)
        return -0.5 * ((self.atoms_K - centre) / ((self.high - self.low) / 8)).square()

    def _distribution(self, outputs_BK: Tensor) -> tuple[Tensor, Tensor]:
        probabilities_BK = outputs_BK.float().softmax(-1)
        return self.atoms_K.expand_as(probabilities_BK), probabilities_BK
