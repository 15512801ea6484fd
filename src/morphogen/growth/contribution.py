"""Contribution: what the metric loses when a slot is switched off, measured on the same data.

Legend: N samples of a batch; correct_N and the like hold one value per sample.
All ablations of a batch run in one forward pass: the batch is repeated once for the intact model and once for each slot, with
per-sample alpha. In eval mode samples do not see each other, so this equals separate passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from morphogen.growth.lifecycle import ACTING
from morphogen.growth.model import GrowableModel

PerSampleMetric = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> one value per sample, shape (N,); larger is better."""


@dataclasses.dataclass(frozen=True)
class Contribution:
    """Mean of the paired per-sample differences, and its standard error, in units of the metric."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True)
class ContributionResult:
    """The metric of the intact model, and each acting slot's contribution, on the same samples."""

    metric: float
    slots: dict[str, Contribution]


@torch.no_grad()
def measure_contributions(
    model: GrowableModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    metric: PerSampleMetric,
    slots: Sequence[str] | None = None,
) -> ContributionResult:
    """Return the metric and, for each slot, metric intact minus metric with the slot's alpha at 0.

    The model runs in eval mode and is put back into the mode of each of its parts. Nothing is recorded in the model: pass
    the values to ``record_contribution`` if a gate is to see them.

    Args:
        model: Its acting slots (blending, holding, fossilised) are measured.
        batches: (inputs, targets), on the model's device; at least one.
        metric: One value per sample.
        slots: Which slots; by default every acting one.

    Raises:
        SlotError: One of ``slots`` is unknown or not acting.
        ValueError: There is no batch, or ``metric`` does not return one value per sample.
    """
    if slots is None:
        measured = [name for name, stage in model.stages().items() if stage in ACTING]
    else:
        measured = list(slots)
        model.check_acting(measured)
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        values = [_ablated(model, inputs, targets, metric, measured) for inputs, targets in batches]
    finally:
        _set_modes(modes)
    if not values:
        raise ValueError("`batches` must hold at least one batch, got none. Pass the decision split.")
    values_KN = torch.cat(values, dim=1).double()
    differences_KN = values_KN[:1] - values_KN[1:]
    count = values_KN.shape[1]
    means = differences_KN.mean(1).tolist()
    errors = (differences_KN.std(1) / math.sqrt(count)).tolist() if measured and count > 1 else [math.inf] * len(measured)
    pairs = zip(measured, means, errors, strict=True)
    return ContributionResult(float(values_KN[0].mean()), {name: Contribution(mean, error) for name, mean, error in pairs})


def _ablated(model: GrowableModel, inputs: Tensor, targets: Tensor, metric: PerSampleMetric, slots: Sequence[str]) -> Tensor:
    """Return the metric per sample, shape (1 + K, N): intact first, then one row for each slot switched off."""
    copies, count = len(slots) + 1, inputs.shape[0]
    present = model.alphas()
    alphas = {name: inputs.new_full((copies * count,), present[name], dtype=torch.float32) for name in slots}
    for row, name in enumerate(slots, start=1):
        alphas[name][row * count : (row + 1) * count] = 0.0
    repeated = inputs.repeat(copies, *(1 for _ in range(inputs.ndim - 1)))
    outputs = model(repeated, alphas=alphas)
    values = metric(outputs, targets.repeat(copies, *(1 for _ in range(targets.ndim - 1))))
    if values.shape != (copies * count,):
        raise ValueError(
            f"`metric` must return one value per sample, shape ({copies * count},), got {tuple(values.shape)}. Do not average."
        )
    return values.reshape(copies, count)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
