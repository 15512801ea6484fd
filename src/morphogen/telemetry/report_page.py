"""The page of a report: what it shows, as frozen records of text and charts, and how that becomes one HTML file.

Everything is in the file: style, pictures and three lines of script that open the folded parts before printing. A
content security policy forbids the page to load anything.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from morphogen.telemetry.markup import (
    BASE_STYLE,
    DARK,
    DARK_SIGNALS,
    LIGHT,
    LIGHT_SIGNALS,
    NARROW_AND_PRINT_STYLE,
    Figure,
    Markup,
    Point,
    Table,
    document,
    folded,
    legend,
    number,
    section,
    table,
    tag,
)
from morphogen.telemetry.metrics import difference_texts
from morphogen.telemetry.report_charts import (
    LaneChart,
    LineChart,
    arm_class,
    interval_bar,
    lane_chart,
    line_chart,
    sparkline,
)

_MAX_OPEN_ROLLBACKS = 6
_PREFIXES = ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One line of the result table; ``low``, ``mean`` and ``high`` are metric values, None where unknown."""

    arm: str
    cells: tuple[str, ...]
    mean: float | None
    low: float | None
    high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaneBlock:
    """The slots of one repeat: the picture and every stage change in words."""

    heading: str
    chart: LaneChart
    history: Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollbackStory:
    """One rollback, told whole; ``losses`` are train losses around it and ``lost_steps`` the span thrown away."""

    anchor: str
    heading: str
    reason: str
    facts: tuple[tuple[str, str], ...]
    findings: Table
    losses: tuple[Point, ...]
    lost_steps: Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunView:
    """All that the page shows of a run, top-down; ``is_empty`` for a log without a single record."""

    title: str
    subtitle: str
    is_empty: bool
    health: tuple[Figure, ...]
    verdict: Figure
    numbers: tuple[Figure, ...]
    metric: str
    results: tuple[ArmResult, ...]
    repeats: Table
    curves: tuple[LineChart, ...]
    lanes: tuple[LaneBlock, ...]
    rollbacks: tuple[RollbackStory, ...]
    skipped: Table
    refused: Table
    config: str
    versions: str
    summary: str
    command: str
    notes: tuple[str, ...]


def count_text(value: float | None) -> str:
    """Return ``value`` rounded, with thousands apart."""
    return "n/a" if value is None else f"{value:,.0f}"


def large_text(value: float | None) -> str:
    """Return ``value`` to 3 digits with a prefix.

    Example:
        >>> large_text(12_345_678.0)
        '12.3 M'
    """
    if value is None or not math.isfinite(value):
        return "n/a" if value is None else str(value)
    power, prefix = next(((p, name) for p, name in _PREFIXES if abs(value) >= 10**p), (0, ""))
    return f"{value / 10**power:.3g} {prefix}".rstrip()


def time_text(seconds: float | None) -> str:
    """Return a duration in its two largest units."""
    if seconds is None or not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def verdict_of(mean: float | None, low: float | None, high: float | None, *, repeats: str, metric: str) -> Figure:
    """Return in one sentence what the paired difference, grown minus static host, says.

    Example:
        >>> verdict_of(0.031, 0.012, 0.05, repeats="5", metric="accuracy").value
        'Grown beats the static host by +3.1 points [+1.2, +5.0] over 5 paired repeats.'
    """
    if mean is None:
        return Figure(name="verdict", value="No verdict: no repeat has both a grown network and a static host.")
    if low is None or high is None:
        shown = f"grown minus static host is {difference_texts((mean,), metric)[0]}"
        return Figure(name="verdict", value=f"No verdict: paired repeats {repeats} give no interval; {shown}.")
    shown, *ends = difference_texts((mean, low, high), metric)
    evidence = f"{shown} [{', '.join(end.split()[0] for end in ends)}] over {repeats} paired repeats"
    if low > 0:
        return Figure(name="verdict", value=f"Grown beats the static host by {evidence}.", tone="good")
    if high < 0:
        return Figure(name="verdict", value=f"Grown falls short of the static host: {evidence}.", tone="bad")
    words = f"grown minus static host is {evidence}, and the interval holds zero"
    return Figure(name="verdict", value=f"Not significant: {words}.")


