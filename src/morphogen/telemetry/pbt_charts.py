"""Pictures of a population: who took over whom, and how often that paid. Pure: views to inline SVG.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from morphogen.telemetry.markup import Markup, Scale, nice_ticks, tag

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 92.0, 740.0, 16.0
_BAR_LEFT = 250.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """A member from ``start`` to ``end``, both in steps; ``is_best``: in the lineage of the best."""

    member: int
    start: float
    end: float
    is_best: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrow:
    """A takeover: from the source, where it was after ``source_step``, to the member, which was at ``step``."""

    member: int
    step: float
    source: int
    source_step: float
    title: str
    is_best: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """A member that was lost on its way to ``step``."""

    member: int
    step: float
    title: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineageChart:
    """Members as rows over steps."""

    label: str
    population_size: int
    last_step: float
    lives: tuple[Life, ...]
    arrows: tuple[Arrow, ...]
    losses: tuple[Loss, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A share in [0, 1]; NaN where it is not known."""

    name: str
    share: float
    text: str


def lineage_chart(chart: LineageChart) -> Markup:
    """Return ``chart`` as SVG, or a note where there is nothing to draw yet."""
    if not chart.lives:
        return tag("p", "n/a: no interval is done yet.", class_="quiet")
    row = min(24.0, max(10.0, 480.0 / chart.population_size))
    bottom = _TOP + row * chart.population_size
    x_scale = Scale(0, chart.last_step, _LEFT, _RIGHT)
    body = (
        *_names(chart.population_size, row),
        *_axis(x_scale, bottom),
        *(_life(life, x_scale, row) for life in sorted(chart.lives, key=lambda life: life.is_best)),
        *(_arrow(arrow, x_scale, row) for arrow in sorted(chart.arrows, key=lambda arrow: arrow.is_best)),
        *(_loss(loss, x_scale, row) for loss in chart.losses),
    )
    return _svg(chart.label, bottom + 36, body)


def share_bars(label: str, bars: Sequence[Bar]) -> Markup:
    """Return a bar for each share, on a scale from 0 to 100 %, with a line at one half."""
    row, scale = 24.0, Scale(0, 1, _BAR_LEFT, _RIGHT - 60)
    bottom = 8 + row * len(bars)
    half = tag("path", d=f"M{scale(0.5):.1f} 4V{bottom:.1f}", class_="grid")
    parts = [part for place, bar in enumerate(bars) for part in _bar(bar, 8 + row * place, scale)]
    return _svg(label, bottom + 4, (half, *parts))


def _svg(label: str, height: float, body: Sequence[Markup]) -> Markup:
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


def _y(member: int, row: float) -> float:
    return _TOP + row * (member + 0.5)


def _names(population_size: int, row: float) -> list[Markup]:
    shown = range(0, population_size, max(1, math.ceil(12 / row)))
    return [tag("text", f"member {member}", x=_LEFT - 10, y=_y(member, row) + 4, class_="tick right") for member in shown]


def _axis(x_scale: Scale, y: float) -> list[Markup]:
    ticks = [value for value in nice_ticks(0, x_scale.high, 6) if value <= x_scale.high]
    numbers = [tag("text", f"{value:,.0f}", x=x_scale(value), y=y + 16, class_="tick middle") for value in ticks]
    axis = tag("path", d=f"M{x_scale.start:.1f} {y:.1f}H{x_scale.end:.1f}", class_="axis")
    return [axis, *numbers, tag("text", "steps of each member", x=x_scale.end, y=y + 31, class_="tick right")]


def _life(life: Life, x_scale: Scale, row: float) -> Markup:
    path = f"M{x_scale(life.start):.1f} {_y(life.member, row):.1f}H{x_scale(life.end):.1f}"
    words = f"member {life.member}, steps {life.start:,.0f} to {life.end:,.0f}" + (", of the best lineage" * life.is_best)
    line = tag("path", tag("title", words), d=path, class_=f"line {'mean' if life.is_best else 'repeat'}")
    return tag("g", line, class_=_class(life.is_best))


def _arrow(arrow: Arrow, x_scale: Scale, row: float) -> Markup:
    start, end = (x_scale(arrow.source_step), _y(arrow.source, row)), (x_scale(arrow.step), _y(arrow.member, row))
    path = tag(
        "path",
        tag("title", arrow.title),
        d=f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}",
        class_="line mean" if arrow.is_best else "line lost",
    )
    dot = tag("circle", tag("title", arrow.title), cx=end[0], cy=end[1], r=4 if arrow.is_best else 3, class_="dot")
    return tag("g", path, dot, class_=_class(arrow.is_best))


def _loss(loss: Loss, x_scale: Scale, row: float) -> Markup:
    place = f"translate({x_scale(loss.step):.1f} {_y(loss.member, row):.1f})"
    return tag("path", tag("title", loss.title), d="M-4 -4L4 4M4 -4L-4 4", transform=place, class_="mark prune")


def _bar(bar: Bar, y: float, scale: Scale) -> list[Markup]:
    name = tag("text", bar.name, x=_BAR_LEFT - 10, y=y + 13, class_="tick right")
    share = bar.share if math.isfinite(bar.share) else 0.0
    full = tag("rect", x=scale(0), y=y + 3, width=max(scale(share) - scale(0), 0.5), height=14, class_="stage")
    text = tag("text", bar.text, x=scale(share) + 8, y=y + 14, class_="name")
    return [name, tag("g", full, class_="arm-grown"), text]


def _class(is_best: bool) -> str:
    return "arm-grown" if is_best else "arm-other"
