"""The picture in a governor's report: the loss over observations as SVG, and below it what happened, a lane for each kind.

Rewinds are arcs above the curve, from where they happened back to where their snapshot was taken. Each kind has a shape of
its own beside its colour, and a lane with its name.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from morphogen.governor.report.timeline import Bucket, History, NoteEntry, RewindEntry, SnapshotEntry, merged
from morphogen.governor.report.words import number_text, plain
from morphogen.telemetry.markup import Markup, Point, Scale, join, nice_ticks, tag

_WIDTH, _LEFT, _RIGHT = 840, 96, 750
_PLOT_HEIGHT, _LANE_HEIGHT, _ARC_HEIGHT = 250, 21, 44
_MAX_POINTS = 600
_MARK_GAP, _NUMBER_GAP = 9, 26
_LARGEST = 1e300  # beyond it, and below its inverse, ticks would overflow

ItemT = TypeVar("ItemT")

_SHAPES = {
    "finding": "M0 -5.5L5.5 4.5H-5.5Z",
    "skipped": "M-4 -4L4 4M4 -4L-4 4",
    "non-finite": "M0 -6V1.5M0 4.5V6.5",
    "level": "M-5 -2.5H5M-5 2.5H5",
    "quarantine": "M-5 -5H5V5H-5ZM-5 -5L5 5",
    "taken": "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",
    "promoted": "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",
    "rewind": "M0 -6L6 0L0 6L-6 0Z",
}


@dataclasses.dataclass(frozen=True)
class Axis:
    """How losses become heights: the values at the two ends, the ticks, and whether it is logarithmic.

    ``is_cut``: single losses lie beyond ``high``.
    """

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool
    is_cut: bool = False

    def scale(self, top: float, bottom: float) -> Callable[[float], float]:
        """Return the map from a loss to a height."""
        if not self.is_log:
            return Scale(self.low, self.high, bottom, top)
        linear = Scale(math.log10(self.low), math.log10(self.high), bottom, top)
        return lambda loss: linear(math.log10(loss))


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Something in a lane."""

    observed: int
    kind: str
    title: str


def axis_of(curve: Sequence[Bucket]) -> Axis:
    """Return an axis for the measured buckets of ``curve``, at least one.

    It is logarithmic where all losses are positive and span more than two decades. A linear one leaves out rare losses that
    would press all others to the floor: the highest twentieth, where it takes up more than three quarters of the height.
    """
    low = max(min(_LARGEST, *(bucket.low for bucket in curve)), -_LARGEST)
    highs = sorted(max(min(bucket.high, _LARGEST), -_LARGEST) for bucket in curve)
    high = highs[-1] if highs[-1] - low > 1 / _LARGEST else low
    if low > 0 and high > 100 * low:
        return Axis(low * 0.9, high * 1.1, _log_ticks(low, high), is_log=True)
    usual = highs[(len(highs) * 19) // 20]
    is_cut = high - low > 4 * (usual - low) > 0
    ticks = nice_ticks(low, usual if is_cut else high)
    return Axis(ticks[0], ticks[-1], ticks, is_log=False, is_cut=is_cut)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 7)
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    values = (factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors)
    return tuple(value for value in values if low * 0.9 <= value <= high * 1.1)


def thinned(curve: Sequence[Bucket], limit: int = _MAX_POINTS) -> list[Bucket]:
    """Return at most ``limit`` buckets, neighbours merged; the first one stays as it is."""
    size = math.ceil((len(curve) - 1) / (limit - 1)) if len(curve) > limit else 1
    rest = (curve[start : start + size] for start in range(1, len(curve), size))
    return [*curve[:1], *(_merged(group) for group in rest)]


def _merged(group: Sequence[Bucket]) -> Bucket:
    whole = group[0]
    for bucket in group[1:]:
        whole = merged(whole, bucket)
    return whole


def loss_chart(history: History, label: str) -> Markup:
    """Return the picture of ``history``, which has a curve; ``label`` says it in words."""
    lanes = _lanes(history)
    top = _ARC_HEIGHT + 12 if history.rewinds.latest else 14
    bottom = top + _PLOT_HEIGHT
    foot = bottom + _LANE_HEIGHT * len(lanes) + 6
    x_scale = Scale(1, max(history.observed, 2), _LEFT, _RIGHT)
    body = (
        *_loss(history, x_scale, top, bottom),
        *_rewinds(history, x_scale, top, bottom),
        *(
            part
            for row, (name, marks) in enumerate(lanes.items())
            for part in _lane(name, marks, bottom + _LANE_HEIGHT * (row + 0.5) + 6, x_scale)
        ),
        *_x_axis(history, x_scale, foot),
    )
    picture = tag(
        "svg",
        tag("title", label),
        *body,
        viewBox=f"0 0 {_WIDTH} {foot + 52:.0f}",
        role="img",
        aria_label=label,
        class_="chart",
    )
    return tag("div", picture, class_="scroll", tabindex=0, role="group", aria_label="loss chart, scrolls sideways")