def page(view: RunView) -> str:
    """Return ``view`` as one complete HTML document."""
    sections = _nothing_yet(view) if view.is_empty else _sections(view)
    header = tag("header", tag("h1", view.title), tag("p", view.subtitle, class_="quiet"))
    return document(view.title, STYLE, [header, *sections])


def _nothing_yet(view: RunView) -> list[Markup]:
    words = "The log holds no records yet. Write the report again when the run has begun."
    return [tag("p", words, class_="verdict"), *_notes(view.notes)]


def _sections(view: RunView) -> list[Markup]:
    return [
        tag("ul", *map(health, view.health), class_="health"),
        tag("p", view.verdict.value, class_=f"verdict {view.verdict.tone}"),
        tag("dl", *map(number, view.numbers), class_="numbers"),
        section("Result", _results(view), folded("Every repeat", table(view.repeats))),
        section("Curves", _curve_legend(), *map(_curve, view.curves)),
        section("Slots of the grown network", *_lane_blocks(view.lanes)),
        section("Rollbacks", *_rollbacks(view.rollbacks), id_="rollbacks"),
        section("Skipped steps", table(view.skipped)),
        section("Refused gates", table(view.refused)),
        section("Configuration", *_configuration(view)),
        section("Run it again", tag("pre", view.command, class_="command")),
        *_notes(view.notes),
    ]


def health(figure: Figure) -> Markup:
    """Return ``figure`` as one entry of a ``ul`` of class "health": a light and words, as the colour never speaks alone."""
    signs = {"good": "✓", "warn": "!", "bad": "✕"}
    sign = tag("span", signs.get(figure.tone, "·"), class_=f"sign {figure.tone}", aria_hidden="true")
    return tag("li", sign, tag("span", figure.name, class_="quiet"), " ", tag("b", figure.value))


def _results(view: RunView) -> Markup:
    """The result table with a picture of each interval on one scale."""
    if not view.results:
        return tag("p", "No repeat has ended yet.", class_="quiet")
    known = [value for row in view.results for value in (row.low, row.mean, row.high) if value is not None]
    ends = (min(known, default=0.0), max(known, default=1.0))
    names = (f"test {view.metric}", "repeats", "parameters", "training FLOPs", "wall time", "rollbacks")
    columns = (
        tag("th", "arm"),
        tag("th", "95% interval", class_="picture"),
        *(tag("th", name, class_="n") for name in names),
    )
    rows = [_result_row(row, ends) for row in view.results]
    return tag("div", tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *rows)), class_="scroll")


def _result_row(row: ArmResult, ends: tuple[float, float]) -> Markup:
    swatch = tag("i", class_=f"swatch {arm_class(row.arm)}")
    picture = Markup("")
    if row.mean is not None:
        low = row.mean if row.low is None else row.low
        high = row.mean if row.high is None else row.high
        picture = interval_bar(low, row.mean, high, ends, row.arm)
    cells = (tag("td", cell, class_="n") for cell in row.cells)
    return tag("tr", tag("td", swatch, row.arm, class_="arm"), tag("td", picture, class_="picture"), *cells)


def _curve(chart: LineChart) -> Markup:
    return tag("figure", tag("figcaption", chart.label), line_chart(chart))


def _curve_legend() -> Markup:
    arms = ((arm, f"swatch {arm_class(arm)}") for arm in ("static", "reference", "grown"))
    words = "thick: mean over repeats as far as all have come; thin: one repeat; dashed: rewound"
    return legend((*arms, ("rollback", "key diamond"), ("injected fault", "key triangle")), words)


_STAGES = ("dormant", "germinated", "training", "blending", "holding", "fossilized", "pruned", "embargoed", "resetting")


def _lane_blocks(blocks: Sequence[LaneBlock]) -> list[Markup]:
    if not blocks:
        return [tag("p", "No repeat of the grown network has begun yet.", class_="quiet")]
    words = "line below a bar: alpha from 0 to 1; ✕: pruned; shaded under an arrow: thrown away by a rollback"
    keys = legend([(stage, f"swatch stage-{stage}") for stage in _STAGES], words)
    return [keys, *map(_lane_block, blocks)]


