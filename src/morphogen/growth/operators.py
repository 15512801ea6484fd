"""How a seed's output s acts on the host's feature h: the output is h + alpha * r, with r from the table below.

Legend: h and s have the shape of the feature at the growth point; gate_B has one value per sample.
At alpha 0 every operator is the identity, and at birth s = 0 makes r = 0 for every operator.
"""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.layouts import Layout, pooled
from morphogen.growth.lifecycle import Operator


class Seed(nn.Module):
    """A blueprint's module and its operator: maps the host's feature to the residual r.

    add: r = s(h). scale: r = h * tanh(s(h)). gate: r = g(h) * s(h), one g in (0, 1) per sample, in a
    sequence per position. A body with the attribute ``reads_input`` computes s from what went into the host's submodule, not
    from what came out.

    Args:
        body: Computes s(h), same shape as h.
        operator: "add", "scale" or "gate".
        width: Channels of h.
        layout: Layout of h.
    """

    def __init__(self, body: nn.Module, operator: Operator, width: int, layout: Layout) -> None:
        """Hold the body; the gate operator adds a small network on the pooled feature."""
        super().__init__()
        self.body = body
        self.operator = operator
        self.reads_input = bool(getattr(body, "reads_input", False))
        self.gate = SampleGate(width, layout) if operator == "gate" else None

    def forward(self, h: Tensor, source: Tensor | None = None) -> Tensor:
        """Return r(h), in the dtype of ``h`` also under autocast; ``source`` is the submodule's input, if a body reads it."""
        s = self.body(h if source is None else source).to(h.dtype)
        if self.operator == "scale":
            return h * s.tanh()
        if self.gate is not None:
            return self.gate(h).to(h.dtype) * s
        return s


class SampleGate(nn.Module):
    """g(h) = sigmoid(W2 gelu(W1 pool(h) + b1) + b2); 1/2 at birth, as W2 and b2 are zero.

    One value per sample, of what its feature holds on average; in a sequence (NLC) one per position, of that position alone:
    what later positions hold must not reach earlier ones.
    """

    def __init__(self, width: int, layout: Layout) -> None:
        """Build the two layers; hidden size max(8, width / 4)."""
        super().__init__()
        hidden = max(8, width // 4)
        self.layout: Layout = layout
        self.inner = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return g(h), shaped (N, 1, ...), or (N, L, 1), to broadcast over ``h``."""
        if self.layout == "NLC":
            return self.outer(self.activation(self.inner(h))).sigmoid()
        gate_B = self.outer(self.activation(self.inner(pooled(h, self.layout)))).sigmoid()
        for _ in self.layout[2:]:
            gate_B = gate_B.unsqueeze(-1)
        return gate_B
