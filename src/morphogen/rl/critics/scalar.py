"""The critic of ordinary PPO: one output, the expected return.

Shapes: B rows, S samples of a return.
"""

from __future__ import annotations

from typing import Never, final

import torch
from torch import Tensor

from morphogen.rl.critics.base import Critic, check_rows, clipped_loss


@final
class ScalarCritic(Critic):
    """One output, which is the value itself; loss = mean over S of (value - target)^2, without a factor 1/2.

    Example:
        >>> critic = ScalarCritic()
        >>> critic.loss(torch.tensor([[1.0], [2.0]]), targets_BS=torch.tensor([[1.5], [2.0]]))
        tensor([0.2500, 0.0000])
    """

    num_outputs = 1
    is_distributional = False

    def value(self, outputs_BK: Tensor) -> Tensor:
        """Return the output, [B]; a view of float32 outputs."""
        return outputs_BK.squeeze(-1).float()

    def samples(self, outputs_BK: Tensor, num: int) -> Tensor:
        """Return the value alone, [B, 1], whatever ``num`` is: nothing is known of how returns scatter. A view, if float32."""
        del num
        return outputs_BK.float()

    def loss(
        self,
        outputs_BK: Tensor,
        targets_BS: Tensor,
        old_outputs_BK: Tensor | None = None,
        clip_range: float | None = None,
    ) -> Tensor:
        """Return the squared error [B]; see :meth:`Critic.loss`. Errors: ValueError on rows that do not match."""
        check_rows(outputs_BK, targets_BS, self.num_outputs)
        targets_BS = targets_BS.float().detach()
        old_BK = None if old_outputs_BK is None else old_outputs_BK.float()
        return clipped_loss(lambda values_BK: _squared_error(values_BK, targets_BS), outputs_BK.float(), old_BK, clip_range)

    def quantile(self, outputs_BK: Tensor, level: float) -> Never:
        """Refuse with ValueError: a scalar critic has no quantiles."""
        raise _no_distribution("quantile", level)

    def cvar(self, outputs_BK: Tensor, level: float) -> Never:
        """Refuse with ValueError: a scalar critic has no tail."""
        raise _no_distribution("cvar", level)

    def initial_bias(self) -> Tensor:
        """Return zero, [1]."""
        return torch.zeros(1)


def _squared_error(values_BK: Tensor, targets_BS: Tensor) -> Tensor:
    squares_BS = (values_BK - targets_BS).square()
    return squares_BS.squeeze(-1) if squares_BS.shape[-1] == 1 else squares_BS.mean(-1)


def _no_distribution(readout: str, level: float) -> ValueError:
    return ValueError(
        f'`kind` of the critic must be "quantile" or "categorical" for {readout}({level}), got "scalar". It knows means alone.'
    )
