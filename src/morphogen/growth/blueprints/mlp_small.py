"""Small MLP: the MLP for sequences, hidden size twice the width; ``mlp_large`` is its larger sister."""

from __future__ import annotations

from morphogen.growth.blueprints.mlp import Mlp
from morphogen.growth.blueprints.registry import blueprint


@blueprint("mlp_small", layouts=("NC", "NLC"))
class MlpSmall(Mlp):
    """s(h) = W2 gelu(W1 normalise(h) + b1) + b2 at each position, hidden size 2 C unless told, W2 = b2 = 0 at birth."""
