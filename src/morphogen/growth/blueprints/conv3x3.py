"""Conv3x3: a 3x3 convolution, then a map over channels."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("conv3x3", layouts=("NCHW",))
class Conv3x3(nn.Module):
    """s(h) = W gelu(conv3x3(normalise(h))) + b, hidden size C unless told, W = b = 0 at birth."""

    def __init__(self, width: int, layout: Layout, expansion: int = 1) -> None:
        """Build norm, convolution, nonlinearity and zero layer."""
        super().__init__()
        self.norm = input_norm(layout, width)
        self.inner = nn.Conv2d(width, expansion * width, 3, padding=1)
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, expansion * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.outer(self.activation(self.inner(self.norm(h))))

    @staticmethod
    def parameter_count(width: int, layout: Layout, expansion: int = 1) -> int:
        """Return 10 e C^2 + (e + 1) C."""
        return 10 * expansion * width**2 + (expansion + 1) * width
