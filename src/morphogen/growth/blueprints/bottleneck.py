"""Bottleneck: a 3x3 convolution among few channels."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("bottleneck", layouts=("NCHW",))
class Bottleneck(nn.Module):
    """s(h) = W2 a(conv3x3(a(W1 h + b1))) + b2, a = gelu of the normalised, max(8, C / 4) channels inside, W2 = b2 = 0 at birth.

    Source: arXiv 1512.03385, figure 5, with nothing after the last map.
    """

    def __init__(self, width: int, layout: Layout, reduction: int = 4) -> None:
        """Build the maps, the convolution between them, their norms and nonlinearities; hidden size max(8, C / reduction)."""
        super().__init__()
        hidden = _hidden(width, reduction)
        self.down = pointwise(layout, width, hidden)
        self.inner = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.norm = input_norm(layout, hidden)
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, hidden, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        narrow = self.activation(self.norm(self.down(h)))
        return self.outer(self.activation(self.norm(self.inner(narrow))))

    @staticmethod
    def parameter_count(width: int, layout: Layout, reduction: int = 4) -> int:
        """Return 2 C H + 9 H^2 + 2 H + C with H = max(8, C / reduction)."""
        hidden = _hidden(width, reduction)
        return 2 * width * hidden + 9 * hidden**2 + 2 * hidden + width


def _hidden(width: int, reduction: int) -> int:
    return max(8, width // reduction)
