"""GLU: a gated linear unit, two maps over channels of which one gates the other."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import input_norm, one_of, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout

_GATES = {"silu": nn.SiLU, "sigmoid": nn.Sigmoid}


@blueprint("glu", layouts=("NC", "NCL", "NLC", "NCHW"))
class Glu(nn.Module):
    """s(h) = W3 (W1 n * gate(W2 n)), n = normalise(h), gate silu (SwiGLU) or sigmoid (GLU), W3 = 0 at birth (arXiv 2002.05202).

    The hidden size is 2 e C / 3, so that it has about the parameters of an ``mlp`` of the same expansion e (section 3 there).
    No map has a bias.
    """

    def __init__(self, width: int, layout: Layout, expansion: int = 2, gate: Literal["silu", "sigmoid"] = "silu") -> None:
        """Build norm, both maps, the gate and the zero layer; ValueError if the gate is unknown."""
        super().__init__()
        hidden = _hidden(width, expansion)
        self.norm = input_norm(layout, width)
        self.value = pointwise(layout, width, hidden, bias=False)
        self.inner = pointwise(layout, width, hidden, bias=False)
        self.activation = _GATES[one_of("gate", gate, _GATES)]()
        self.outer = zeroed(pointwise(layout, hidden, width, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        n = self.norm(h)
        return self.outer(self.value(n) * self.activation(self.inner(n)))

    @staticmethod
    def parameter_count(width: int, layout: Layout, expansion: int = 2, gate: Literal["silu", "sigmoid"] = "silu") -> int:
        """Return 3 C H with H = 2 e C / 3, rounded down."""
        return 3 * width * _hidden(width, expansion)


def _hidden(width: int, expansion: int) -> int:
    return max(1, 2 * expansion * width // 3)
