"""Hosts that keep keys and values between calls: a seed that looks at other positions must see all of them.

In a pass that goes on from a cache (``past_key_values`` of Hugging Face models), a submodule is given the new positions alone.
A seed that works at each position by itself does not notice. One that mixes positions would silently compute something else,
so such a pass is refused.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth.compiling import uncompiled
from morphogen.growth.features import Site
from morphogen.growth.operators import Seed
from morphogen.growth.slots import SeedSlot

_ARGUMENT = "past_key_values"


def guard_caches(host: nn.Module, slots: Mapping[str, SeedSlot]) -> None:
    """Let the outermost modules of ``host`` that take a cache refuse one for which a seed in ``slots`` is not fit."""
    guarded: list[str] = []
    for path, part in host.named_modules():
        inside = any(not outer or path == outer or path.startswith(f"{outer}.") for outer in guarded)
        if not inside and _takes_cache(part):
            guarded.append(path)
            part.register_forward_pre_hook(CacheGuard(slots).on_input, with_kwargs=True)


def _takes_cache(module: nn.Module) -> bool:
    try:
        return _ARGUMENT in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # scripted modules have no signature
        return False


class CacheGuard:
    """Forward pre-hook that looks for caches in the arguments."""

    def __init__(self, slots: Mapping[str, SeedSlot]) -> None:
        """Keep the slots, which are asked at each call."""
        self._slots = slots
        self._mixing: weakref.WeakKeyDictionary[Seed, bool] = weakref.WeakKeyDictionary()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise SlotError if the pass goes on from a cache while a seed acts that mixes positions."""
        caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
        if caches and any(slot.mix in ("blend", "full") for slot in self._slots.values()):
            self._check(caches)

    @uncompiled
    def _check(self, caches: Iterable[Any]) -> None:
        length = max(int(cache.get_seq_length()) for cache in caches)
        mixing = [name for name, slot in self._slots.items() if length and self._mixes(slot)]
        if mixing:
            raise SlotError(
                f"slots {', '.join(map(repr, mixing))} must see whole sequences, as their seeds mix positions, got a cache of "
                f"{length} positions. Call without a cache (`use_cache=False`), or sow blueprints that do not mix positions."
            )

    def _mixes(self, slot: SeedSlot) -> bool:
        if slot.seed is None or slot.mix not in ("blend", "full"):
            return False
        if slot.seed not in self._mixing:
            self._mixing[slot.seed] = mixes_positions(slot.seed, slot.site)
        return self._mixing[slot.seed]


def mixes_positions(seed: Seed, site: Site) -> bool:
    """Return whether what ``seed`` computes at a position of a sequence depends on other positions: found by trying.

    A copy with random weights computes a sequence at once and position by position; nothing of ``seed`` is touched.
    """
    if site.layout not in ("NLC", "NCL"):
        return False
    if seed.reads_input:  # between two Linear or two Conv1d of the host, whose channels are not the feature's
        return site.layout == "NCL"
    axis, length = site.layout.index("L"), 4
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(seed).to("cpu", torch.float32).eval()
    h = torch.randn((1, length, site.width) if axis == 1 else (1, site.width, length), generator=generator)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        whole: Tensor = twin(h)
        parts = torch.cat([twin(h.narrow(axis, position, 1)) for position in range(length)], axis)
    return not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
