"""Pictures of a report: pure functions from what is to be drawn to inline SVG.

Colours are CSS classes (``arm-grown``, ``stage-holding``), so that the page alone decides light, dark and print. The x
axis is the optimizer step unless a chart says otherwise; points of a line never go back along it.

Source: standard library only.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from morphogen.telemetry.markup import Markup, Point, Scale, join, nice_ticks, path_of, tag

_WIDTH = 760
_MAX_POINTS = 400
_LABEL_GAP = 14
_TEXT_WIDTH, _BOLD_WIDTH = 6.2, 7.6
_COLOURED = ("static", "reference", "grown")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. ``kind``: "mean" (thick, labelled at its end), "repeat" (thin) or "lost" (dashed: rewound work).

    ``arm`` gives the colour, and the label at the end where ``label`` is empty.
    """

    points: tuple[Point, ...]
    arm: str
    kind: str
    title: str
    label: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A sign at a step, at the value ``y`` or on the axis. ``kind``: "rollback", "fault" or "prune"."""

    step: float
    title: str
    kind: str
    y: float | None = None
    target: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineChart:
    """Curves over steps; ``value_text`` writes a value of the y axis, the x axis ends at ``last_step`` or later.

    ``is_focused``: the lowest fifth of the values, where curves begin, is drawn along the floor of the chart, so that
    the differences further up can be seen.
    """

    label: str
    lines: tuple[Line, ...]
    value_text: Callable[[float], str]
    marks: tuple[Mark, ...] = ()
    last_step: float = 0
    includes_zero: bool = False
    is_focused: bool = False
    steps_name: str = "optimizer steps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A slot in one stage from ``start`` to ``end``."""

    start: float
    end: float
    stage: str
    title: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """The life of one slot. ``births`` are germinations: the step and the blueprint."""

    slot: str
    segments: tuple[Segment, ...]
    alphas: tuple[Point, ...]
    births: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewind:
    """Steps thrown away by a rollback, first and last."""

    span: tuple[float, float]
    title: str
    target: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneChart:
    """The slots of one repeat over steps."""

    label: str
    lanes: tuple[Lane, ...]
    rewinds: tuple[Rewind, ...]
    marks: tuple[Mark, ...]
    last_step: float


def thinned(points: Sequence[Point], limit: int = _MAX_POINTS) -> tuple[Point, ...]:
    """Return at most about ``limit`` of ``points``, keeping the ends and the extremes of each stretch."""
    if len(points) <= limit:
        return tuple(points)
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return tuple(points[index] for index in sorted(kept))


def timeline(points: Iterable[Point]) -> tuple[tuple[Point, ...], tuple[tuple[Point, ...], ...]]:
    """Return the points that stand and, as pieces, those taken back where the run went to an earlier step.

    Example:
        >>> timeline([(10, 1.0), (20, 2.0), (30, 9.0), (20, 2.5)])
        (((10, 1.0), (20, 2.5)), (((20, 2.0), (30, 9.0)),))
    """
    kept: list[Point] = []
    lost: list[tuple[Point, ...]] = []
    for point in points:
        first = bisect.bisect_left(kept, point[0], key=lambda known: known[0])
        if first < len(kept):
            lost.append(tuple(kept[first:]))
            del kept[first:]
        kept.append(point)
    return tuple(kept), tuple(lost)


