"""Sensors of seeds: gradients against the host's, and finiteness. Always on, one transfer for all seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from morphogen.growth.distributed import Processes
from morphogen.growth.gates import Reading, SlotSensors as SlotSensors
from morphogen.growth.lifecycle import LIVE
from morphogen.growth.points import HOST
from morphogen.growth.slots import SeedSlot

# What torch's own gradient clipping is made of; no public name gives all norms in one call.
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def sense_gradients(
    owners: Mapping[str, list[tuple[str, Parameter]]],
    slots: Mapping[str, SeedSlot],
    clock: int,
    processes: Processes,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Write gradient norm, its ratio to the host's and finiteness of every live seed into its slot's sensors.

    Norms are divided by the square root of the number of elements, so that sizes compare, and by the scale of a gradient
    scaler that is still in them. A seed without gradients keeps "not measured"; a host without gradients leaves the ratio not
    measured. Where the host's own gradient is not finite, or a gradient scaler will find a lower scale, the batch says nothing
    of a seed whose weights are: its readings stay as they were, and grow old.

    Args:
        owners: Owner -> its parameters.
        slots: Name -> slot, changed in place.
        clock: When this is.
        processes: Readings are means over them.
        scaler: Scaler of the loss, or None if the gradients are unscaled.

    Raises:
        ValueError: ``scaler`` has stepped already.
    """
    live = [name for name, slot in slots.items() if slot.state.stage in LIVE]
    if not live:
        return
    scale, seeking = _scale_of(scaler)
    gradients = [[p.grad for _, p in owners[name] if p.grad is not None] for name in (HOST, *live)]
    values = _norms([*gradients, *([p.detach() for _, p in owners[name]] for name in live)])
    told = [number for norm, found in zip(values, gradients, strict=False) for number in _per_element(norm / scale, found)]
    means = processes.mean("sense", told + values[len(gradients) :])
    shares = zip(means[: len(told) : 2], means[1 : len(told) : 2], strict=True)
    host, *seeds = [size / share if share else None for size, share in shares]
    host_is_finite = host is None or math.isfinite(host)
    for name, size, weights in zip(live, seeds, means[len(told) :], strict=True):
        finite, sound = size is None or math.isfinite(size), math.isfinite(weights)
        if sound and not (host_is_finite and (finite or not seeking)):
            continue
        slots[name].sensors = dataclasses.replace(
            slots[name].sensors,
            finite=Reading(float(finite and sound), clock),
            gradient_norm=None if size is None else Reading(size, clock),
            gradient_ratio=Reading(size / host, clock) if size is not None and host else None,
        )


def _scale_of(scaler: torch.amp.GradScaler | None) -> tuple[float, bool]:
    """Return the scale that is in the gradients now, and whether it can still go down."""
    if scaler is None or not scaler.is_enabled():
        return 1.0, False
    scale = scaler.get_scale()
    stages = [state["stage"] for state in scaler._per_optimizer_states.values()]  # pyright: ignore[reportPrivateUsage]
    if OptState.STEPPED in stages:
        raise ValueError("`scaler` must not have stepped yet, got one that has. Call `sense` between backward and step.")
    return (1.0 if OptState.UNSCALED in stages else scale), scale > 1.0


def _norms(groups: Sequence[Sequence[Tensor]]) -> list[float]:
    """Return the length of the tensors of each group as one vector, summed in at least single precision; one transfer."""
    tensors = [tensor for group in groups for tensor in group]
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1 and tensors[0].dtype is torch.float32:
        norms = torch.stack(_foreach_norm(tensors)).split([len(group) for group in groups])
        return torch.stack([torch.linalg.vector_norm(norm) for norm in norms]).tolist()
    wide = ([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in group] for group in groups)
    totals = [get_total_norm(group) if group else torch.zeros(()) for group in wide]
    device = tensors[-1].device if tensors else torch.device("cpu")
    return torch.stack([total.to(device) for total in totals]).tolist()


def _per_element(norm: float, gradients: list[Tensor]) -> tuple[float, float]:
    """Return (norm over the square root of the number of elements, 1), or zeros where there is no gradient."""
    count = sum(gradient.numel() for gradient in gradients)
    return (norm / math.sqrt(count), 1.0) if count else (0.0, 0.0)