def _loss(history: History, x_scale: Scale, top: float, bottom: float) -> list[Markup]:
    """Grid, the band from lowest to highest loss, the line of the last loss of each stretch and its last value."""
    curve = thinned(history.curve)
    measured = [bucket for bucket in curve if bucket.is_measured]
    if not measured:
        return [tag("text", "no finite loss", x=(_LEFT + _RIGHT) / 2, y=(top + bottom) / 2, class_="quiet-text middle")]
    axis = axis_of(measured)
    y_scale = axis.scale(top, bottom)
    parts = [part for value in axis.ticks for part in _y_tick(value, y_scale(value))]
    for is_measured, stretch in itertools.groupby(curve, key=lambda bucket: bucket.is_measured):
        if is_measured:
            parts += _stretch(list(stretch), x_scale, y_scale)
    if axis.is_cut:
        parts += _beyond(measured, axis, x_scale, top)
    x, y = x_scale(measured[-1].observed), y_scale(measured[-1].last)
    name = tag("text", number_text(measured[-1].last), x=x + 9, y=y + 4, class_="name")
    return [*parts, tag("circle", cx=x, cy=y, r=3.5, class_="end"), name]


def _stretch(buckets: Sequence[Bucket], x_scale: Scale, y_scale: Callable[[float], float]) -> list[Markup]:
    xs = [x_scale(bucket.observed) for bucket in buckets]
    highs = [(x, y_scale(bucket.high)) for x, bucket in zip(xs, buckets, strict=True)]
    lows = [(x, y_scale(bucket.low)) for x, bucket in zip(xs, buckets, strict=True)]
    last = [(x, y_scale(bucket.last)) for x, bucket in zip(xs, buckets, strict=True)]
    band = tag("path", d=_joined([*highs, *reversed(lows)]) + "Z", class_="band") if highs != lows else Markup("")
    return [band, tag("path", d=_joined(last if len(last) > 1 else last * 2), class_="loss")]


