"""Value against cost, a point for each of a few competitors, with the Pareto front among them. Pure: records to SVG.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from morphogen.telemetry.markup import Markup, Scale, nice_ticks, tag

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 660.0, 14.0, 262.0
_LABEL_GAP = 14.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """One competitor. ``low`` to ``high`` is the interval of ``value``; ``class_`` the CSS class of its colour."""

    name: str
    cost: float
    value: float
    low: float
    high: float
    class_: str
    is_on_front: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScatterChart:
    """Competitors by cost (x, less is better) and value (y, more is better)."""

    label: str
    points: tuple[ScatterPoint, ...]
    cost_name: str
    cost_text: Callable[[float], str]
    value_text: Callable[[float], str]


def scatter_chart(chart: ScatterChart) -> Markup:
    """Return ``chart`` as SVG, or a note where there is nothing to draw yet."""
    if not chart.points:
        return tag("p", "n/a: not measured yet.", class_="quiet")
    costs = [point.cost for point in chart.points]
    x_ticks = nice_ticks(min(costs), max(costs))
    y_ticks = nice_ticks(min(point.low for point in chart.points), max(point.high for point in chart.points))
    x_scale, y_scale = Scale(x_ticks[0], x_ticks[-1], _LEFT, _RIGHT), Scale(y_ticks[0], y_ticks[-1], _BOTTOM, _TOP)
    body = (
        *(_y_tick(chart.value_text(value), y_scale(value)) for value in y_ticks),
        *(tag("text", chart.cost_text(value), x=x_scale(value), y=_BOTTOM + 16, class_="tick middle") for value in x_ticks),
        tag("path", d=f"M{_LEFT} {_BOTTOM}H{_RIGHT}", class_="axis"),
        tag("text", chart.cost_name, x=_RIGHT, y=_BOTTOM + 31, class_="tick right"),
        _front(chart.points, x_scale, y_scale),
        *_dots(chart, x_scale, y_scale),
    )
    picture = tag(
        "svg",
        tag("title", chart.label),
        *body,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=chart.label,
        class_="chart",
    )
    return tag("div", picture, class_="scroll")


def _y_tick(text: str, y: float) -> Markup:
    return tag(
        "g",
        tag("path", d=f"M{_LEFT} {y:.1f}H{_RIGHT}", class_="grid"),
        tag("text", text, x=_LEFT - 8, y=y + 4, class_="tick right"),
    )


def _front(points: Sequence[ScatterPoint], x_scale: Scale, y_scale: Scale) -> Markup:
    """Return the stairs over the points of the front: what can be had for each cost."""
    stairs = sorted((point.cost, point.value) for point in points if point.is_on_front)
    if not stairs:
        return Markup("")
    (first_cost, first_value), *others = stairs
    steps = "".join(f"H{x_scale(cost):.1f}V{y_scale(value):.1f}" for cost, value in others)
    path = f"M{x_scale(first_cost):.1f} {y_scale(first_value):.1f}{steps}H{_RIGHT}"
    return tag("path", tag("title", "Pareto front of the means"), d=path, class_="alpha", stroke_dasharray="4 4")


def _dots(chart: ScatterChart, x_scale: Scale, y_scale: Scale) -> list[Markup]:
    """Return a dot, its interval and its name for each point; names are moved down where they would touch."""
    parts: list[Markup] = []
    placed: list[tuple[float, float]] = []
    for point in sorted(chart.points, key=lambda point: y_scale(point.value)):
        x, y = x_scale(point.cost), y_scale(point.value)
        label_y = y
        while any(abs(label_y - other_y) < _LABEL_GAP and abs(x - other_x) < 90 for other_x, other_y in placed):
            label_y += 1.0
        placed.append((x, label_y))
        title = f"{point.name}: {chart.value_text(point.value)} at {chart.cost_text(point.cost)} {chart.cost_name}"
        whisker = tag("path", d=f"M{x:.1f} {y_scale(point.low):.1f}V{y_scale(point.high):.1f}", class_="whisker")
        dot = tag("circle", tag("title", title), cx=x, cy=y, r=5, class_="dot")
        name = tag("text", point.name, x=x + 10, y=label_y + 4, class_="name")
        parts.append(tag("g", whisker, dot, name, class_=point.class_))
    return parts


def is_drawable(*values: float | None) -> bool:
    """Whether all of ``values`` are there and finite."""
    return all(value is not None and math.isfinite(value) for value in values)
