"""Counting floating-point operations: once for each structure of the network, then by multiplication."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from morphogen.growth import flop_counter

_T = TypeVar("_T")


class FlopMeter:
    """Adds up the FLOPs of calls; a call whose ``key`` was seen before is assumed to cost the same again.

    :func:`morphogen.growth.flop_counter` sees matrix products, convolutions and attention, forward and backward; it changes
    no result.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.total = 0
        self._known: dict[Hashable, int] = {}

    def run(self, key: Hashable, call: Callable[[], _T], share: float = 1.0) -> _T:
        """Return ``call()`` and add ``share`` of its FLOPs to ``total``."""
        if key in self._known:
            result = call()
        else:
            with flop_counter() as counter:
                result = call()
            self._known[key] = round(counter.get_total_flops() * share)
        self.total += self._known[key]
        return result
