"""The bus makes each record once, drops a sink that fails, and never lets telemetry reach the run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import pytest

from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Event, Json


class Kept:
    """A sink that keeps its records, and fails from the ``fails_at``-th on."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.records: list[dict[str, Json]] = []
        self.num_writes = self.num_closes = 0
        self.fails_at, self.error = fails_at, error or OSError("disk full")

    def write(self, record: Mapping[str, Json]) -> None:
        self.num_writes += 1
        if self.fails_at is not None and self.num_writes >= self.fails_at:
            raise self.error
        self.records.append(dict(record))

    def close(self) -> None:
        self.num_closes += 1


class Stubborn(Kept):
    """A sink that cannot be closed."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("cannot close")


def test_a_record_has_context_and_seconds_since_the_bus_was_made() -> None:
    sink, seconds = Kept(), iter((100.0, 100.25, 101.5))
    bus = EventBus([sink], clock=lambda: next(seconds))
    bus.emit(Event(step=3), arm="grown")
    bus.emit(Event())
    assert sink.records == [
        {"event": "Event", "arm": "grown", "seconds": 0.25, "step": 3},
        {"event": "Event", "seconds": 1.5, "step": None},
    ]


def test_scoped_context_is_evaluated_at_each_event() -> None:
    sink, now = Kept(), {"train_step": 1}
    bus = EventBus([sink])
    emit = bus.scoped(lambda: now)
    emit(Event())
    now["train_step"] = 2
    emit(Event())
    assert [record["train_step"] for record in sink.records] == [1, 2]


def test_context_that_is_not_finite_is_text_as_in_events() -> None:
    sink = Kept()
    EventBus([sink]).emit(Event(), loss=float("nan"))
    assert sink.records[0]["loss"] == "nan"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("closed"), RuntimeError("worker died")])
def test_a_failing_sink_is_dropped_with_one_warning_and_the_others_go_on(error: Exception) -> None:
    bad, good = Kept(fails_at=2, error=error), Kept()
    bus = EventBus([bad, good])
    bus.emit(Event(step=1))
    assert bus.dropped == ()
    with pytest.warns(RuntimeWarning, match=f"Kept failed and gets no more records: .*{error}") as caught:
        for step in (2, 3, 4):
            bus.emit(Event(step=step))
    assert len(caught) == 1
    assert bus.dropped == ("Kept",)
    assert (len(bad.records), bad.num_writes, bad.num_closes) == (1, 2, 1)
    assert [record["step"] for record in good.records] == [1, 2, 3, 4]


def test_an_error_that_is_a_bug_is_not_hidden() -> None:
    bus = EventBus([Kept(fails_at=1, error=KeyError("bug"))])
    with pytest.raises(KeyError, match="bug"):
        bus.emit(Event())


def test_two_sinks_may_fail_at_the_same_event() -> None:
    bus = EventBus([Kept(fails_at=1), Stubborn(fails_at=1), Kept()])
    with pytest.warns(RuntimeWarning) as caught:
        bus.emit(Event())
    assert len(caught) == 2
    assert bus.dropped == ("Kept", "Stubborn")


def test_close_closes_each_sink_once_and_reports_one_that_cannot() -> None:
    good, bad = Kept(), Stubborn()
    bus = EventBus([bad, good])
    with pytest.warns(RuntimeWarning, match="Stubborn failed .* cannot close"):
        bus.close()
    bus.close()
    assert good.num_closes == 1
    assert bus.dropped == ("Stubborn",)


def test_after_close_events_are_discarded_without_a_warning() -> None:
    sink = Kept()
    bus = EventBus([sink])
    bus.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bus.emit(Event())
    assert sink.records == []


def test_a_copied_emitter_reports_to_the_same_bus() -> None:
    sink = Kept()
    bus = EventBus([sink])
    holder = {"bus": bus, "bound": bus.emit, "scoped": bus.scoped(lambda: {"arm": "grown"})}
    copied = copy.deepcopy(holder)
    assert copied["bus"] is bus
    copied["bound"](Event(step=1))
    copied["scoped"](Event(step=2))
    assert [record["step"] for record in sink.records] == [1, 2]
