"""A slot: one growth point of a host, with the seed that may sit in it. A torch module that holds parameters and does maths."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from morphogen.growth.gates import SlotSensors
from morphogen.growth.incubation import straight_through
from morphogen.growth.layouts import Layout
from morphogen.growth.lifecycle import SlotState, Stage
from morphogen.growth.operators import Seed

AlphaOverrides = Mapping[str, "float | Tensor"]
alpha_overrides: contextvars.ContextVar[AlphaOverrides | None] = contextvars.ContextVar("alpha_overrides", default=None)
"""Alpha of slots for the forward pass under way; set by ``GrowableModel.forward`` alone, so calls may nest and thread."""

Mix = Literal["off", "incubate", "blend", "full"]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a slot is attached: the submodule's path, and the feature there."""

    path: str
    layout: Layout
    width: int


class SeedSlot(nn.Module):
    """The state and the seed of one growth point; its hook on the host's submodule mixes the seed in.

    ``alpha`` is a 0-dim buffer that mirrors ``state.alpha``, so that a ramp moves a tensor and recompiles nothing. ``put``
    is the only way to change either.
    """

    alpha: Tensor

    def __init__(self, name: str, site: Site, incubation_ratio: float) -> None:
        """Start dormant."""
        super().__init__()
        self.name = name
        self.site = site
        self.state = SlotState()
        self.sensors = SlotSensors()
        self.seed: Seed | None = None
        self._incubation_ratio = incubation_ratio
        self.mix: Mix = "off"
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def put(self, state: SlotState, seed: Seed | None) -> None:
        """Take a state and the seed that belongs to it, both at once."""
        assert state.has_seed == (seed is not None), (state.stage, seed)
        self.state, self.seed = state, seed
        self.mix = _mix_of(state)
        with torch.no_grad():
            self.alpha.fill_(state.alpha)

    def on_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of the host's submodule; None leaves the host's own tensor, the same object, in place."""
        overrides = alpha_overrides.get()
        if overrides is not None and self.name in overrides and self.mix in ("blend", "full"):
            return self._mixed(output, _broadcast(overrides[self.name], output))
        if self.mix == "off" or self.seed is None:
            return None
        if self.mix == "incubate":
            if not (self.training and torch.is_grad_enabled()):
                return None
            feature = output.detach()
            return straight_through(output, self.seed(feature), self._incubation_ratio)
        if self.mix == "full":
            return output + self.seed(output)
        return self._mixed(output, self.alpha)

    def _mixed(self, output: Tensor, alpha: float | Tensor) -> Tensor:
        assert self.seed is not None
        residual = self.seed(output)
        weight = alpha.to(residual.dtype) if isinstance(alpha, Tensor) else alpha
        return output + residual * weight


def _mix_of(state: SlotState) -> Mix:
    if state.stage is Stage.TRAINING:
        return "incubate"
    if state.stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED) and state.alpha != 0.0:
        return "full" if state.alpha == 1.0 else "blend"
    return "off"


def _broadcast(alpha: float | Tensor, output: Tensor) -> float | Tensor:
    """Return ``alpha`` shaped to multiply ``output``: a number or 0-dim tensor as it is, (N,) as (N, 1, ...)."""
    if not isinstance(alpha, Tensor) or alpha.ndim == 0:
        return alpha
    return alpha.reshape(-1, *(1 for _ in range(output.ndim - 1)))
