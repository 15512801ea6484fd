"""Large MLP: the MLP with a hidden size of four times the width, for sequences of tokens."""

from __future__ import annotations

from morphogen.growth.blueprints.mlp import Mlp
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("mlp_large", layouts=("NC", "NLC"))
class MlpLarge(Mlp):
    """s(h) = W2 gelu(W1 normalise(h) + b1) + b2 at each position, hidden size 4 C unless told, W2 = b2 = 0 at birth."""

    def __init__(self, width: int, layout: Layout, expansion: int = 4) -> None:
        """Build as an MLP."""
        super().__init__(width, layout, expansion)

    @staticmethod
    def parameter_count(width: int, layout: Layout, expansion: int = 4) -> int:
        """Return 2 e C^2 + (e + 1) C."""
        return Mlp.parameter_count(width, layout, expansion)