def _lane_block(block: LaneBlock) -> Markup:
    history = folded("Every stage change and its reason", table(block.history))
    return tag("figure", tag("figcaption", block.heading), lane_chart(block.chart), history)


def _rollbacks(stories: Sequence[RollbackStory]) -> list[Markup]:
    if not stories:
        return [tag("p", "None.", class_="quiet")]
    is_open = len(stories) <= _MAX_OPEN_ROLLBACKS
    return [folded(story.heading, *_story(story), is_open=is_open, id_=story.anchor) for story in stories]


def _story(story: RollbackStory) -> list[Markup]:
    facts = (("reason", story.reason), *story.facts)
    listed = tag("dl", *(part for name, value in facts for part in (tag("dt", name), tag("dd", value))), class_="facts")
    curve = tag(
        "figure",
        tag("figcaption", "train loss around it, thrown away where shaded"),
        sparkline(story.losses, [story.lost_steps], f"train loss around: {story.heading}"),
    )
    return [tag("div", listed, curve, class_="story"), table(story.findings)]


def _configuration(view: RunView) -> list[Markup]:
    parts = [folded("Settings", tag("pre", view.config))]
    if view.versions:
        parts.append(folded("Versions", tag("pre", view.versions)))
    if view.summary:
        parts.append(folded("summary.json", tag("pre", view.summary)))
    return parts


def _notes(notes: Sequence[str]) -> list[Markup]:
    return [tag("footer", *(tag("p", note) for note in notes), class_="quiet")] if notes else []


_COLOURS = f"""
:root {{ color-scheme: light dark; {LIGHT}
  --static: #7d7f79; --reference: #c2680d; --grown: #2468c8; --other: #8a4fb5; {LIGHT_SIGNALS} \
--dormant: #ecece7; --germinated: #cdebd6; --training: #98d3ac; --blending: #5cb57f;
  --holding: #2b8d5b; --fossilized: #0e5233; --pruned: #c6302b; --embargoed: #e6b9a8; --resetting: #cfc7bf; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} \
--static: #9a9c95; --reference: #e39a45; --grown: #6aa5f5; --other: #c08be8;
  {DARK_SIGNALS} --dormant: #2b2d2a; --germinated: #24473a; --training: #2c6a4e;
  --blending: #379067; --holding: #56bd8b; --fossilized: #a6ecc9; --pruned: #f0716b; --embargoed: #7a4a3f;
  --resetting: #57524c; }} }}
"""

_CHART_STYLE = """\
.line { stroke: var(--c); stroke-linejoin: round; } .line.mean { stroke-width: 2.5; } .line.repeat { opacity: .38; }
.line.lost { stroke-dasharray: 2 3; opacity: .8; } .leader { stroke: var(--c); stroke-dasharray: 1 3; }
.dot { fill: var(--c); stroke: var(--page); stroke-width: 1.5; } .whisker { stroke: var(--c); stroke-width: 2.5; }
.spark { stroke: var(--ink); stroke-width: 1.5; } .alpha { stroke: var(--ink); stroke-width: 1.4; }
.mark { stroke: var(--page); stroke-width: 1.2; } .mark.rollback { fill: var(--bad); }
.mark.fault { fill: var(--warn); }
.mark.prune { stroke: var(--ink); stroke-width: 2.2; }
.rewound { fill: var(--bad); opacity: .16; } .rewind { stroke: var(--bad); stroke-width: 1.4; }
.stage { stroke: var(--page); stroke-width: .6; fill: var(--c); }
.arm-static { --c: var(--static); } .arm-reference { --c: var(--reference); } .arm-grown { --c: var(--grown); }
.arm-other { --c: var(--other); }
.stage-dormant { --c: var(--dormant); } 
.stage-germinated { --c: var(--germinated); }
.stage-training { --c: var(--training); } .stage-blending { --c: var(--blending); }
.stage-holding { --c: var(--holding); }
.stage-fossilized { --c: var(--fossilized); } .stage-pruned { --c: var(--pruned); }
.stage-embargoed { --c: var(--embargoed); } .stage-resetting { --c: var(--resetting); }
"""

STYLE = _COLOURS + BASE_STYLE + _CHART_STYLE + NARROW_AND_PRINT_STYLE
