"""The timeline keeps what matters of a run of any length, in little room, and survives a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import NamedTuple

import pytest
from hypothesis import given, strategies as st

from morphogen.governor import Finding, LevelShiftAccepted, Rollback, StepSkipped
from morphogen.governor.events import Collapsed, PartQuarantined, Warned
from morphogen.governor.report.timeline import Bucket, History, Timeline, merged
from morphogen.telemetry.events import Event

FINDING = Finding(detector="explosion", message="loss 9 exceeds 4", value=9.0, threshold=4.0, window_steps=128)
BAD = Finding(detector="non_finite", message="loss is nan", value=math.nan, non_finite=True)

LOSSES = st.lists(
    st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(min_value=-10, max_value=10)), min_size=1, max_size=200
)
GAPS = st.lists(st.integers(min_value=1, max_value=40), min_size=200, max_size=200)


class Kept(NamedTuple):
    """A generation of the ring, its snapshot aside."""

    observed: int
    step: int
    good: bool


def rollback(from_step: int, to_step: int, *findings: Finding, count: int = 1) -> Rollback:
    return Rollback(
        step=from_step,
        reason=findings[0].message,
        findings=findings,
        from_step=from_step,
        to_step=to_step,
        parts=("model", "optimizer"),
        optimizer_strategy="restore",
        learning_rate_factor=0.5,
        penalty=10.0,
        count=count,
    )


def eventful() -> Timeline:
    """Every kind of entry, NaN and infinity among the losses."""
    timeline = Timeline(max_buckets=4)
    timeline.record_generations(0, [Kept(0, 0, True)])
    for observed, loss in enumerate((3.0, math.nan, 2.0, math.inf, 1.0, 5.0, 0.5, math.nan), start=1):
        timeline.record_loss(observed, observed + 10, loss)
    timeline.record_generations(5, [Kept(0, 0, True), Kept(5, 15, False)])
    timeline.record(6, StepSkipped(step=16, reason=FINDING.message, findings=(FINDING,)))
    timeline.record(7, rollback(17, 0, BAD, FINDING))
    timeline.record_generations(7, [Kept(0, 0, True)])
    timeline.record(7, LevelShiftAccepted(step=17, findings=(FINDING,)))
    timeline.record(7, PartQuarantined(step=17, owner="slot early", findings=(BAD,), penalty=1.0))
    timeline.record(7, Warned(step=17, findings=(FINDING,)))
    timeline.record(7, Collapsed(step=17, reason=BAD.message, findings=(BAD,), to_step=0, rewinds=4))
    return timeline


def comparable(history: History) -> str:
    """NaN differs from itself, so what is compared is how everything is written."""
    return repr(history)


# The curve


@given(losses=LOSSES, gaps=GAPS, max_buckets=st.integers(min_value=4, max_value=20))
def test_the_curve_keeps_extremes_ends_and_order_in_bounded_room(
    losses: list[float], gaps: list[int], max_buckets: int
) -> None:
    timeline, observed = Timeline(max_buckets=max_buckets), 0
    for loss, gap in zip(losses, gaps, strict=False):
        observed += gap
        timeline.record_loss(observed, observed * 2, loss)
    history = timeline.history()
    curve, finite = history.curve, [loss for loss in losses if math.isfinite(loss)]
    assert len(curve) <= max_buckets
    assert [bucket.observed for bucket in curve] == sorted({bucket.observed for bucket in curve})
    assert (curve[0].observed, curve[-1].observed, history.observed) == (gaps[0], observed, observed)
    assert all(bucket.step == 2 * bucket.observed for bucket in curve)
    assert sum(bucket.non_finite for bucket in curve) == history.non_finite == len(losses) - len(finite)
    assert curve[0].last == losses[0] or not math.isfinite(losses[0])
    measured = [bucket for bucket in curve if bucket.is_measured]
    assert bool(measured) == bool(finite)
    if finite:
        assert min(bucket.low for bucket in measured) == min(finite)
        assert max(bucket.high for bucket in measured) == max(finite)
        assert measured[-1].last == finite[-1]
        assert all(bucket.low <= bucket.last <= bucket.high for bucket in measured)


@given(losses=LOSSES, max_buckets=st.integers(min_value=4, max_value=20))
def test_buckets_are_stretches_of_one_width_after_the_first_loss(losses: list[float], max_buckets: int) -> None:
    timeline = Timeline(max_buckets=max_buckets)
    for observed, loss in enumerate(losses, start=1):
        timeline.record_loss(observed, observed, loss)
    ends = [bucket.observed for bucket in timeline.history().curve]
    width = 1
    while 1 + math.ceil((len(losses) - 1) / width) > max_buckets:
        width *= 2
    assert ends == [1, *range(1 + width, len(losses), width), *([len(losses)] if len(losses) > 1 else [])]


def test_a_spike_among_a_million_losses_is_still_there() -> None:
    timeline = Timeline(max_buckets=100)
    for observed in range(1, 100_001):
        timeline.record_loss(observed, observed, 1e6 if observed == 77_777 else 1.0)
    spikes = [bucket for bucket in timeline.history().curve if bucket.high > 1]
    assert [(bucket.low, bucket.high) for bucket in spikes] == [(1.0, 1e6)]
    assert 77_777 <= spikes[0].observed < 77_777 + 2_048


def test_steps_may_go_back_and_observations_may_not() -> None:
    timeline = Timeline()
    for observed, step in ((1, 10), (2, 11), (3, 5)):
        timeline.record_loss(observed, step, 1.0)
    assert [bucket.step for bucket in timeline.history().curve] == [10, 11, 5]
    with pytest.raises(ValueError, match="`observed` must be above 3, got 3"):
        timeline.record_loss(3, 6, 1.0)


def test_merging_passes_over_what_was_not_finite() -> None:
    empty = Bucket(2, 2, math.inf, -math.inf, math.nan, 3)
    whole = merged(Bucket(1, 1, 0.5, 2.0, 1.0, 0), empty)
    assert whole == Bucket(2, 2, 0.5, 2.0, 1.0, 3)
    assert not empty.is_measured
    assert not merged(empty, empty).is_measured


# Entries


def test_each_event_is_kept_with_its_findings_and_the_outcome() -> None:
    history = eventful().history()
    assert [(entry.step, entry.outcome, entry.finding.detector) for entry in history.findings.latest] == [
        (16, "skipped", "explosion"),
        (17, "rewound", "non_finite"),
        (17, "rewound", "explosion"),
        (17, "accepted", "explosion"),
        (17, "part taken out", "non_finite"),
        (17, "warned", "explosion"),
        (17, "collapsed", "non_finite"),
    ]
    assert [(entry.observed, entry.step, entry.reason) for entry in history.skips.latest] == [(6, 16, "loss 9 exceeds 4")]
    assert [(entry.kind, entry.reason) for entry in history.notes.latest] == [
        ("level", "loss 9 exceeds 4"),
        ("quarantine", "slot early: loss is nan"),
    ]
    assert history.collapse is not None
    assert (history.collapse.to_step, history.collapse.rewinds) == (0, 4)


def test_a_rewind_knows_where_on_the_curve_its_snapshot_was_taken() -> None:
    timeline = Timeline()
    timeline.record_generations(0, [Kept(0, 7, True)])
    timeline.record_generations(4, [Kept(0, 7, True), Kept(4, 7, False)])  # the same step, on probation
    timeline.record(9, rollback(12, 7, BAD))
    timeline.record(9, rollback(12, 8, BAD))
    assert [entry.to_observed for entry in timeline.history().rewinds.latest] == [0, None]


def test_snapshots_are_taken_promoted_and_dropped() -> None:
    timeline = Timeline()
    timeline.record_generations(0, [Kept(0, 0, True)])
    timeline.record_generations(25, [Kept(0, 0, True), Kept(25, 24, False)])
    timeline.record_generations(75, [Kept(0, 0, True), Kept(25, 24, True)])
    timeline.record_generations(80, [Kept(25, 24, True), Kept(76, 75, False)])
    snapshots = timeline.history().snapshots
    assert [(entry.step, entry.observed, entry.promoted, entry.dropped) for entry in snapshots.latest] == [
        (0, 0, 0, 80),
        (24, 25, 75, None),
        (75, 76, None, None),
    ]


def test_only_the_latest_entries_are_kept_and_all_are_counted() -> None:
    timeline = Timeline(max_entries=3)
    for observed in range(1, 11):
        timeline.record(observed, StepSkipped(step=observed, reason="x" * 5_000, findings=(FINDING,)))
        timeline.record_generations(observed, [Kept(0, 0, True), Kept(observed, observed, False)])
    history = timeline.history()
    assert [entry.step for entry in history.skips.latest] == [8, 9, 10]
    assert (history.skips.count, history.skips.num_dropped, history.findings.count) == (10, 7, 10)
    assert len(history.skips.latest[0].reason) == 1_000
    assert history.snapshots.count == 11
    assert [entry.observed for entry in history.snapshots.latest] == [0, 9, 10], "those there are stay, however old"


def test_other_events_are_refused() -> None:
    with pytest.raises(TypeError, match="event of the governor, got Event"):
        Timeline().record(1, Event(step=1))


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="`max_buckets` must be at least 4, got 3"):
        Timeline(max_buckets=3)
    with pytest.raises(ValueError, match="`max_entries` must be at least 1, got 0"):
        Timeline(max_entries=0)


# State


def test_the_state_is_strict_json_and_gives_everything_back() -> None:
    timeline = eventful()
    written = json.dumps(timeline.state_dict(), allow_nan=False)
    loaded = Timeline(max_buckets=4)
    loaded.load_state_dict(json.loads(written))
    assert comparable(loaded.history()) == comparable(timeline.history())
    assert json.dumps(loaded.state_dict(), allow_nan=False) == written


@given(losses=LOSSES, cut=st.integers(min_value=0, max_value=200))
def test_a_loaded_timeline_goes_on_as_if_nothing_had_happened(losses: list[float], cut: int) -> None:
    whole, part = Timeline(max_buckets=8), Timeline(max_buckets=8)
    for observed, loss in enumerate(losses, start=1):
        whole.record_loss(observed, observed, loss)
        if observed == cut:
            state = json.loads(json.dumps(part.state_dict()))
            part = Timeline(max_buckets=8)
            part.load_state_dict(state)
        part.record_loss(observed, observed, loss)
    assert comparable(part.history()) == comparable(whole.history())


@pytest.mark.parametrize("damage", [{"curve": [[1, 2]]}, {"counts": {}}, {"findings": {"latest": [{"step": 1}]}}])
def test_a_damaged_state_changes_nothing(damage: dict[str, object]) -> None:
    timeline = Timeline()
    timeline.record_loss(1, 1, 2.0)
    before = comparable(timeline.history())
    with pytest.raises((KeyError, TypeError, ValueError)):
        timeline.load_state_dict({**eventful().state_dict(), **damage})
    assert comparable(timeline.history()) == before


def test_a_history_does_not_change_when_the_timeline_goes_on() -> None:
    timeline = eventful()
    history = timeline.history()
    before = comparable(history)
    timeline.record_loss(99, 99, 7.0)
    timeline.record(99, Warned(step=99, findings=(FINDING,)))
    assert comparable(history) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.observed = 3  # pyright: ignore[reportAttributeAccessIssue]
