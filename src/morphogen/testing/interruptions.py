"""Ways to end a job at a chosen moment, for tests that it loses nothing by it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from morphogen.telemetry.events import Json


class At:
    """A sink that acts once, at the n-th record of a kind.

    Args:
        kind: Name of the event.
        number: Which, from 1.
        act: What to do; one of the functions below, for example.

    Example:
        >>> sink = At("Updated", 2, lambda: print("now"))
        >>> for _ in range(3):
        ...     sink.write({"event": "Updated"})
        now
    """

    def __init__(self, kind: str, number: int, act: Callable[[], object]) -> None:
        """Wait for it."""
        self._kind, self._left, self._act = kind, number, act

    def write(self, record: Mapping[str, Json]) -> None:
        """Count, and act when it is time."""
        if record["event"] == self._kind:
            self._left -= 1
            if self._left == 0:
                self._act()

    def close(self) -> None:
        """Hold nothing."""


class PowerCut(BaseException):
    """Ends the process as far as a job can tell: nothing in it catches this."""


def cut_power() -> None:
    """Raise a :class:`PowerCut`."""
    raise PowerCut


def interrupt() -> None:
    """Do as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """Send a SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)