def value_at(points: Sequence[Point], step: float) -> float:
    """Return the value of a curve at ``step``, straight between its points and level beyond its ends."""
    after = bisect.bisect_left(points, step, key=lambda point: point[0])
    if after == 0 or after == len(points):
        return points[min(after, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (step - x0) / (x1 - x0)


def mean_curve(curves: Sequence[Sequence[Point]]) -> tuple[Point, ...]:
    """Return the mean of ``curves`` over the steps that all of them cover.

    Example:
        >>> mean_curve([[(0, 1.0), (10, 2.0), (20, 3.0)], [(0, 3.0), (10, 4.0)]])
        ((0, 2.0), (10, 3.0))
    """
    filled = [curve for curve in curves if curve]
    if not filled:
        return ()
    first, last = max(curve[0][0] for curve in filled), min(curve[-1][0] for curve in filled)
    steps = sorted({x for curve in filled for x, _ in curve if first <= x <= last})
    return tuple((step, sum(value_at(curve, step) for curve in filled) / len(filled)) for step in steps)


def stepped(points: Sequence[Point], jump: float = 0.5) -> tuple[Point, ...]:
    """Return ``points`` of a value that jumps: level until ``jump`` steps before each change.

    Example:
        >>> stepped([(0, 5.0), (10, 7.0)])
        ((0, 5.0), (9.5, 5.0), (10, 7.0))
    """
    jumps = list(points[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        jumps += [(x1 - jump, y0)] if y0 != y1 and x1 - x0 > jump else []
        jumps.append((x1, y1))
    return tuple(jumps)


def arm_lines(curves: Iterable[tuple[str, str, Sequence[Point]]]) -> tuple[Line, ...]:
    """Return a thin line for each of ``curves``, dashed ones for what was taken back, and a thick mean for each arm.

    Args:
        curves: The arm, the title and the points as measured, also where the run went back.
    """
    lines: list[Line] = []
    standing: dict[str, list[tuple[Point, ...]]] = {}
    for arm, title, points in curves:
        kept, lost = timeline(points)
        standing.setdefault(arm, []).append(kept)
        lines += [Line(points=piece, arm=arm, kind="lost", title=f"{title}, taken back") for piece in lost]
        lines.append(Line(points=kept, arm=arm, kind="repeat", title=title))
    means = (Line(points=mean_curve(kept), arm=arm, kind="mean", title=f"{arm}, mean") for arm, kept in standing.items())
    return (*lines, *means)


def line_chart(chart: LineChart, *, height: int = 270) -> Markup:
    """Return ``chart`` as SVG, or a note where there is nothing to draw yet."""
    lines = tuple(dataclasses.replace(line, points=thinned(line.points)) for line in chart.lines if line.points)
    if not lines:
        return tag("p", "n/a: not measured yet.", class_="quiet")
    values = sorted(y for line in lines for _, y in line.points)
    floor = 0.0 if chart.includes_zero else values[len(values) // 5 if chart.is_focused else 0]
    y_ticks = nice_ticks(min(floor, values[-1]), values[-1])
    y_names = [chart.value_text(value) for value in y_ticks]
    y_names[0] = f"≤ {y_names[0]}" if values[0] < y_ticks[0] else y_names[0]
    last_step = max([chart.last_step, *(line.points[-1][0] for line in lines)])
    x_scale = Scale(0, last_step, 60, _WIDTH - 130)
    y_scale = Scale(y_ticks[0], y_ticks[-1], height - 36, 12)
    body = (
        *(_y_tick(value, name, y_scale, x_scale) for value, name in zip(y_ticks, y_names, strict=True)),
        *_x_axis(x_scale, height - 36, chart.steps_name),
        *(_curve(line, x_scale, y_scale) for line in sorted(lines, key=lambda line: line.kind == "mean")),
        *_end_labels([line for line in lines if line.kind == "mean"], chart.value_text, x_scale, y_scale),
        *(_mark(mark, x_scale(mark.step), height - 36 if mark.y is None else y_scale(mark.y)) for mark in chart.marks),
    )
    return _svg(chart.label, height, body)


def sparkline(points: Sequence[Point], marks: Sequence[Point], label: str) -> Markup:
    """Return a small curve of ``points``; ``marks`` are spans of steps shaded behind it."""
    width, height = 260, 56
    if len(points) <= 1:
        return tag("span", "n/a", class_="quiet")
    values = [y for _, y in points]
    x_scale = Scale(points[0][0], points[-1][0], 2, width - 2)
    y_scale = Scale(min(values), max(values), height - 4, 4)
    spans = [
        tag("rect", x=x_scale(start), y=0, width=max(x_scale(end) - x_scale(start), 2), height=height, class_="rewound")
        for start, end in marks
    ]
    path = tag("path", d=path_of(points, x_scale, y_scale), class_="spark")
    return tag("svg", tag("title", label), *spans, path, viewBox=f"0 0 {width} {height}", role="img", class_="sparkline")


def interval_bar(low: float, mean: float, high: float, ends: tuple[float, float], arm: str) -> Markup:
    """Return a dot at ``mean`` on a line from ``low`` to ``high``, on a scale from ``ends[0]`` to ``ends[1]``."""
    scale = Scale(*ends, 6, 122)
    whisker = tag("path", d=f"M{scale(low):.1f} 9H{scale(high):.1f}", class_="whisker")
    dot = tag("circle", cx=scale(mean), cy=9, r=4.5, class_="dot")
    rail = tag("path", d="M2 9H126", class_="rail")
    return tag("svg", rail, whisker, dot, viewBox="0 0 128 18", class_=f"interval {arm_class(arm)}", aria_hidden="true")


def lane_chart(chart: LaneChart) -> Markup:
    """Return the swimlanes of one repeat as SVG."""
    row, top = 54, 20
    bottom = top + row * len(chart.lanes)
    x_scale = Scale(0, chart.last_step, 104, _WIDTH - 14)
    rows = [part for index, lane in enumerate(chart.lanes) for part in _lane(lane, top + row * index, x_scale)]
    body = (
        *_x_axis(x_scale, bottom),
        *rows,
        *(_rewind(rewind, x_scale, top, bottom) for rewind in chart.rewinds),
        *(_mark(mark, x_scale(mark.step), bottom) for mark in chart.marks),
    )
    return _svg(chart.label, bottom + 36, body)


def arm_class(arm: str) -> str:
    """Return the CSS class of ``arm``; one for all arms that have no colour of their own."""
    return f"arm-{arm}" if arm in _COLOURED else "arm-other"


def _svg(label: str, height: float, body: Iterable[Markup]) -> Markup:
    picture = tag(
        "svg",
        tag("title", label),
        *body,
        viewBox=f"0 0 {_WIDTH} {height:.0f}",
        role="img",
        aria_label=label,
        class_="chart",
    )
    return tag("div", picture, class_="scroll")


def _y_tick(value: float, text: str, y_scale: Scale, x_scale: Scale) -> Markup:
    y = y_scale(value)
    line = tag("path", d=f"M{x_scale.start:.1f} {y:.1f}H{x_scale.end:.1f}", class_="grid")
    return join((line, tag("text", text, x=x_scale.start - 8, y=y + 4, class_="tick right")))


def _x_axis(x_scale: Scale, y: float, name: str = "optimizer steps") -> list[Markup]:
    ticks = [value for value in nice_ticks(0, x_scale.high, 6) if value <= x_scale.high]
    numbers = [tag("text", f"{value:,.0f}", x=x_scale(value), y=y + 16, class_="tick middle") for value in ticks]
    axis = tag("path", d=f"M{x_scale.start:.1f} {y:.1f}H{x_scale.end:.1f}", class_="axis")
    return [axis, *numbers, tag("text", name, x=x_scale.end, y=y + 31, class_="tick right")]


def _curve(line: Line, x_scale: Scale, y_scale: Scale) -> Markup:
    path = tag("path", tag("title", line.title), d=path_of(line.points, x_scale, y_scale), class_=f"line {line.kind}")
    return tag("g", path, class_=arm_class(line.arm))


def _end_labels(lines: Sequence[Line], value_text: Callable[[float], str], x_scale: Scale, y_scale: Scale) -> list[Markup]:
    """A dot at the end of each line and its name at the right edge, moved apart where they would touch."""
    parts: list[Markup] = []
    next_y = -math.inf
    for line in sorted(lines, key=lambda line: y_scale(line.points[-1][1])):
        x, y = x_scale(line.points[-1][0]), y_scale(line.points[-1][1])
        label_y = max(y, next_y)
        next_y = label_y + _LABEL_GAP
        leader = tag("path", d=f"M{x + 6:.1f} {y:.1f}H{x_scale.end:.1f}L{x_scale.end + 6:.1f} {label_y:.1f}", class_="leader")
        words = f"{line.label or line.arm} {value_text(line.points[-1][1])}"
        name = tag("text", words, x=x_scale.end + 10, y=label_y + 4, class_="name")
        parts.append(tag("g", leader, tag("circle", cx=x, cy=y, r=4, class_="dot"), name, class_=arm_class(line.arm)))
    return parts


_SHAPES = {
    "rollback": "M0 -6L6 0L0 6L-6 0Z",
    "fault": "M-5 0L0 -9L5 0Z",
    "prune": "M-4 -4L4 4M4 -4L-4 4",
}


def _mark(mark: Mark, x: float, y: float) -> Markup:
    shape = tag(
        "path",
        tag("title", mark.title),
        d=_SHAPES[mark.kind],
        transform=f"translate({x:.1f} {y:.1f})",
        class_=f"mark {mark.kind}",
    )
    return tag("a", shape, href=f"#{mark.target}") if mark.target else shape


def _lane(lane: Lane, y: float, x_scale: Scale) -> list[Markup]:
    """Blueprint names above, stages as a bar, alpha as a line from 0 to 1 below it."""
    alpha_scale = Scale(0, 1, y + 46, y + 31)
    name = tag(
        "text",
        tag("title", lane.slot),
        _shortened(lane.slot, 92 * _TEXT_WIDTH / _BOLD_WIDTH),
        x=x_scale.start - 10,
        y=y + 26,
        class_="slot right",
    )
    bars = [
        tag(
            "rect",
            tag("title", segment.title),
            x=x_scale(segment.start),
            y=y + 15,
            width=max(x_scale(segment.end) - x_scale(segment.start), 1.0),
            height=13,
            class_=f"stage stage-{segment.stage}",
        )
        for segment in lane.segments
    ]
    floor = tag("path", d=f"M{x_scale.start:.1f} {y + 46:.1f}H{x_scale.end:.1f}", class_="grid")
    points = thinned(lane.alphas)
    alpha = tag("path", tag("title", f"alpha of {lane.slot}"), d=path_of(points, x_scale, alpha_scale), class_="alpha")
    signs = [_mark(mark, x_scale(mark.step), y + 21.5) for mark in lane.marks]
    return [name, *bars, floor, *([alpha] if points else []), *_births(lane, y, x_scale), *signs]


def _births(lane: Lane, y: float, x_scale: Scale) -> list[Markup]:
    """Each blueprint's name, cut where the next one begins."""
    starts = [x_scale(step) for step, _ in lane.births]
    room = [after - start - 6 for start, after in itertools.pairwise([*starts, float(_WIDTH)])]
    return [
        tag(
            "text",
            tag("title", f"{blueprint} at step {step:,.0f}"),
            _shortened(blueprint, width),
            x=x,
            y=y + 11,
            class_="birth",
        )
        for (step, blueprint), x, width in zip(lane.births, starts, room, strict=True)
    ]


def _shortened(text: str, width: float) -> str:
    count = max(int(width / _TEXT_WIDTH), 1)
    return text if len(text) <= count else text[: count - 1] + "…"


def _rewind(rewind: Rewind, x_scale: Scale, top: float, bottom: float) -> Markup:
    """The steps thrown away, shaded through all lanes under an arrow that points back."""
    start, end = map(x_scale, rewind.span)
    start = min(start, end - 2)
    shade = tag("rect", x=start, y=top - 6, width=end - start, height=bottom - top + 6, class_="rewound")
    arrow = tag("path", d=f"M{end:.1f} {top - 10}H{start:.1f}m5 -4l-5 4l5 4M{end:.1f} {top - 10}V{bottom:.1f}", class_="rewind")
    return tag("a", tag("title", rewind.title), shade, arrow, href=f"#{rewind.target}")
