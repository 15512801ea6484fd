"""Gradient-variance scaling: gradients are scaled down by one factor where they are noisy from one update to the next.

For every element two exponential averages of its *raw* gradient are kept, of the value and of its square. Their
bias-corrected forms ``m`` and ``v`` say which part of the element's power is signal, ``m**2 / v``, and which is temporal
noise, ``(v - m**2) / v``. The parts are averaged over all elements of all tensors, weighted by the element's root mean
square ``sqrt(v)``: that is free of scale, bounded in each element, and does not depend on how parameters are split into
tensors. An element without gradient weighs nothing.

Source: after the idea of variance-based gradient scaling in population-based reinforcement learning. Versions that average
over the elements of a tensor *before* taking the variance measure how gradients vary across a layer, not over time; here the
variance is over time alone, so a constant gradient, however varied across elements, gives exactly 1.

Shapes: P elements of all tensors together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, final

import torch
from pydantic import Field
from torch import Tensor

from morphogen.config import Config
from morphogen.errors import StateMismatch

_foreach_mul_ = torch._foreach_mul_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

_ROUNDING = 1e-4  # noise below this part of the power is float32's own: averages of equal numbers differ by about 1e-5
_TINY = 1e-30


class GradientVarianceConfig(Config):
    """How gradients are scaled by their temporal noise.

    ``factor = min_factor + (1 - min_factor) / (1 + alpha * noise / signal)``, with ``noise + signal = 1`` the parts of the
    gradient's power.

    Attributes:
        alpha: Strength: at ``noise / signal = 1 / alpha`` the factor is half-way to ``min_factor``; > 0.
        beta: Decay of the averages per update, in [0.5, 0.999]; they reach back about ``1 / (1 - beta)`` updates.
        warmup_steps: Updates before which the factor is 1, >= 2: one gradient has no variance.
        min_factor: Factor of a gradient that is noise alone, in [0, 1).
    """

    alpha: float = Field(default=0.1, gt=0)
    beta: float = Field(default=0.99, ge=0.5, le=0.999)
    warmup_steps: int = Field(default=20, ge=2)
    min_factor: float = Field(default=0.1, ge=0, lt=1)


@final
class GradientVarianceScaling:
    """Running statistics of named gradients, and the factor that follows from them.

    One optimizer step is: backward, ``update(grads)``, ``scale_(grads)``, clip, step. Statistics are float32, on the device
    of the parameters; nothing waits for the device.

    An optimizer that divides by its own running root mean square (Adam) undoes a factor that is constant, so what acts there
    is how the factor *changes*, and that gradients are scaled before they are clipped.

    Args:
        config: The settings; assign ``config`` to change them. They do not travel with the state.
        named_parameters: Name and parameter (or a tensor of its shape), in the order in which gradients are given.

    Example:
        >>> scaling = GradientVarianceScaling(GradientVarianceConfig(warmup_steps=2), {"w": torch.zeros(2)})
        >>> for sign in (1.0, -1.0, 1.0):
        ...     grads = [torch.tensor([sign, 5.0])]
        ...     scaling.update(grads)
        >>> factor = scaling.scale_(grads)
        >>> bool(factor < 1.0), bool((grads[0] == factor * torch.tensor([1.0, 5.0])).all())
        (True, True)
    """

    def __init__(self, config: GradientVarianceConfig, named_parameters: Mapping[str, Tensor]) -> None:
        if not named_parameters:
            raise ValueError(
                "`named_parameters` must name at least one parameter, got none. Pass dict(model.named_parameters())."
            )
        self.config = config
        self._shapes = {name: parameter.shape for name, parameter in named_parameters.items()}
        self._sizes = [parameter.numel() for parameter in named_parameters.values()]
        device = next(iter(named_parameters.values())).device
        self._mean_P = torch.zeros(sum(self._sizes), device=device)
        self._square_P = torch.zeros_like(self._mean_P)
        self._weight, self._one = torch.zeros((), device=device), torch.ones((), device=device)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], ok: Tensor | None = None) -> None:
        """Take in the raw gradients of one update, before anything scales or clips them.

        Args:
            grads: One gradient per parameter, in order; not changed.
            ok: Bool of shape []; False leaves the statistics bit for bit as they are. Gradients that are not finite, or whose
                squares are not, never enter, whatever ``ok`` says.

        Raises:
            ValueError: The gradients do not match the parameters' sizes; nothing is changed then.
        """
        if [grad.numel() for grad in grads] != self._sizes:
            raise ValueError(
                f"`grads` must hold {len(self._sizes)} gradients of the parameters' sizes, got {len(grads)}. Pass one for each "
                "parameter, in order; zeros where there is none."
            )
        grad_P = torch.cat([grad.reshape(-1) for grad in grads]).float()
        enters = torch.dot(grad_P, grad_P).isfinite()
        if ok is not None:
            enters = enters & ok
        share = enters * (1.0 - self.config.beta)  # an average that moves by 0 times something finite does not move
        grad_P.masked_fill_(~enters, 0.0)
        self._weight.lerp_(self._one, share)
        self._mean_P.lerp_(grad_P, share)
        self._square_P.lerp_(grad_P.square_(), share)

    def factor(self) -> Tensor:
        """Return the factor that follows from the statistics: float32 of shape [], in [min_factor, 1], 1 in the warm-up."""
        alpha, beta, floor = self.config.alpha, self.config.beta, self.config.min_factor
        inverse_rms_P = (self._square_P + _TINY).rsqrt_()
        power = torch.dot(self._square_P, inverse_rms_P) + _TINY
        squared_mean = torch.dot(self._mean_P.square(), inverse_rms_P) + _TINY
        # (1 - m**2 / v) / (1 - w), with m = mean / weight, v = square / weight, and w the variance of m for pure noise of
        # variance 1, simplified: the square of an average over few gradients is not 0 though its expectation is.
        noise = (self._weight - squared_mean / power) / (self._weight - (1.0 - beta)) * ((1.0 + beta) / 2.0)
        noise = ((noise - _ROUNDING) / (1.0 - _ROUNDING)).clamp(0.0, 1.0)
        factor = floor + (1.0 - floor) * (1.0 - noise) / (1.0 - (1.0 - alpha) * noise)
        return torch.where(self._weight > 1.0 - beta ** (self.config.warmup_steps - 0.5), factor, 1.0)

    @torch.no_grad()
    def scale_(self, grads: Sequence[Tensor]) -> Tensor:
        """Multiply ``grads`` in place by :meth:`factor` and return it; :meth:`update` must have seen them before."""
        factor = self.factor()
        _foreach_mul_(list(grads), factor)
        return factor

    def reset(self) -> None:
        """Forget all statistics."""
        for statistic in (self._mean_P, self._square_P, self._weight):
            statistic.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return ``weight`` of shape [] (1 less the decay so far) and ``mean`` and ``square`` by parameter name, all copies."""
        return {"weight": self._weight.clone(), "mean": self._named(self._mean_P), "square": self._named(self._square_P)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy in what :meth:`state_dict` returned; the config stays this object's own.

        Raises:
            StateMismatch: Names, shapes or values do not fit, each listed; nothing is changed.
        """
        names = ("weight", "mean", "square")
        problems = [f"`{name}` is missing" for name in names if name not in state]
        problems += [f"`{name}` is unknown" for name in state if name not in names]
        if not problems:
            problems = _weight_misfits(state["weight"])
            problems += [line for kind in names[1:] for line in _misfits(kind, state[kind], self._shapes)]
        if problems:
            raise StateMismatch("the gradient statistics do not fit this model; nothing was changed.", tuple(problems))
        for kind, live_P in (("mean", self._mean_P), ("square", self._square_P)):
            saved = cast("Mapping[str, Tensor]", state[kind])
            live_P.copy_(torch.cat([saved[name].reshape(-1).to(live_P) for name in self._shapes]))
        self._weight.copy_(torch.as_tensor(state["weight"]))

    def _named(self, statistic_P: Tensor) -> dict[str, Tensor]:
        pieces = statistic_P.split(self._sizes)
        return {name: piece.view(shape).clone() for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}


def _weight_misfits(weight: Any) -> list[str]:
    return [] if 0.0 <= float(weight) <= 1.0 else [f"`weight` is {float(weight)}, expected a number in [0, 1]"]


def _misfits(kind: str, saved: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    problems = [f"`{kind}` lacks `{name}`" for name in shapes if name not in saved]
    problems += [f"`{kind}` has `{name}`, which is not in the model" for name in saved if name not in shapes]
    for name, value in ((name, saved[name]) for name in shapes if name in saved):
        if value.shape != shapes[name]:
            problems.append(f"`{kind}` of `{name}` is {tuple(value.shape)}, the parameter {tuple(shapes[name])}")
        elif not bool(value.isfinite().all()) or (kind == "square" and bool((value < 0).any())):
            problems.append(f"`{kind}` of `{name}` holds numbers that no statistic has (NaN, infinity or a negative square)")
    return problems
