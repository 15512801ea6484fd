"""Members in this process, in turn."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from morphogen.errors import MorphogenError
from morphogen.pbt.engines.hosting import Birth, Members, Outcome, Succession, one_thread
from morphogen.pbt.member import Factory
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.snapshots import write_snapshot
from morphogen.pbt.strategies import Strategy


class InlineEngine:
    """See :class:`~morphogen.pbt.engines.base.Engine`. Parameters are handed over as they are, in memory.

    Args:
        factory: Makes members.
        metric: Name of the score in what they return.
    """

    name = "inline"
    interruptible = False

    def __init__(self, factory: Factory, metric: str) -> None:
        """Hold nobody."""
        self._members = Members(factory, metric)
        self._orders: collections.deque[tuple[int, int]] = collections.deque()

    def begin(self, births: Sequence[Birth]) -> dict[int, str]:
        """Make members."""
        with one_thread():
            problems = {birth.member: self._members.begin(birth) for birth in births}
        return {member: problem for member, problem in problems.items() if problem}

    def check(self, optimizer: Strategy) -> None:
        """Check that members can do what a strategy asks for."""
        self._members.check(optimizer)

    def submit(self, member: int, until: int, *, publish: Strategy | None = None) -> None:
        """Put the order behind those before; nothing needs to be published, as nobody trains meanwhile."""
        self._orders.append((member, until))

    def next(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Carry out the oldest order."""
        if not self._orders:
            return None
        with one_thread():
            return self._members.train(*self._orders.popleft())

    def lost(self) -> set[int]:
        """Nobody is."""
        return set()

    def read(self, member: int, optimizer: Strategy) -> Any:
        """Return the parameters."""
        return self._members.read(member, optimizer)

    def values(self, member: int) -> Mapping[str, Any]:
        """Return the parameters, moments included."""
        found = self._members.read(member, "copy")
        if found is None:
            raise MorphogenError(f"member {member}: its parameters cannot be read; the log says why. Repair `get_parameters`.")
        return found

    def take_over(self, succession: Succession, parcel: Any) -> str:
        """Hand them over."""
        with one_thread():
            return self._members.take_over(succession, parcel)

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        """Let a member use other values."""
        return self._members.explore(member, hyperparameters)

    def save(self, member: int, folder: str) -> tuple[str, int]:
        """Write all of a member."""
        return write_snapshot(self._members.save(member), folder)

    def end(self, members: Collection[int]) -> set[int]:
        """Let go of members."""
        for member in members:
            self._members.end(member)
        return set()

    def close(self) -> None:
        """Let go of everybody."""
        self._members.close()