def _joined(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _beyond(measured: Sequence[Bucket], axis: Axis, x_scale: Scale, top: float) -> list[Markup]:
    """An arrow at the edge, with the value, for the highest of the losses that the axis leaves out."""
    highest = max(measured, key=lambda bucket: bucket.high)
    x = x_scale(highest.observed)
    arrow = tag("path", d=f"M{x - 4:.1f} {top + 1:.1f}l4 -7l4 7Z", class_="beyond")
    is_left = x > (_LEFT + _RIGHT) / 2
    name = tag(
        "text",
        f"up to {number_text(highest.high)}",
        x=x - 8 if is_left else x + 8,
        y=top - 1,
        class_="quiet-text right" if is_left else "quiet-text",
    )
    return [arrow, name]


def _rewinds(history: History, x_scale: Scale, top: float, bottom: float) -> list[Markup]:
    """For each rewind what was taken back, shaded, an arc back to the snapshot, and a numbered diamond where it happened."""
    entries = history.rewinds.latest
    if not entries:
        return []
    first = history.rewinds.num_dropped + 1
    spans = [
        (x_scale(max(entry.to_observed or 1, 1)), x_scale(entry.observed)) for entry in entries if entry.to_observed is not None
    ]
    shades = [tag("rect", x=start, y=top, width=max(end - start, 1.5), height=bottom - top) for start, end in spans]
    parts = [_rewind(entry, first + index, x_scale, top) for index, entry in enumerate(entries)]
    labels: list[Markup] = []
    for group in _near(list(enumerate(entries, start=first)), lambda item: x_scale(item[1].observed), _NUMBER_GAP):
        (low, entry), (high, _) = group[0], group[-1]
        text = str(low) if low == high else f"{low}–{high}"
        labels.append(tag("text", text, x=x_scale(entry.observed) + 8, y=top - 8, class_="name"))
    name = tag("text", "rewinds", x=_LEFT - 12, y=top - 18, class_="tick right")
    return [name, tag("g", *shades, class_="taken-back"), *parts, *labels]


def _near(items: Sequence[ItemT], place: Callable[[ItemT], float], gap: float) -> list[list[ItemT]]:
    """Return ``items``, in order of place, in groups that start less than ``gap`` before their last."""
    groups: list[list[ItemT]] = []
    for item in items:
        if groups and place(item) - place(groups[-1][0]) < gap:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _rewind(entry: RewindEntry, number: int, x_scale: Scale, top: float) -> Markup:
    event, x = entry.event, x_scale(entry.observed)
    title = f"rewind {number}: step {number_text(event.from_step)} → {number_text(event.to_step)}: {plain(event.reason)}"
    parts = [tag("title", title)]
    if entry.to_observed is not None and x - x_scale(max(entry.to_observed, 1)) > 3:
        start = x_scale(max(entry.to_observed, 1))
        height = min(_ARC_HEIGHT, 14 + 0.5 * (x - start))
        arc = f"M{x:.1f} {top:.1f}C{x:.1f} {top - height:.1f} {start:.1f} {top - height:.1f} {start:.1f} {top:.1f}"
        head = "m-3.5 -6l3.5 6l3.5 -6" if x - start > 12 else ""
        parts.append(tag("path", d=arc + head, class_="arc"))
    parts.append(_shape("rewind", x, top))
    return tag("a", *parts, href=f"#rewind-{number}")


def _lanes(history: History) -> dict[str, list[_Mark]]:
    """The marks of each kind of which there are any."""
    snapshots = [
        _Mark(entry.observed, "taken", f"snapshot of step {number_text(entry.step)} taken{_end_text(entry)}")
        for entry in history.snapshots.latest
        if entry.promoted is None
    ] + [
        _Mark(entry.observed, "promoted", f"snapshot of step {number_text(entry.step)}, proved good at {entry.promoted:,}")
        for entry in history.snapshots.latest
        if entry.promoted is not None
    ]
    lanes = {
        "findings": [
            _Mark(entry.observed, "finding", f"step {number_text(entry.step)}: {plain(entry.finding.message)}")
            for entry in history.findings.latest
        ],
        "skipped steps": [
            _Mark(entry.observed, "skipped", f"step {number_text(entry.step)} skipped: {plain(entry.reason)}")
            for entry in history.skips.latest
        ],
        "not finite": [
            _Mark(bucket.observed, "non-finite", f"{bucket.non_finite:,} not finite up to step {number_text(bucket.step)}")
            for bucket in history.curve
            if bucket.non_finite
        ],
        "new levels": [_noted(entry, "new level accepted") for entry in history.notes.latest if entry.kind == "level"],
        "taken out": [_noted(entry, "taken out") for entry in history.notes.latest if entry.kind == "quarantine"],
        "snapshots": sorted(snapshots, key=lambda mark: mark.observed),
    }
    return {name: marks for name, marks in lanes.items() if marks}


def _noted(entry: NoteEntry, what: str) -> _Mark:
    return _Mark(entry.observed, entry.kind, f"step {number_text(entry.step)}: {what}: {plain(entry.reason)}")


def _end_text(entry: SnapshotEntry) -> str:
    return ", on probation" if entry.dropped is None else f", dropped unproven at {entry.dropped:,}"


def _lane(name: str, marks: Sequence[_Mark], y: float, x_scale: Scale) -> list[Markup]:
    """One lane; of marks that would lie on each other one is drawn, which says how many there are."""
    rail = tag("path", d=f"M{_LEFT} {y:.1f}H{_RIGHT}", class_="grid")
    label = tag("text", name, x=_LEFT - 12, y=y + 4, class_="tick right")
    shapes: list[Markup] = []
    for near in _near(marks, lambda mark: x_scale(mark.observed), _MARK_GAP):
        first = next((mark for mark in near if mark.kind != "taken"), near[0])
        title = first.title if len(near) == 1 else f"{len(near):,} here; the first: {first.title}"
        shapes.append(_shape(first.kind, x_scale(first.observed), y, title))
    return [label, rail, *shapes]


def _shape(kind: str, x: float, y: float, title: str = "") -> Markup:
    inside = [tag("title", title)] if title else []
    return tag("path", *inside, d=_SHAPES[kind], transform=f"translate({x:.1f} {y:.1f})", class_=f"sign-{kind}")


def _y_tick(value: float, y: float) -> list[Markup]:
    line = tag("path", d=f"M{_LEFT} {y:.1f}H{_RIGHT}", class_="grid")
    return [line, tag("text", number_text(value), x=_LEFT - 12, y=y + 4, class_="tick right")]


def _x_axis(history: History, x_scale: Scale, y: float) -> list[Markup]:
    """Observations, and under them the caller's steps where these are other numbers."""
    ticks = [value for value in nice_ticks(0, x_scale.high, 6) if 1 <= value <= x_scale.high]
    places = [(1 if index == 0 and value > 0.15 * x_scale.high else value) for index, value in enumerate([1, *ticks])]
    shown = [value for value in places if value == 1 or x_scale(value) - x_scale(1) > 30]
    axis = tag("path", d=f"M{_LEFT} {y:.1f}H{_RIGHT}", class_="axis")
    parts = [axis, *(tag("text", f"{value:,.0f}", x=x_scale(value), y=y + 16, class_="tick middle") for value in shown)]
    parts.append(tag("text", "observation", x=_LEFT - 12, y=y + 16, class_="tick right"))
    if any(bucket.step not in (bucket.observed, bucket.observed - 1) for bucket in history.curve):
        steps = [(value, _step_at(history.curve, value)) for value in shown]
        parts += [tag("text", f"{step:,}", x=x_scale(value), y=y + 32, class_="tick middle") for value, step in steps]
        parts.append(tag("text", "your step", x=_LEFT - 12, y=y + 32, class_="tick right"))
    return [join(parts)]


def _step_at(curve: Sequence[Bucket], observed: float) -> int:
    index = bisect.bisect_left(curve, observed, key=lambda bucket: bucket.observed)
    return curve[min(index, len(curve) - 1)].step
