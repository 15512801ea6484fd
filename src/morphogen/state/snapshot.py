"""A run at one instant, apart from the live run: buffers for tensors, plain data for everything else."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor

from morphogen.state import trees
from morphogen.state.inventory import all_finite, copy_all

Tables = dict[str, dict[str, Tensor]]
"""Section ("model", "optimizer", "extras.ema", ...) -> name -> tensor."""


@final
class Snapshot:
    """What :meth:`TrainingState.capture` returns. It shares no memory with the run and is never changed by a restore.

    Its buffers go back to the run that made it when the last reference to it is dropped, and the next capture fills
    them again: keep the snapshot, not tensors from inside it. :meth:`tensor` returns copies.
    """

    def __init__(
        self,
        tables: Tables,
        loose: trees.TensorTable,
        meta: Mapping[str, Any],
        ready: torch.cuda.Event | None = None,
    ) -> None:
        """Wrap filled buffers; ``ready`` fires when copies still under way on a device have arrived."""
        self._ready = ready
        self._tables = tables
        self._loose = loose
        self._meta = meta
        self._finite: bool | None = None

    @property
    def meta(self) -> Mapping[str, Any]:
        """Everything that is not a large tensor, as strict JSON data."""
        return self._meta

    @property
    def parts(self) -> frozenset[str]:
        """Which parts of a run are in here: "model", "optimizer", "scheduler", "scaler", "extras", "generators"."""
        return frozenset(name for name in PARTS if self._meta.get(name))

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the optimizers' groups and moments are in here (a ``v1_policy_only`` checkpoint has none)."""
        return "optimizer" in self.parts

    @property
    def num_bytes(self) -> int:
        """Bytes held by the buffers."""
        return sum(tensor.nbytes for _, _, tensor in self.named_tensors())

    def named_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (section, name, tensor) for every tensor, *aliasing* the buffers: read only."""
        if self._ready is not None:
            self._ready.synchronize()
        for section, table in self._tables.items():
            for name, tensor in table.items():
                yield section, name, tensor
        for name, tensor in self._loose.items():
            yield "loose", name, tensor

    def table(self, section: str) -> Mapping[str, Tensor]:
        """Return the buffers of ``section`` by name, aliased: read only, and only while the snapshot lives."""
        return self._tables.get(section, {})

    @property
    def loose(self) -> Mapping[str, Tensor]:
        """Small tensors inside plain data (generator states, normalisers), aliased: read only."""
        return self._loose

    def tensor(self, section: str, name: str) -> Tensor:
        """Return a copy of one tensor; KeyError if it is not there."""
        return self._tables[section][name].clone()

    def is_finite(self) -> bool:
        """Whether every floating tensor of every part is finite; computed where the buffers are, once."""
        if self._finite is None:
            self._finite = all_finite(tensor for section, _, tensor in self.named_tensors() if section != "loose")
        return self._finite

    def checksum(self) -> str:
        """Return the SHA-256 of all tensors with their names: equal before and after any number of restores, and in files."""
        digest = hashlib.sha256()
        for section, name, tensor in sorted(self.named_tensors(), key=lambda entry: entry[:2]):
            digest.update(f"{section}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


PARTS = ("model", "optimizer", "scheduler", "scaler", "extras", "generators")


class BufferPool:
    """Buffers of dropped snapshots, so that capturing in a loop allocates nothing after the first rounds.

    Args:
        pinned: Put buffers of device tensors into pinned host memory instead of device memory.
        max_free: Sets of buffers kept for reuse.
    """

    def __init__(self, *, pinned: bool = False, max_free: int = 2) -> None:
        """Start empty."""
        self._pinned = pinned
        self._max_free = max_free
        self._free: list[Tables] = []
        self._lock = threading.RLock()  # the garbage collector may give buffers back inside a `with` of this thread

    def without_reuse(self) -> BufferPool:
        """Return a pool that keeps nothing."""
        return BufferPool(pinned=self._pinned, max_free=0)

    def snapshot(self, live: Tables, loose: trees.TensorTable, meta: Mapping[str, Any]) -> Snapshot:
        """Return a snapshot whose buffers hold a copy of ``live``; nothing of an older snapshot is touched."""
        tables = self._filled(live)
        ready = None
        if self._pinned and torch.cuda.is_available():
            ready = torch.cuda.Event()
            ready.record()
        snapshot = Snapshot(tables, loose, meta, ready)
        weakref.finalize(snapshot, self._take_back, tables).atexit = False
        return snapshot

    def _filled(self, live: Tables) -> Tables:
        with self._lock:
            reused = self._free.pop() if self._free else {}
        tables: Tables = {}
        for section, table in live.items():
            old = reused.get(section, {})
            tables[section] = {name: self._buffer(tensor, old.get(name)) for name, tensor in table.items()}
        targets, sources = (chain.from_iterable(table.values() for table in side.values()) for side in (tables, live))
        copy_all(zip(targets, sources, strict=True), non_blocking=self._pinned)
        return tables

    def _buffer(self, tensor: Tensor, old: Tensor | None) -> Tensor:
        host = self._pinned and tensor.is_cuda
        if (
            old is None
            or old.shape != tensor.shape
            or old.dtype is not tensor.dtype
            or not (old.is_cpu if host or tensor.is_cpu else old.device == tensor.device)
        ):
            old = None
        elif old.stride() == tensor.stride():
            return old
        with torch.inference_mode(False):
            device = torch.device("cpu") if host else tensor.device
            fresh = torch.empty_like(tensor, device=device, requires_grad=False, pin_memory=host)
        # A tensor with gaps in its memory has a buffer without; memory that is never touched costs nothing.
        return old if old is not None and old.stride() == fresh.stride() else fresh

    def _take_back(self, tables: Tables) -> None:
        with self._lock:
            if len(self._free) < self._max_free:
                self._free.append(tables)
