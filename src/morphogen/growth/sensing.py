"""Sensors of seeds: gradients against the host's, and finiteness. Always on, one transfer for all seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from morphogen.growth.gates import Reading, SlotSensors as SlotSensors
from morphogen.growth.lifecycle import LIVE
from morphogen.growth.slots import SeedSlot

_HOST = "host"


def sense_gradients(owners: Mapping[str, list[tuple[str, Parameter]]], slots: Mapping[str, SeedSlot], clock: int) -> None:
    """Write gradient norm, its ratio to the host's and finiteness of every live seed into its slot's sensors.

    Norms are divided by the square root of the number of elements, so that sizes compare. A seed without gradients keeps
    "not measured"; a host without gradients leaves the ratio not measured. Where the host's own gradient is not finite, the
    batch says nothing of a seed whose weights are: its readings stay as they were, and grow old.
    """
    live = [name for name, slot in slots.items() if slot.state.stage in LIVE]
    if not live:
        return
    gradients = {name: [p.grad for _, p in owners[name] if p.grad is not None] for name in (_HOST, *live)}
    norms = [_norm(gradients[name]) for name in (_HOST, *live)]
    norms += [_norm(p.detach() for _, p in owners[name]) for name in live]
    device = next((p.device for name in live for _, p in owners[name]), torch.device("cpu"))
    values = torch.stack([norm.to(device) for norm in norms]).tolist()
    host_norm, seed_norms, weight_norms = values[0], values[1 : len(live) + 1], values[len(live) + 1 :]
    host_scale = _per_element(host_norm, gradients[_HOST])
    for name, norm, weight_norm in zip(live, seed_norms, weight_norms, strict=True):
        if math.isfinite(weight_norm) and not math.isfinite(host_norm):
            continue
        scale = _per_element(norm, gradients[name])
        measured = scale is not None
        slots[name].sensors = dataclasses.replace(
            slots[name].sensors,
            finite=Reading(float(math.isfinite(norm) and math.isfinite(weight_norm)), clock),
            gradient_norm=Reading(scale, clock) if measured else None,
            gradient_ratio=Reading(scale / host_scale, clock) if measured and host_scale else None,
        )


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the length of all ``tensors`` as one vector, summed in at least single precision."""
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(())
    return get_total_norm([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors])


def _per_element(norm: float, gradients: list[Tensor]) -> float | None:
    count = sum(gradient.numel() for gradient in gradients)
    return norm / math.sqrt(count) if count else None
