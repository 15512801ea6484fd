"""Squeeze-and-excite: channels reweighted by what the whole feature holds."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("squeeze_excite", layouts=("NCL", "NCHW"))
class SqueezeExcite(nn.Module):
    """s(h) = h * (2 sigmoid(z) - 1), z = W2 gelu(W1 pool(h) + b1) + b2 per channel, W2 = b2 = 0 at birth.

    Source: arXiv 1709.01507, whose factor sigmoid(z) is written here as a residual that is zero at birth. GELU stands in for
    ReLU: a pooled feature hardly varies, so a ReLU unit is often off for every sample, and with few units all of them are.
    """

    def __init__(self, width: int, layout: Layout, reduction: int = 4) -> None:
        """Build the pooling and both maps; hidden size max(4, C / reduction)."""
        super().__init__()
        hidden = max(4, width // reduction)
        self.pool = nn.AdaptiveAvgPool1d(1) if layout == "NCL" else nn.AdaptiveAvgPool2d(1)
        self.inner = pointwise(layout, width, hidden)
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, hidden, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        z = self.outer(self.activation(self.inner(self.pool(h))))
        return h * (2.0 * z.sigmoid() - 1.0)

    @staticmethod
    def parameter_count(width: int, layout: Layout, reduction: int = 4) -> int:
        """Return 2 C H + H + C with H = max(4, C / reduction)."""
        hidden = max(4, width // reduction)
        return 2 * width * hidden + hidden + width
