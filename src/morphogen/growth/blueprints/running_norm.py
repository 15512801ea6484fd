"""A normalisation per channel by running statistics, which is affine in its input in training as in eval mode."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from morphogen.growth.blueprints.layers import channel_shape
from morphogen.growth.layouts import Layout


class RunningNorm(nn.Module):
    """(h - mean) / sqrt(var + eps) per channel, with running statistics in training as in eval mode.

    In training mode each batch moves ``mean`` and ``var`` (biased) a tenth of the way to its own *after* they were used. The
    first batch sets them *before*, so that a feature of any size is normalised from the start. ``eps`` is 1e-3: a channel that
    hardly varied is blown up 32-fold at most. Statistics of a batch that are not finite are left out.

    Gradient checkpointing runs forward twice: each batch then counts twice, and the gradient is taken at the statistics after
    the first run. In distributed training each process has the statistics of its own share of the data.

    Args:
        layout: Of h.
        width: Channels of h.
    """

    eps = 1e-3
    momentum = 0.1
    mean: Tensor
    var: Tensor
    num_batches: Tensor

    def __init__(self, layout: Layout, width: int) -> None:
        """Start with mean 0 and variance 1, as buffers shaped to broadcast over h."""
        super().__init__()
        shape = channel_shape(layout, width)
        self.axes = [axis for axis, kind in enumerate(layout) if kind != "C"]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, h: Tensor) -> Tensor:
        """Return the normalised feature; in training mode the buffers are written to."""
        if not self.training or isinstance(h, fx.Proxy):  # a traced module keeps the statistics it has
            return self._normalised(h)
        with torch.no_grad():
            mean, var, finite = self._observed(h)
            first = self.num_batches == 0
            self.mean.copy_(torch.where(first, mean, self.mean))
            self.var.copy_(torch.where(first, var, self.var))
        normalised = self._normalised(h)
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.var.lerp_(var, self.momentum)
            self.num_batches.add_(finite)
        return normalised

    def _normalised(self, h: Tensor) -> Tensor:
        return (h - self.mean) * (self.var + self.eps).rsqrt()

    def _observed(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of the batch, present ones in place of those not finite, and whether all were finite."""
        var, mean = torch.var_mean(h.to(self.mean.dtype), self.axes, correction=0)
        var, mean = var.view_as(self.var), mean.view_as(self.mean)
        finite = mean.isfinite() & var.isfinite()
        return torch.where(finite, mean, self.mean), torch.where(finite, var, self.var), finite.all()
