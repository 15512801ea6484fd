"""A slot: one growth point of a host, with the seed that may sit in it. A torch module that holds parameters and does maths."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from morphogen.growth.config import GrowthConfig, Incubator
from morphogen.growth.features import Site
from morphogen.growth.gates import SlotSensors
from morphogen.growth.incubation import finite_or_left_out, straight_through
from morphogen.growth.lifecycle import ACTING, SlotState, Stage
from morphogen.growth.operators import Seed

AlphaOverrides = Mapping[str, "float | Tensor"]
alpha_overrides: contextvars.ContextVar[AlphaOverrides | None] = contextvars.ContextVar("alpha_overrides", default=None)
"""Alpha of slots for the forward pass under way; set by ``GrowableModel.forward`` alone, so calls may nest and thread."""

Mix = Literal["off", "incubate", "shadow", "blend", "full"]


class SeedSlot(nn.Module):
    """The state and the seed of one growth point; its hook on the host's submodule mixes the seed in.

    ``alpha`` is a 0-dim buffer that mirrors ``state.alpha``, so that a ramp moves a tensor and recompiles nothing. ``put``
    is the only way to change either. ``mix`` is what the hook does; with "shadow" it does nothing but in a shadow pass.
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
        self.mix: Mix = "off"
        self.in_shadow_pass = False
        self.configure(GrowthConfig())
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def configure(self, config: GrowthConfig) -> None:
        """Incubate as ``config`` says, from the next pass on."""
        self.incubator: Incubator = config.incubator
        self.incubation_ratio = config.incubation_ratio
        self.mix = _mix_of(self.state, self.incubator)

    def put(self, state: SlotState, seed: Seed | None) -> None:
        """Take a state and the seed that belongs to it, both at once; a seed is frozen and thawed as its state says."""
        assert state.has_seed == (seed is not None), (state.stage, seed)
        was_frozen = self.state.frozen and seed is self.seed
        if seed is not None and state.frozen != was_frozen:
            seed.requires_grad_(not state.frozen)
        self.state, self.seed = state, seed
        self.mix = _mix_of(state, self.incubator)
        with torch.no_grad():
            self.alpha.fill_(state.alpha)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the seed; alpha moves along, but is never rounded to half precision nor left unwritten by ``to_empty``."""
        super()._apply(fn, recurse)
        self.alpha = torch.full_like(self.alpha, self.state.alpha, dtype=torch.promote_types(self.alpha.dtype, torch.float32))
        return self

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Any:
        """Forward hook of the host's submodule; None leaves the host's own output, the same object, in place."""
        if self.mix == "off" or self.seed is None or not self._takes_part():
            return None
        feature = self.site.feature(output, self.name)
        if self.mix == "incubate":
            grown = straight_through(feature, self._residual(feature.detach(), args), self.incubation_ratio)
        elif self.mix == "shadow":
            grown = feature + finite_or_left_out(self._residual(feature.detach(), args)) * self.state.alpha_target
        else:
            grown = self._blended(feature, args)
        return self.site.replaced(output, grown)

    def _takes_part(self) -> bool:
        """Return whether the seed is computed in this pass; one that acts always is."""
        if self.mix == "incubate":
            return self.training and torch.is_grad_enabled()
        return self.mix != "shadow" or self.in_shadow_pass

    def _blended(self, feature: Tensor, args: tuple[Any, ...]) -> Tensor:
        override = self._override()
        residual = self._residual(feature, args)
        if override is not None:
            return feature + (residual * self._per_sample(override, feature)).to(feature.dtype)
        return feature + (residual if self.mix == "full" else residual * self.alpha)

    def _override(self) -> float | Tensor | None:
        """Return alpha for this call alone; compiled code has none, as ``GrowableModel.forward`` runs such calls uncompiled."""
        if torch.compiler.is_compiling():
            return None
        overrides = alpha_overrides.get()
        return None if overrides is None else overrides.get(self.name)

    def _residual(self, feature: Tensor, args: tuple[Any, ...]) -> Tensor:
        assert self.seed is not None
        if not self.seed.reads_input:
            return self.seed(feature)
        source = self.site.source(args)
        return self.seed(feature, source.detach() if self.mix in ("incubate", "shadow") else source)

    def _per_sample(self, alpha: float | Tensor, output: Tensor) -> float | Tensor:
        """Return ``alpha`` shaped to multiply ``output``: a number or 0-dim tensor as it is, (N,) as (N, 1, ...)."""
        if not isinstance(alpha, Tensor) or alpha.ndim == 0:
            return alpha
        if alpha.shape != output.shape[:1]:
            raise ValueError(
                f"alpha of slot {self.name!r} must be a number or of shape ({output.shape[0]},), got {tuple(alpha.shape)}. "
                "Give one value for each sample."
            )
        return alpha.reshape(-1, *(1 for _ in output.shape[1:]))


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """Return the live table of ``module``'s forward hooks, in the order in which they run."""
    return module._forward_hooks  # pyright: ignore[reportPrivateUsage]


def _mix_of(state: SlotState, incubator: Incubator) -> Mix:
    if state.stage is Stage.TRAINING:
        return "shadow" if incubator == "shadow" else "incubate"
    if state.stage in ACTING and state.alpha != 0.0:
        at_rest = state.stage is not Stage.BLENDING  # so that the end of a ramp compiles nothing
        return "full" if state.alpha == 1.0 and at_rest else "blend"
    return "off"
