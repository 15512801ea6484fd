"""Counting floating-point operations: once for each structure of the network, then by multiplication."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from morphogen.growth import flop_counter

_T = TypeVar("_T")


class FlopMeter:
    """Adds up the FLOPs of calls; a call whose ``key`` was seen before is assumed to cost the same again.

    :func:`morphogen.growth.flop_counter` sees matrix products, convolutions and attention, forward and backward; it changes
    no result.

    Args:
        known: Counts of calls seen elsewhere, key -> FLOPs; shared, and added to. To count takes a hundred times as long as the
            call itself on a small network.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self, known: dict[Hashable, int] | None = None) -> None:
        """Start at zero."""
        self.total = 0
        self._known = {} if known is None else known

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

    def parts(self, keys: Mapping[str, Hashable], count: Callable[[], Mapping[str, int]]) -> dict[str, int]:
        """Return the FLOPs of each part, noted under its key; if one is not there, ``count()`` says what each costs.

        The total stays: parts are for costs that add up, which many structures share.
        """
        if not all(key in self._known for key in keys.values()):
            counted = count()
            self._known |= {key: counted[part] for part, key in keys.items()}
        return {part: self._known[key] for part, key in keys.items()}
