"""Contribution: what the metric loses when a slot is switched off, measured on the same data.

Legend: K slots, N samples; values_RN holds the metric of each sample, row 0 intact, row k with slot k switched off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from morphogen.growth.ablation import (
    Batch as Batch,
    Contribution as Contribution,
    PerSampleMetric as PerSampleMetric,
    ablated_values,
    measured_slots,
)
from morphogen.growth.model import GrowableModel


@dataclasses.dataclass(frozen=True)
class ContributionResult:
    """The metric of the intact model, and each acting slot's contribution, on the same samples."""

    metric: float
    slots: dict[str, Contribution]


def measure_contributions(
    model: GrowableModel,
    batches: Iterable[Batch],
    metric: PerSampleMetric,
    slots: Sequence[str] | None = None,
    *,
    memory_budget_bytes: int | None = None,
) -> ContributionResult:
    """Return the metric and, for each slot, metric intact minus metric with the slot's alpha at 0.

    All ablations of a batch run in one forward pass, as many as memory allows, and equal separate ones. Errors are those of
    paired differences. The model is left as it was: modes, buffers, global generators; it runs in eval mode. Nothing is
    recorded in it: pass the values to ``record_contribution`` if a gate is to see them.

    Args:
        model: Its acting slots (blending, holding, fossilised) are measured.
        batches: (inputs, targets), on the model's device; at least one. Inputs are a tensor, a tuple of arguments or a dict
            of keyword arguments; every tensor in them whose first axis is as long as that of the targets is taken to hold one
            entry per sample. Targets are a tensor of any shape with the batch first.
        metric: (outputs, targets) -> one value per sample, shape (N,); larger is better.
        slots: Which slots; by default every acting one.
        memory_budget_bytes: What one pass may allocate: batches and their copies are spread over as many passes as that takes.
            The need of a sample is measured on the first one, as the peak of all tensors alive at a time, scratch memory
            inside kernels and the model itself left out. By default a pass holds up to 16 copies of a batch.

    Raises:
        SlotError: One of ``slots`` is unknown or not acting.
        ValueError: There is no sample, inputs and targets do not agree on their number, ``metric`` does not return one value
            per sample, or not even one sample fits the budget.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = GrowableModel(host, points={"early": "1"}, example_input=torch.zeros(2, 4))
        >>> batches = [(torch.ones(6, 4), torch.zeros(6, dtype=torch.long))]
        >>> correct = lambda outputs, targets: (outputs.argmax(1) == targets).double()
        >>> measure_contributions(model, batches, correct).slots
        {}
    """
    measured = measured_slots(model, slots)
    rows = [frozenset[str](), *(frozenset([name]) for name in measured)]
    values_RN = ablated_values(model, batches, metric, rows, memory_budget_bytes)
    differences_KN = values_RN[:1] - values_RN[1:]
    count = differences_KN.shape[1]
    means = differences_KN.mean(1).tolist()
    errors = (differences_KN.std(1) / math.sqrt(count)).tolist() if measured and count > 1 else [math.inf] * len(measured)
    pairs = zip(measured, means, errors, strict=True)
    return ContributionResult(float(values_RN[0].mean()), {name: Contribution(mean, error) for name, mean, error in pairs})
