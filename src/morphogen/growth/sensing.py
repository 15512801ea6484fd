"""Sensors of seeds: gradients against the host's, and finiteness. Always on, one transfer for all seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from morphogen.growth.gates import Reading, SlotSensors as SlotSensors
from morphogen.growth.lifecycle import LIVE
from morphogen.growth.slots import SeedSlot

_HOST = "host"


def sense_gradients(
    owners: Mapping[str, list[tuple[str, Parameter]]], slots: Mapping[str, SeedSlot], clock: int
) -> None:
    """Write gradient norm, its ratio to the host's and finiteness of every live seed into its slot's sensors.

    Norms are divided by the square root of the number of elements, so that sizes compare. A seed without gradients keeps
    "not measured"; a host without gradients leaves the ratio not measured.
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
        scale = _per_element(norm, gradients[name])
        measured = scale is not None
        slots[name].sensors = dataclasses.replace(
            slots[name].sensors,
            finite=Reading(float(math.isfinite(norm) and math.isfinite(weight_norm)), clock),
            gradient_norm=Reading(scale, clock) if measured else None,
            gradient_ratio=Reading(scale / host_scale, clock) if measured and host_scale else None,
        )


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).norm()


def _per_element(norm: float, gradients: list[Tensor]) -> float | None:
    count = sum(gradient.numel() for gradient in gradients)
    return norm / math.sqrt(count) if count else None
