"""Norm: a learned share of the normalised feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("norm", layouts=("NC", "NCL", "NLC", "NCHW"))
class Norm(nn.Module):
    """s(h) = w * normalise(h) + b per channel, with w = b = 0 at birth; LayerNorm or GroupNorm by layout."""

    def __init__(self, width: int, layout: Layout) -> None:
        """Build the normalisation and the zero weights, shaped to broadcast over space."""
        super().__init__()
        shape = (width,) if layout in ("NC", "NLC") else (width, *(1 for _ in layout[2:]))
        self.norm = input_norm(layout, width)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.norm(h) * self.weight + self.bias

    @staticmethod
    def parameter_count(width: int, layout: Layout) -> int:
        """Return 2 C."""
        return 2 * width
