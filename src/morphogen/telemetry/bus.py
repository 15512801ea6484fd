"""The one place where events meet sinks: records are made once, and a failing sink never reaches the run.

Source: standard library only.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Self, final

from morphogen.telemetry.events import Emit, Event, Json, Sink, record_of, to_json

_SINK_FAILURES = (OSError, ValueError, RuntimeError)


@final
class EventBus:
    """Turns events into records and hands each record to every sink, in order.

    A sink whose ``write`` or ``close`` raises OSError, ValueError or RuntimeError is dropped with one warning and named
    in :attr:`dropped`; the others and the run go on. Copying a model must not copy its log: a deep copy of the bus is
    the bus itself.

    Example:
        >>> from morphogen.telemetry.jsonl import JsonlSink
        >>> bus = EventBus([JsonlSink("/dev/null")])
        >>> bus.emit(Event(step=3), arm="grown")
        >>> bus.close()
    """

    def __init__(self, sinks: Iterable[Sink], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock of the records.

        Args:
            sinks: Where the records go; the bus closes them.
            clock: Seconds from any origin, never going back.
        """
        self._sinks: tuple[Sink, ...] = tuple(sinks)
        self._dropped: tuple[str, ...] = ()
        self._clock = clock
        self._started_seconds = clock()

    @property
    def dropped(self) -> tuple[str, ...]:
        """The class names of the sinks that failed, in the order of failing: if any, the log is not complete."""
        return self._dropped

    def emit(self, event: Event, **context: Json) -> None:
        """Write ``event`` to every sink with ``context`` and ``seconds`` since the bus was made.

        After :meth:`close` there is nowhere to write to and the event is discarded, as a model may outlive its run.

        Args:
            event: What happened.
            context: What the emitter does not know (arm, repeat, train_step); a field of the event wins over it.
        """
        if not self._sinks:
            return
        seconds = round(self._clock() - self._started_seconds, 3)
        known = {name: to_json(value) for name, value in context.items()}
        record = record_of(event, **{**known, "seconds": seconds})
        for sink in self._sinks:
            self._attempt(sink, functools.partial(sink.write, record))

    def scoped(self, context: Callable[[], Mapping[str, Json]]) -> Emit:
        """Return an emit callable whose records also carry ``context()``, evaluated at each event.

        Example:
            >>> bus = EventBus([])
            >>> emit = bus.scoped(lambda: {"arm": "grown", "train_step": 7})
            >>> emit(Event(step=3))
        """

        def emit(event: Event) -> None:
            self.emit(event, **context())

        return emit

    def close(self) -> None:
        """Close every sink once; later calls do nothing."""
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            self._attempt(sink, sink.close)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the bus itself: emit callables live in models, and a copied model reports to the same log."""
        return self

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        try:
            action()
        except _SINK_FAILURES as error:
            self._drop(sink, error)

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks = tuple(kept for kept in self._sinks if kept is not sink)
        name = type(sink).__name__
        self._dropped = (*self._dropped, name)
        try:
            sink.close()
        except _SINK_FAILURES:
            pass  # It failed already, which the warning tells; closing is only a kindness to its file handles.
        warnings.warn(
            f"{name} failed and gets no more records: {type(error).__name__}: {error}. The run goes on; its log is not "
            "complete.",
            RuntimeWarning,
            stacklevel=2,
        )
