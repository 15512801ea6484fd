"""Ablation: the metric of every sample under many settings of "which slots are switched off", in few forward passes.

Legend: N samples of a batch, R rows: one row for each set of slots that is switched off; values_RN holds one metric each.
The batch is repeated once for each row, with per-sample alpha. In eval mode samples do not see each other, so this equals
separate passes, however the copies are spread over passes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from morphogen.growth.lifecycle import ACTING
from morphogen.growth.model import GrowableModel
from morphogen.growth.probing import Example, example_call, undisturbed, untouched
from morphogen.state import draw_from

PerSampleMetric = Callable[[Any, Tensor], Tensor]
"""(outputs, targets) -> one value per sample, shape (N,); larger is better."""
Batch = tuple[Example, Tensor]
"""(inputs, targets): a tensor, a tuple of arguments or a dict of keyword arguments, and a tensor; the batch axis first."""

MAX_COPIES = 16
"""Copies of a batch in one pass where no memory budget is given."""


@dataclasses.dataclass(frozen=True)
class Contribution:
    """A mean of paired per-sample differences of the metric, in units of the metric.

    Attributes:
        value: The mean.
        error: Its standard error; infinite for a single sample, which does not tell.
    """

    value: float
    error: float


def measured_slots(model: GrowableModel, slots: Sequence[str] | None) -> list[str]:
    """Return ``slots``, by default every acting one, each once.

    Raises:
        SlotError: One of ``slots`` is unknown or not acting.
        ValueError: One of ``slots`` is named twice.
    """
    if slots is None:
        return [name for name, stage in model.stages().items() if stage in ACTING]
    model.check_acting(slots)
    if len(set(slots)) < len(slots):
        raise ValueError(f"`slots` must name each slot once, got {list(slots)}. Drop the repetition.")
    return list(slots)


def ablated_values(
    model: GrowableModel,
    batches: Iterable[Batch],
    metric: PerSampleMetric,
    rows: Sequence[frozenset[str]],
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Return values_RN in float64: the metric of each sample of all ``batches`` with the slots of each row at alpha 0.

    The model runs in eval mode and is left as it was: modes, buffers, global generators.

    Args:
        model: Its slots that no row names act as they do now.
        batches: At least one sample, on the model's device.
        metric: One value per sample.
        rows: Slots that are switched off, in each row.
        memory_budget_bytes: What one pass may allocate at its peak, see :func:`peak_bytes`; by default, passes hold up to
            ``MAX_COPIES`` copies of a batch.

    Raises:
        ValueError: There is no sample, inputs and targets do not agree on their number, ``metric`` does not return one value
            per sample, or the budget is too small for one.
    """
    if memory_budget_bytes is not None and memory_budget_bytes < 1:
        raise ValueError(f"`memory_budget_bytes` must be >= 1, got {memory_budget_bytes}. Leave it out for no limit.")
    values: list[Tensor] = []
    limit: int | None = None
    stream = torch.Generator().manual_seed(0)
    with undisturbed(model, stream) as run:
        for batch in _drawn(batches, stream):
            if not _num_samples(batch):
                continue
            if memory_budget_bytes is not None and limit is None:
                limit = _samples_within(memory_budget_bytes, peak_bytes(model, batch, metric, rows[-1]))
            values.append(run(partial(_values_of, model, batch, metric, rows, limit)))
    if not values:
        raise ValueError("`batches` must hold at least one batch with samples, got none. Pass the decision split.")
    return _joined(values, dim=1)


def evaluated(
    model: GrowableModel, batches: Iterable[Batch], metric: PerSampleMetric, rows: Sequence[frozenset[str]]
) -> Tensor:
    """Return values_RN as :func:`ablated_values` does, without its safeguards: for a model in eval mode that nobody else needs.

    What a pass writes to buffers stays, and what it draws is drawn from the global generators.
    """
    with torch.no_grad():
        return _joined([_values_of(model, batch, metric, rows, None) for batch in batches], dim=1)


def peak_bytes(model: GrowableModel, batch: Batch, metric: PerSampleMetric, off: frozenset[str]) -> int:
    """Return what one sample of ``batch`` takes at the peak of a pass: measured on the first sample.

    Counted are the tensors that operations return, while they live: copies of inputs and targets, activations, outputs, what
    the metric makes. Not counted are the model, and scratch memory inside a kernel. What does not grow with the batch is
    counted for each sample, so that a pass takes rather less than a budget.
    """
    sample = _samples(batch, 0, 1)
    given = (leaf for leaf in pytree.tree_leaves(sample) if isinstance(leaf, Tensor))
    with untouched(model), _LiveBytes((*model.parameters(), *model.buffers(), *given)) as live:
        _pass(model, sample, metric, [off])
    return max(1, live.peak)


