"""MLP: two linear maps over channels with a nonlinearity between."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("mlp", layouts=("NC", "NCL", "NLC", "NCHW"))
class Mlp(nn.Module):
    """s(h) = W2 gelu(W1 normalise(h) + b1) + b2 at each position, hidden size 2 C unless told, W2 = b2 = 0 at birth."""

    def __init__(self, width: int, layout: Layout, expansion: int = 2) -> None:
        """Build norm, first map, nonlinearity and zero layer."""
        super().__init__()
        self.norm = input_norm(layout, width)
        self.inner = pointwise(layout, width, expansion * width)
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, expansion * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.outer(self.activation(self.inner(self.norm(h))))

    @staticmethod
    def parameter_count(width: int, layout: Layout, expansion: int = 2) -> int:
        """Return 2 e C^2 + (e + 1) C."""
        return 2 * expansion * width**2 + (expansion + 1) * width
