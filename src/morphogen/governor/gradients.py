"""Gradients seen from outside: their global norm, nothing read; and the end of a step that gradient scalers will not see."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# What torch's own gradient clipping is made of; no public name gives all norms in one call.
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_HALF = (torch.float16, torch.bfloat16)


def gradient_norms(parameters: Iterable[Parameter], device: torch.device) -> Tensor | None:
    """Return the 2-norm of the gradient of each of ``parameters`` that has one, on ``device``; None if none has."""
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    return tensor_norms(dense, device) if dense else None


def tensor_norms(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the 2-norm of each tensor on ``device``, nothing read; those of half precision are summed in float32.

    A float16 sum overflows above 65504.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = collections.defaultdict(list)
    for tensor in tensors:
        groups[tensor.device, tensor.dtype].append(tensor.detach())
    norms = [
        torch.stack(_foreach_norm(group, 2, torch.float32) if dtype in _HALF else _foreach_norm(group))
        for (_, dtype), group in groups.items()
    ]
    return torch.cat([norm.to(device, _wide(device)) for norm in norms])


def total_norm(norms: Tensor) -> Tensor:
    """Return the 2-norm over several tensors from the norm of each."""
    return norms.norm()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def is_routine_overflow(loss: float, grad_norm: float | None, scalers: Mapping[str, Any]) -> bool:
    """Whether gradients overflowed only because a gradient scaler is still finding its scale, above 1."""
    if grad_norm is None or math.isfinite(grad_norm) or not math.isfinite(loss):
        return False
    return is_seeking_scale(scalers)


def is_seeking_scale(scalers: Mapping[str, Any]) -> bool:
    """Whether a gradient scaler is in use whose scale can still go down, so that overflows are to be expected."""
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