def _drawn(batches: Iterable[Batch], stream: torch.Generator) -> Iterator[Batch]:
    """Yield ``batches``; if making them is random, it draws from ``stream``."""
    if isinstance(batches, Sequence):  # they are made
        yield from batches
        return
    iterator = iter(batches)
    while True:
        with draw_from(stream):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _num_samples(batch: Batch) -> int:
    """Return how many samples the targets are for, checked against the inputs."""
    inputs, targets = batch
    if not targets.ndim:
        raise ValueError("targets must have the batch as first axis, got a number. Give one target per sample.")
    count = targets.shape[0]
    if not any(_is_batched(leaf, count) for leaf in pytree.tree_leaves(example_call(inputs))):
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        raise ValueError(
            f"inputs must have the batch as first axis, of {count} samples as the targets, got shapes {shapes}. "
            "Give both the batch first."
        )
    return count


def _is_batched(leaf: object, count: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count


def _samples_within(budget: int, bytes_per_sample: int) -> int:
    if budget < bytes_per_sample:
        raise ValueError(
            f"`memory_budget_bytes` must be >= {bytes_per_sample}, which one sample takes, got {budget}. Allow more."
        )
    return budget // bytes_per_sample


def _values_of(
    model: GrowableModel, batch: Batch, metric: PerSampleMetric, rows: Sequence[frozenset[str]], limit: int | None
) -> Tensor:
    """Return values_RN of one batch, over as many passes as ``limit`` samples in each of them need."""
    count = batch[1].shape[0]
    samples = count if limit is None else min(limit, count)
    copies = MAX_COPIES if limit is None else limit // samples
    columns: list[Tensor] = []
    for start in range(0, count, samples):
        part = _samples(batch, start, start + samples)
        passes = [_pass(model, part, metric, rows[row : row + copies]) for row in range(0, len(rows), copies)]
        columns.append(_joined(passes))
    return _joined(columns, dim=1)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _pass(model: GrowableModel, batch: Batch, metric: PerSampleMetric, rows: Sequence[frozenset[str]]) -> Tensor:
    """Return values_RN from one forward pass over a copy of the batch for each row."""
    inputs, targets = batch
    copies, count = len(rows), targets.shape[0]
    args, kwargs = _repeated(example_call(inputs), count, copies)
    outputs = model(*args, **kwargs, alphas=_alphas(model, rows, count))
    values = metric(outputs, _repeated(targets, count, copies))
    if values.shape != (copies * count,):
        raise ValueError(
            f"`metric` must return one value per sample, shape ({copies * count},), got {tuple(values.shape)}. Do not average."
        )
    return values.double().reshape(copies, count)


def _alphas(model: GrowableModel, rows: Sequence[frozenset[str]], count: int) -> dict[str, Tensor]:
    """Return alpha per sample of each slot that some row switches off; the slot's own tensor, so that it rounds alike."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in sorted(row)):
        alpha_RN = model.slot(name).alpha.repeat(len(rows), count)
        for row, off in enumerate(rows):
            if name in off:
                alpha_RN[row] = 0.0
        found[name] = alpha_RN.flatten()
    return found


def _repeated(tree: Any, count: int, copies: int) -> Any:
    if copies == 1:
        return tree

    def repeated(leaf: Tensor) -> Tensor:
        return leaf.repeat(copies, *(1 for _ in leaf.shape[1:])) if _is_batched(leaf, count) else leaf

    return pytree.tree_map_only(Tensor, repeated, tree)


def _samples(batch: Batch, start: int, stop: int) -> Batch:
    """Return a part of the batch; no copy."""
    inputs, targets = batch
    count = targets.shape[0]
    if (start, stop) == (0, count):
        return batch

    def part(leaf: Tensor) -> Tensor:
        return leaf[start:stop] if _is_batched(leaf, count) else leaf

    return pytree.tree_map_only(Tensor, part, inputs), targets[start:stop]


@final
class _LiveBytes(TorchDispatchMode):
    """Follows the memory of the tensors that operations return, while it lives; that of ``present`` does not count."""

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note what is new in its result."""
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def _free(self, size: int) -> None:
        self._bytes -= size
