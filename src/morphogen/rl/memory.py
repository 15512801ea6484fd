"""Memory cores: LSTM and GRU for several towers, over whole sequences or one step at a time.

Shapes: C towers, L steps of a sequence, B rows (sequences or environments), D inputs, H width, S parts of the state
(LSTM: hidden and cell; GRU: hidden).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from morphogen.state import draw_from

MemoryKind = Literal["none", "lstm", "gru"]


class Memory(nn.Module):
    """One recurrent layer per tower.

    A sequence is one call per tower of ``nn.LSTM`` or ``nn.GRU``, which knows no episode ends: whoever calls cuts sequences
    there. A single step uses the cell alone, a third of the cost. Weights start orthogonal, and the forget gate of an LSTM
    with bias 1 (Jozefowicz et al. 2015, section 2.2), so that it remembers before it has learned to.

    Args:
        kind: "lstm" or "gru".
        towers: C.
        in_features: D.
        width: H.
        layer_norm: Normalise what goes in and what comes out (Ba et al. 2016), without learned scale.
        generator: Draws the weights.

    Example:
        >>> memory = Memory("lstm", 2, 4, 8, generator=torch.Generator())
        >>> out_CLBH, state_SCBH = memory(torch.zeros(2, 5, 3, 4), memory.initial_state(3))
        >>> out_CLBH.shape, state_SCBH.shape
        (torch.Size([2, 5, 3, 8]), torch.Size([2, 2, 3, 8]))
    """

    def __init__(
        self,
        kind: MemoryKind,
        towers: int,
        in_features: int,
        width: int,
        *,
        layer_norm: bool = False,
        generator: torch.Generator,
    ) -> None:
        """Draw the weights, tower by tower."""
        super().__init__()
        layer = nn.LSTM if kind == "lstm" else nn.GRU
        with draw_from(generator):  # it draws when it is built, whatever it is given afterwards
            self.layers = nn.ModuleList(layer(in_features, width) for _ in range(towers))
        for core in self.layers:
            _initialise(core, width, generator, forget_gate=kind == "lstm")
        self._parts = 2 if kind == "lstm" else 1
        self._width = width
        self._in_shape, self._out_shape = ((in_features,), (width,)) if layer_norm else (None, None)

    def initial_state(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the state before an episode, zeros [S, C, rows, H]."""
        return torch.zeros(self._parts, len(self.layers), rows, self._width, device=device)

    def forward(self, x_CLBD: Tensor, state_SCBH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs [C, L, B, H] and the state after the last step."""
        x_CLBD = _normalised(x_CLBD, self._in_shape)
        run = self._step if x_CLBD.shape[1] == 1 and not torch.is_grad_enabled() else self._sequence
        towers = [run(core, x_CLBD[tower], state_SCBH[:, tower]) for tower, core in enumerate(self.layers)]
        outputs, states = zip(*towers, strict=True)
        return _normalised(torch.stack(outputs), self._out_shape), torch.stack(states, dim=1)

    def _sequence(self, core: Any, x_LBD: Tensor, state_SBH: Tensor) -> tuple[Tensor, Tensor]:
        if self._parts == 1:
            out_LBH, hidden_1BH = core(x_LBD, state_SBH.contiguous())
            return out_LBH, hidden_1BH
        out_LBH, (hidden_1BH, cell_1BH) = core(x_LBD, (state_SBH[:1].contiguous(), state_SBH[1:].contiguous()))
        return out_LBH, torch.cat((hidden_1BH, cell_1BH))

    def _step(self, core: Any, x_LBD: Tensor, state_SBH: Tensor) -> tuple[Tensor, Tensor]:
        weights = (core.weight_ih_l0, core.weight_hh_l0, core.bias_ih_l0, core.bias_hh_l0)
        if self._parts == 1:
            hidden_BH = torch.gru_cell(x_LBD[0], state_SBH[0], *weights)
            return hidden_BH[None], hidden_BH[None]
        hidden_BH, cell_BH = torch.lstm_cell(x_LBD[0], (state_SBH[0], state_SBH[1]), *weights)
        return hidden_BH[None], torch.stack((hidden_BH, cell_BH))


def _initialise(core: Any, width: int, generator: torch.Generator, *, forget_gate: bool) -> None:
    for name, parameter in core.named_parameters():
        if name.startswith("weight"):
            nn.init.orthogonal_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    if forget_gate:
        with torch.no_grad():
            core.bias_ih_l0[width : 2 * width] = 1.0  # gates in the order input, forget, cell, output


def _normalised(x: Tensor, shape: tuple[int] | None) -> Tensor:
    return x if shape is None else nn.functional.layer_norm(x, shape)
