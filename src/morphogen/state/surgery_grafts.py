"""Optimizer surgery for parameters that grow: what was joined to them brings its moments along.

A graft is a parameter that is longer along one axis than its moments are: the new part was another parameter until now, times a
factor. Its moments are carried over by the chain rule (a gradient is divided by that factor, its square by the square). The
step count is the host's. So moments that began at zero are brought from the age of the part to that of the host,
``(1 - beta ** host_step) / (1 - beta ** part_step)``: what the optimizer makes of them stays what it was. Joined as they are,
the young second moments of Adam would make the next steps of the new part too long, up to 3.16 times at the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Adafactor, Optimizer, RMSprop

from morphogen.errors import StateMismatch
from morphogen.state import fitting, surgery

_POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "prev", "exp_inf"), -1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance"), -2),
    **{"ax": 1, "step_size": 1, "acc_delta": 2},
}
"""State keys of the parameter's shape -> power of the graft's scale by which they go with the parameter."""
_STARTS_AT_ZERO = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev"})
"""State keys that begin at zero where a part has no past; all others begin at the mean of the host's."""
_BETAS = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
"""State keys whose bias ``step`` corrects -> which of the group's betas averages them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Graft:
    """A parameter that grew.

    Attributes:
        parameter: In its new shape; its moments still have the old one.
        dim: The axis along which it grew; the new part is at the end.
        joined: The parameter that became the new part.
        scale: Factor > 0 by which the values of ``joined`` were multiplied.
    """

    parameter: Parameter
    dim: int
    joined: Parameter
    scale: float = 1.0


def grow_moments(optimizers: Iterable[Optimizer], grafts: Sequence[Graft]) -> dict[Parameter, str]:
    """Make the moments of parameters that grew as long as they are; step counts, groups and rates stay the host's.

    Call it after the parameters have grown and before what was joined leaves its optimizer. Tensors are replaced, not written
    to, so that ``surgery.remember`` can put the old ones back.

    Args:
        optimizers: All that may hold one of the parameters; their state is changed.
        grafts: What grew. Where ``joined`` has no moments of the same kind (it was frozen, or stepped by another kind of
            optimizer), its part starts from zero first moments and from the mean of the host's second moments.

    Returns:
        Parameters whose moments and step count were forgotten instead -> why: factored moments have no parts.

    Raises:
        StateMismatch: A parameter grew that LBFGS steps; nothing was changed.
        ValueError: A scale is not positive and finite; nothing was changed.

    Example:
        >>> weight, seed = Parameter(torch.ones(2, 3)), Parameter(torch.ones(1, 3))
        >>> optimizer = torch.optim.SGD([weight, seed], lr=0.1, momentum=0.9)
        >>> weight.grad, seed.grad = torch.full((2, 3), 1.0), torch.full((1, 3), 4.0)
        >>> optimizer.step()
        >>> weight.grad, weight.data = None, torch.cat([weight.data, 2.0 * seed.data])
        >>> grow_moments([optimizer], [Graft(weight, dim=0, joined=seed, scale=2.0)])
        {}
        >>> optimizer.state[weight]["momentum_buffer"][:, 0].tolist()
        [1.0, 1.0, 2.0]
    """
    homes = {parameter: optimizer for optimizer in optimizers for parameter in surgery.parameters_of(optimizer)}
    for graft in grafts:
        if not 0.0 < graft.scale < float("inf"):
            raise ValueError(f"`scale` must be positive and finite, got {graft.scale}. A part of nothing is no part.")
        if isinstance(homes.get(graft.parameter), LBFGS):
            raise StateMismatch("a parameter that LBFGS steps must not grow: its history is one flat vector over all of them.")
    reset: dict[Parameter, str] = {}
    for graft in grafts:
        home = homes.get(graft.parameter)
        if home is None or not home.state.get(graft.parameter):
            continue
        grown, reason = _grown_state(home, graft, homes.get(graft.joined))
        if reason:
            del home.state[graft.parameter]
            reset[graft.parameter] = reason
        else:
            home.state[graft.parameter].update(grown)
    return reset


def drop_misshapen(optimizer: Optimizer) -> dict[Parameter, str]:
    """Forget the moments and step of each parameter that changed its shape; return why, by parameter.

    A step on moments of another shape fails, and a fused one corrupts memory.
    """
    dropped: dict[Parameter, str] = {}
    for parameter in [parameter for parameter in optimizer.state if isinstance(parameter, Parameter)]:
        state = optimizer.state[parameter]
        problems = fitting.misshapen(type(optimizer), "parameter", state, parameter) or _misfactored(state, parameter)
        if problems:
            del optimizer.state[parameter]
            dropped[parameter] = problems[0]
    return dropped


def _misfactored(state: Mapping[str, Any], parameter: Parameter) -> list[str]:
    shape = tuple(parameter.shape)
    wanted = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
    return [
        f"moment `{key}` is {tuple(state[key].shape)}, the parameter {shape}"
        for key, expected in wanted.items()
        if isinstance(state.get(key), Tensor) and tuple(state[key].shape) != expected
    ]


def _grown_state(home: Optimizer, graft: Graft, other: Optimizer | None) -> tuple[dict[str, Tensor], str]:
    """Return the moments that are replaced, or why that cannot be."""
    state = home.state[graft.parameter]
    if isinstance(home, Adafactor) and "row_var" in state:
        return {}, "its second moment is factored into rows and columns, which have no parts"
    other = other if type(other) is type(home) else None
    theirs: Mapping[str, Any] = {} if other is None else other.state.get(graft.joined, {})
    ages = None if other is None or not theirs else _Ages(home, graft.parameter, other, graft.joined)
    old_shape = list(graft.parameter.shape)
    old_shape[graft.dim] -= graft.joined.shape[graft.dim]
    grown: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or list(value.shape) != old_shape:
            continue
        if key not in _POWERS:
            return {}, f"moment `{key}` of {type(home).__name__} is not known here"
        part = _part(home, graft, key, value, theirs.get(key))
        if ages is not None and key in _BETAS and isinstance(theirs.get(key), Tensor):
            part = part * ages.ratio(key).to(part.device)
        grown[key] = torch.empty_like(graft.parameter, dtype=value.dtype, requires_grad=False)
        grown[key].copy_(torch.cat([value, part.to(value)], graft.dim))
    return grown, ""


def _part(home: Optimizer, graft: Graft, key: str, host: Tensor, theirs: object) -> Tensor:
    if isinstance(theirs, Tensor) and theirs.shape == graft.joined.shape:
        # RMSprop's momentum averages gradients over their own size, which a factor does not change.
        power = 0 if key == "momentum_buffer" and isinstance(home, RMSprop) else _POWERS[key]
        return theirs * graft.scale**power
    if key == "ax":  # averaged values: of a part without a past, the values it has
        return graft.joined.detach() * graft.scale
    start = torch.zeros((), dtype=host.dtype, device=host.device) if key in _STARTS_AT_ZERO else host.mean()
    return start.expand(graft.joined.shape)


class _Ages:
    """Step counts and betas of a parameter and of what is joined to it."""

    def __init__(self, home: Optimizer, parameter: Parameter, other: Optimizer, joined: Parameter) -> None:
        pairs = ((home, parameter), (other, joined))
        self._betas: list[Any] = [_group_of(optimizer, member).get("betas") for optimizer, member in pairs]
        self._steps: list[Any] = [optimizer.state[member].get("step") for optimizer, member in pairs]

    def ratio(self, key: str) -> Tensor:
        """Return (1 - beta ** host_step) / (1 - beta ** part_step); 1 where no step corrects the bias."""
        if None in self._betas or any(step is None for step in self._steps):
            return torch.ones(())
        host, part = (
            1.0 - torch.as_tensor(betas[_BETAS[key]], dtype=torch.float64).cpu() ** torch.as_tensor(step).cpu().double()
            for betas, step in zip(self._betas, self._steps, strict=True)
        )
        return host / part


def _group_of(optimizer: Optimizer, parameter: Parameter) -> Mapping[str, Any]:
    return next(group for group in optimizer.param_groups if any(member is parameter for member in group["params"]))
