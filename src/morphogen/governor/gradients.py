"""Gradients seen from outside: their global norm, nothing read; and the end of a step that gradient scalers will not see."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from morphogen.state import surgery

# What torch's own gradient clipping is made of; no public name gives all norms in one call.
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_HALF = (torch.float16, torch.bfloat16)


def gradient_norm(optimizers: Iterable[Optimizer], device: torch.device) -> Tensor | None:
    """Return the 2-norm over all gradients of all parameters of ``optimizers``, float64 on ``device``; None if there are none.

    Norms of half-precision gradients are summed in float32: a float16 sum overflows above 65504.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = collections.defaultdict(list)
    for optimizer in optimizers:
        for parameter in surgery.parameters_of(optimizer):
            if parameter.grad is not None:
                gradient = parameter.grad.detach()
                gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
                groups[gradient.device, gradient.dtype].append(gradient)
    if not groups:
        return None
    norms = [
        torch.stack(_foreach_norm(group, 2, torch.float32) if dtype in _HALF else _foreach_norm(group))
        for (_, dtype), group in groups.items()
    ]
    return torch.cat([norm.to(device, torch.float64) for norm in norms]).norm()


def is_routine_overflow(loss: float, grad_norm: float | None, scalers: Mapping[str, Any]) -> bool:
    """Whether gradients overflowed only because a gradient scaler is still finding its scale, above 1."""
    if grad_norm is None or math.isfinite(grad_norm) or not math.isfinite(loss):
        return False
    return any(scaler.get_scale() > 1.0 for scaler in _used(scalers))


def end_skipped_step(scalers: Mapping[str, Any], overflowed: bool) -> None:
    """Do for gradient scalers what ``update`` would have done after a step that was skipped: a lower scale if it overflowed."""
    for scaler in _used(scalers):
        if overflowed:
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        elif scaler._per_optimizer_states:  # it unscaled gradients, and would refuse to do so again before an update
            scaler.update()


def _used(scalers: Mapping[str, Any]) -> list[Any]:
    kinds = (scaler for scaler in scalers.values() if isinstance(scaler, torch.amp.GradScaler))
    return [scaler for scaler in kinds if scaler.is_enabled() and scaler._scale is not None]  # pyright: ignore[reportPrivateUsage]
