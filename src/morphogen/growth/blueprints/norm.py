"""Norm: a learned share of the normalised feature."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from morphogen.growth.blueprints.layers import channel_shape, input_norm, one_of
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.blueprints.running_norm import RunningNorm
from morphogen.growth.layouts import Layout

Statistics = Literal["running", "sample"]


@blueprint("norm", layouts=("NC", "NCL", "NLC", "NCHW"))
class Norm(nn.Module):
    """s(h) = w * normalise(h) + b per channel, with w = b = 0 at birth; statistics are running, or of each sample.

    "running": normalise(h) = (h - mean) / sqrt(var + eps) with running statistics in both modes (:class:`RunningNorm`), so
    that s is affine in h and can be folded into a linear layer before it. "sample": LayerNorm over channels, or GroupNorm
    where space or time follows.
    """

    def __init__(self, width: int, layout: Layout, statistics: Statistics = "running") -> None:
        """Build the normalisation and the zero weights, shaped to broadcast; ValueError if the statistics are unknown."""
        super().__init__()
        running = one_of("statistics", statistics, ("running", "sample")) == "running"
        shape = channel_shape(layout, width)
        self.norm = RunningNorm(layout, width) if running else input_norm(layout, width)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.norm(h) * self.weight + self.bias

    @staticmethod
    def parameter_count(width: int, layout: Layout, statistics: Statistics = "running") -> int:
        """Return 2 C."""
        return 2 * width
