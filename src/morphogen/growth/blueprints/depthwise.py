"""Depthwise: a convolution for each channel, then a map over channels."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout

_KERNEL_SIZE = 3


@blueprint("depthwise", layouts=("NCL", "NCHW"))
class Depthwise(nn.Module):
    """s(h) = W gelu(depthwise(normalise(h))) + b, kernel size 3, W = b = 0 at birth (arXiv 1704.04861)."""

    def __init__(self, width: int, layout: Layout) -> None:
        """Build norm, depthwise convolution, nonlinearity and zero layer."""
        super().__init__()
        convolution = nn.Conv1d if layout == "NCL" else nn.Conv2d
        self.norm = input_norm(layout, width)
        self.inner = convolution(width, width, _KERNEL_SIZE, padding=_KERNEL_SIZE // 2, groups=width)
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.outer(self.activation(self.inner(self.norm(h))))

    @staticmethod
    def parameter_count(width: int, layout: Layout) -> int:
        """Return C^2 + (3^d + 2) C for d dimensions of space."""
        taps = _KERNEL_SIZE if layout == "NCL" else _KERNEL_SIZE**2
        return width**2 + (taps + 2) * width
