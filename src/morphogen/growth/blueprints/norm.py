"""Norm: a learned share of the normalised feature."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("norm", layouts=("NC", "NCL", "NLC", "NCHW"))
class Norm(nn.Module):
    """s(h) = w * normalise(h) + b, with w = b = 0 at birth; LayerNorm or GroupNorm by layout."""

    def __init__(self, width: int, layout: Layout) -> None:
        """Build the normalisation; its own affine map is the zero layer."""
        super().__init__()
        self.norm = zeroed(input_norm(layout, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.norm(h)

    @staticmethod
    def parameter_count(width: int, layout: Layout) -> int:
        """Return 2 C."""
        return 2 * width
