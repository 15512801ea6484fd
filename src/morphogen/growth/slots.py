"""A slot: one growth point of a host, with the seed that may sit in it. A torch module that holds parameters and does maths."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from morphogen.growth.config import GrowthConfig
from morphogen.growth.features import Site
from morphogen.growth.gates import SlotSensors
from morphogen.growth.incubation import straight_through
from morphogen.growth.lifecycle import ACTING, SlotState, Stage
from morphogen.growth.operators import Seed

AlphaOverrides = Mapping[str, "float | Tensor"]
alpha_overrides: contextvars.ContextVar[AlphaOverrides | None] = contextvars.ContextVar("alpha_overrides", default=None)
"""Alpha of slots for the forward pass under way; set by ``GrowableModel.forward`` alone, so calls may nest and thread."""

Mix = Literal["off", "incubate", "blend", "full"]


class SeedSlot(nn.Module):
    """The state and the seed of one growth point; its hook on the host's submodule mixes the seed in.

    ``alpha`` is a 0-dim buffer that mirrors ``state.alpha``, so that a ramp moves a tensor and recompiles nothing. ``put``
    is the only way to change either.
    """

    alpha: Tensor

    def __init__(self, name: str, site: Site) -> None:
        """Start dormant."""
        super().__init__()
        self.name = name
        self.site = site
        self.state = SlotState()
        self.sensors = SlotSensors()
        self.seed: Seed | None = None
        self.incubation_ratio = GrowthConfig().incubation_ratio
        self.mix: Mix = "off"
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def put(self, state: SlotState, seed: Seed | None) -> None:
        """Take a state and the seed that belongs to it, both at once; a seed is frozen and thawed as its state says."""
        assert state.has_seed == (seed is not None), (state.stage, seed)
        was_frozen = self.state.frozen and seed is self.seed
        if seed is not None and state.frozen != was_frozen:
            seed.requires_grad_(not state.frozen)
        self.state, self.seed = state, seed
        self.mix = _mix_of(state)
        with torch.no_grad():
            self.alpha.fill_(state.alpha)

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Any:
        """Forward hook of the host's submodule; None leaves the host's own output, the same object, in place."""
        if self.mix == "off" or self.seed is None:
            return None
        feature = self.site.feature(output)
        override = self._override()
        if override is not None and self.mix != "incubate":
            grown = feature + self._residual(feature, args) * self._per_sample(override, feature)
        elif self.mix == "incubate":
            if not (self.training and torch.is_grad_enabled()):
                return None
            residual = self._residual(feature.detach(), args)
            grown = straight_through(feature, residual, self.incubation_ratio)
        elif self.mix == "full":
            grown = feature + self._residual(feature, args)
        else:
            grown = feature + self._residual(feature, args) * self.alpha
        return self.site.replaced(output, grown)

    def _override(self) -> float | Tensor | None:
        """Return alpha for this call alone; compiled code has none, as ``GrowableModel.forward`` runs such calls uncompiled."""
        if torch.compiler.is_compiling():
            return None
        overrides = alpha_overrides.get()
        return None if overrides is None else overrides.get(self.name)

    def _residual(self, feature: Tensor, args: tuple[Any, ...]) -> Tensor:
        assert self.seed is not None
        return self.seed(feature)

    def _per_sample(self, alpha: float | Tensor, output: Tensor) -> float | Tensor:
        """Return ``alpha`` shaped to multiply ``output``: a number or 0-dim tensor as it is, (N,) as (N, 1, ...)."""
        if not isinstance(alpha, Tensor) or alpha.ndim == 0:
            return alpha
        if alpha.shape != output.shape[:1]:
            raise ValueError(
                f"alpha of slot {self.name!r} must be a number or of shape ({output.shape[0]},), got {tuple(alpha.shape)}. "
                "Give one value for each sample."
            )
        return alpha.reshape(-1, *(1 for _ in output.shape[1:])).to(output.dtype)


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """Return the live table of ``module``'s forward hooks, in the order in which they run."""
    return module._forward_hooks  # pyright: ignore[reportPrivateUsage]


def _mix_of(state: SlotState) -> Mix:
    if state.stage is Stage.TRAINING:
        return "incubate"
    if state.stage in ACTING and state.alpha != 0.0:
        return "full" if state.alpha == 1.0 else "blend"
    return "off"
