"""Conv heavy: two 3x3 convolutions over all channels."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("conv_heavy", layouts=("NCHW",))
class ConvHeavy(nn.Module):
    """s(h) = conv3x3(gelu(normalise(conv3x3(normalise(h))))), hidden size C unless told, the outer convolution 0 at birth."""

    def __init__(self, width: int, layout: Layout, expansion: int = 1) -> None:
        """Build both convolutions, their norms and the nonlinearity between."""
        super().__init__()
        self.norm = input_norm(layout, width)
        self.inner = nn.Conv2d(width, expansion * width, 3, padding=1)
        self.inner_norm = input_norm(layout, expansion * width)
        self.activation = nn.GELU()
        self.outer = zeroed(nn.Conv2d(expansion * width, width, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.outer(self.activation(self.inner_norm(self.inner(self.norm(h)))))

    @staticmethod
    def parameter_count(width: int, layout: Layout, expansion: int = 1) -> int:
        """Return 18 e C^2 + (e + 1) C."""
        return 18 * expansion * width**2 + (expansion + 1) * width
