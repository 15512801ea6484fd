"""What an engine is: where members live, and who runs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from morphogen.pbt.engines.hosting import Birth, Outcome, Succession
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.strategies import Strategy

Parcel = Any
"""Parameters on their way from one member to another, in whatever form an engine hands them over: only it looks inside."""


class Engine(Protocol):
    """Runs members. Which engine runs them changes no number.

    Orders to train are given by :meth:`submit` and come back through :meth:`next`; everything else is asked of members that
    are not training, and is answered before the call returns. What a member raises is returned as words: only what the engine
    itself cannot do is raised.

    Attributes:
        name: "inline", "processes", "ray".
        interruptible: Whether a member that does not come back can be ended.
    """

    name: str
    interruptible: bool

    def begin(self, births: Sequence[Birth]) -> dict[int, str]:
        """Make members, in place of those before; returns what went wrong by member, nothing for those that are there."""
        ...

    def check(self, optimizer: Strategy) -> None:
        """Check that members can do what a strategy asks for.

        Raises:
            ValueError: They cannot.
        """
        ...

    def submit(self, member: int, until: int, *, publish: Strategy | None = None) -> None:
        """Order a member to train; with ``publish``, to leave what that strategy needs where :meth:`read` finds it."""
        ...

    def next(self, timeout_seconds: float | None = None) -> Outcome | None:
        """Return what came of one of the orders; None if nothing came in time.

        A member whose process died comes back as an outcome with a problem.
        """
        ...

    def lost(self) -> set[int]:
        """Return members that are gone although nobody ended them, and have not begun again."""
        ...

    def read(self, member: int, optimizer: Strategy) -> Parcel | None:
        """Return what a strategy needs of a member, as of its last report; None if that is lost."""
        ...

    def values(self, member: int) -> Mapping[str, Any]:
        """Return all that travels of a member, moments included."""
        ...

    def take_over(self, succession: Succession, parcel: Parcel) -> str:
        """Let a member take over a parcel; returns what went wrong, "" if nothing."""
        ...

    def explore(self, member: int, hyperparameters: Hyperparameters) -> str:
        """Let a member use other values; returns what went wrong, "" if nothing."""
        ...

    def save(self, member: int, folder: str) -> tuple[str, int] | None:
        """Write all of a member into a file in ``folder``; returns its digest, which is its name, and its bytes.

        None if its process died meanwhile: the member is lost.

        Raises:
            MorphogenError: The disk refused, or the member's state is not data.
        """
        ...

    def end(self, members: Collection[int]) -> set[int]:
        """End members, whatever they are doing; returns those that were ended with them and have to begin again."""
        ...

    def close(self) -> None:
        """End everybody."""
        ...
