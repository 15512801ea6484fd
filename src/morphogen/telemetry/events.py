"""Events and where they go: the one vocabulary between a run and whoever watches it.

An event is a frozen record owned by the package that emits it; this floor knows only that it is an :class:`Event`. Emitters
take an ``emit`` callable and never ask what is behind it, so telemetry cannot change a result.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at ``step`` of the emitter's own clock (None: before the first step)."""

    step: int | None = None


Emit: TypeAlias = Callable[[Event], None]


class Sink(Protocol):
    """Where records end up. ``write`` gets one flat JSON-able record at a time, in order; ``close`` is called once."""

    def write(self, record: Mapping[str, Json]) -> None:
        """Take one record; must not keep a reference that it changes."""
        ...

    def close(self) -> None:
        """Flush and release files."""
        ...


def discard(event: Event) -> None:
    """Drop ``event``: the default ``emit`` of every emitter."""


def record_of(event: Event, **context: Json) -> dict[str, Json]:
    """Return ``event`` as one JSON-able record: its class name under ``event``, then ``context``, then its fields.

    Enums become their lower-case names; tuples become lists; a non-finite float becomes its name as text ("nan", "inf",
    "-inf"), so that the record is strict JSON and "not measured" (None) stays apart from "measured as NaN".

    Example:
        >>> record_of(Event(step=3), arm="grown")
        {'event': 'Event', 'arm': 'grown', 'step': 3}
    """
    record: dict[str, Json] = {"event": type(event).__name__, **context}
    for field in dataclasses.fields(event):
        record[field.name] = to_json(getattr(event, field.name))
    return record


def to_json(value: object) -> Json:
    """Return ``value`` (dataclasses, enums, mappings, sequences, scalars) as strict JSON data; TypeError for the rest."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    raise TypeError(f"an event field must be JSON-able, got {type(value).__name__}. Convert it before emitting.")
