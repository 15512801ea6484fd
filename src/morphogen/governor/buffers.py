"""Buffers that a forward pass changes: how much it changed them, and putting them back when its step is not taken."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from morphogen.governor.gradients import tensor_norms
from morphogen.governor.structure import same_objects
from morphogen.state.inventory import copy_all

# What torch's own optimizers are made of; no public name does the same in one call.
_foreach_sub = torch._foreach_sub  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class BufferCopies:
    """Copies of the small buffers of some modules (running statistics) as they were before and after a forward pass.

    Version counters cannot tell which buffers changed: batch normalisation writes its statistics without moving them.
    """

    def __init__(self, modules: Iterable[nn.Module], max_size: int) -> None:
        """Copy every buffer of ``modules`` with up to ``max_size`` values."""
        self._modules = tuple(modules)
        self._max_size = max_size
        self._found: list[Tensor | None] = []
        self._live: list[Tensor] = []
        self._now: list[Tensor] = []
        self._before: list[Tensor] = []
        self._measured: list[int] = []
        self.look()

    def look(self) -> None:
        """Copy the buffers once more. Call once a step, after the forward pass."""
        found = _buffers_of(self._modules)
        if not (same_objects(found, self._found) and all(map(_are_alike, self._live, self._now))):
            self._follow(found)
        self._now, self._before = self._before, self._now
        copy_all(zip(self._now, self._live, strict=True))

    def _follow(self, found: list[Tensor | None]) -> None:
        """Keep copies of ``found``; what is still alike keeps those it has."""
        known = {id(live): copies for live, *copies in zip(self._live, self._now, self._before, strict=True)}
        usable = {id(buffer): buffer for buffer in found if buffer is not None and self._is_usable(buffer)}
        self._found, self._live, self._now, self._before = found, [*usable.values()], [], []
        for live in self._live:
            now, before = known.get(id(live), (None, None))
            if now is None or before is None or not _are_alike(live, now):
                now, before = live.detach().clone(), live.detach().clone()
            self._now.append(now)
            self._before.append(before)
        self._measured = [
            index
            for index, live in enumerate(self._live)
            if live.is_floating_point() and bool(torch.isfinite(self._now[index]).all())
        ]

    def put_back(self) -> None:
        """Undo what was written between the latest two looks."""
        copy_all(zip(self._live, self._before, strict=True))
        copy_all(zip(self._now, self._before, strict=True))

    def largest_change(self, device: torch.device) -> Tensor | None:
        """Return max over buffers of |now - before| / |before| between the latest two looks, on ``device``, nothing read.

        None if there are no floating buffers; one that was not finite when first seen is left out.
        """
        if not self._measured:
            return None
        before, now = ([copies[index] for index in self._measured] for copies in (self._before, self._now))
        moved, sizes = tensor_norms(_foreach_sub(now, before), device), tensor_norms(before, device)
        return (moved / sizes.masked_fill(sizes == 0.0, torch.inf)).amax()  # NaN stays NaN

    def _is_usable(self, buffer: Tensor) -> bool:
        plain = buffer.layout is torch.strided and not buffer.is_inference() and not buffer.is_meta
        return plain and 0 < buffer.numel() <= self._max_size


def _buffers_of(modules: Iterable[nn.Module]) -> list[Tensor | None]:
    """Return the buffers of ``modules`` and all below them; many times faster than ``Module.buffers``, which names them."""
    found: list[Tensor | None] = []
    parts = [*modules]
    for part in parts:  # grows meanwhile
        found += part.__dict__["_buffers"].values()
        parts += filter(None, part.__dict__["_modules"].values())
    return found


def _are_alike(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape, type and place."""
    return left.shape == right.shape and left.dtype is right.dtype and left.device == right.device
