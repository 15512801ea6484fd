"""What a detector is."""

from __future__ import annotations

from typing import Any, Protocol

from morphogen.governor.findings import Finding, Observation


class Detector(Protocol):
    """Looks at one observation in the light of what it remembers.

    ``inspect`` must not learn: ``accept`` is called afterwards with every observation in which no detector found anything,
    so statistics never learn from alarms. ``forget`` is called when a lasting change of level was accepted. The state is taken
    with every snapshot and given back by a rewind to it. See :func:`morphogen.testing.detectors.check_detector`.
    """

    name: str

    def inspect(self, observation: Observation) -> Finding | None:
        """Return what is wrong with ``observation``, or None."""
        ...

    def accept(self, observation: Observation) -> None:
        """Learn from a clean observation."""
        ...

    def forget(self) -> None:
        """Drop what was learned."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain data that JSON can hold; a copy, which later learning does not change."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        ...
