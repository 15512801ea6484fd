"""The page of a report: what it shows, as frozen records of text and charts, and how that becomes one HTML file.

Everything is in the file: style, pictures and three lines of script that open the folded parts before printing. A
content security policy forbids the page to load anything.

Source: standard library only.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence

from morphogen.telemetry.events import Json
from morphogen.telemetry.report_charts import (
    LaneChart,
    LineChart,
    Markup,
    Point,
    arm_class,
    interval_bar,
    join,
    lane_chart,
    line_chart,
    sparkline,
    tag,
)

_MAX_OPEN_ROLLBACKS = 6
_SHOWN_WITH_ONE_DIGIT = 0.0005
_PREFIXES = ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A named value. ``tone``: "good", "warn", "bad" or "" for how it is to be taken."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under ``columns``, those in ``numeric`` to the right; ``ids`` make rows link targets."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    ids: tuple[str, ...] = ()


def table_of(columns: str, rows: Iterable[tuple[str, ...]], *, numeric: str = "", ids: Iterable[str] = ()) -> Table:
    """Return a table; ``columns`` and ``numeric`` are names with bars between them."""
    names, numbers = columns.split("|"), frozenset(numeric.split("|"))
    return Table(columns=tuple(names), rows=tuple(rows), numeric=numbers, ids=tuple(ids))


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


def metric_text(value: float | None, metric: str) -> str:
    """Return ``value`` of ``metric`` in words: accuracy, a fraction, as percent."""
    if value is None or not math.isfinite(value):
        return "n/a" if value is None else str(value)
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4g}"


def interval_text(low: float | None, high: float | None, metric: str) -> str:
    """Return an interval of ``metric`` in brackets."""
    return "[n/a]" if low is None or high is None else f"[{metric_text(low, metric)}, {metric_text(high, metric)}]"


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


def yaml(values: Json, indent: str = "") -> str:
    """Return ``values`` one to a line, nested ones indented."""
    if not isinstance(values, dict):
        return json.dumps(values, ensure_ascii=False)
    lines = (
        f"{indent}{key}:\n{yaml(value, indent + '  ')}"
        if isinstance(value, dict) and value
        else f"{indent}{key}: {yaml(value) or '{}'}"
        for key, value in values.items()
    )
    return "\n".join(lines)


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


def difference_texts(values: Sequence[float], metric: str) -> list[str]:
    """Signed differences, accuracy in points with as many digits as keep a difference from reading 0.0."""
    if metric != "accuracy":
        return [f"{value:+.4g}" for value in values]
    digits = 1 if all(abs(value) >= _SHOWN_WITH_ONE_DIGIT for value in values) else 2
    return [f"{100 * value:+.{digits}f} points" for value in values]


def page(view: RunView) -> str:
    """Return ``view`` as one complete HTML document."""
    sections = _nothing_yet(view) if view.is_empty else _sections(view)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = join(
        (
            Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            tag("title", view.title),
            Markup(f"<style>{_STYLE}</style>"),
        )
    )
    header = tag("header", tag("h1", view.title), tag("p", view.subtitle, class_="quiet"))
    body = tag("body", tag("main", header, *sections), Markup(f"<script>{_SCRIPT}</script>"))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'


def _nothing_yet(view: RunView) -> list[Markup]:
    words = "The log holds no records yet. Write the report again when the run has begun."
    return [tag("p", words, class_="verdict"), *_notes(view.notes)]


def _sections(view: RunView) -> list[Markup]:
    return [
        tag("ul", *map(_health, view.health), class_="health"),
        tag("p", view.verdict.value, class_=f"verdict {view.verdict.tone}"),
        tag("dl", *map(_number, view.numbers), class_="numbers"),
        _section("Result", _results(view), _folded("Every repeat", _table(view.repeats))),
        _section("Curves", _curve_legend(), *map(_curve, view.curves)),
        _section("Slots of the grown network", *_lane_blocks(view.lanes)),
        _section("Rollbacks", *_rollbacks(view.rollbacks), id_="rollbacks"),
        _section("Skipped steps", _table(view.skipped)),
        _section("Refused gates", _table(view.refused)),
        _section("Configuration", *_configuration(view)),
        _section("Run it again", tag("pre", view.command, class_="command")),
        *_notes(view.notes),
    ]


def _section(heading: str, *content: Markup, id_: str | None = None) -> Markup:
    return tag("section", tag("h2", heading), *content, id=id_)


def _folded(heading: str, *content: Markup, is_open: bool = False, id_: str | None = None) -> Markup:
    return tag("details", tag("summary", heading), *content, id=id_, open="" if is_open else None)


def _health(figure: Figure) -> Markup:
    """A light and words: the colour never speaks alone."""
    signs = {"good": "✓", "warn": "!", "bad": "✕"}
    sign = tag("span", signs.get(figure.tone, "·"), class_=f"sign {figure.tone}", aria_hidden="true")
    return tag("li", sign, tag("span", figure.name, class_="quiet"), " ", tag("b", figure.value))


def _number(figure: Figure) -> Markup:
    note = tag("span", figure.note, class_="quiet") if figure.note else Markup("")
    return tag("div", tag("dt", figure.name), tag("dd", figure.value, note))


def _table(table: Table) -> Markup:
    if not table.rows:
        return tag("p", "None.", class_="quiet")
    kinds = ["n" if column in table.numeric else None for column in table.columns]
    head = tag("tr", *(tag("th", text, class_=kind) for text, kind in zip(table.columns, kinds, strict=True)))
    ids = table.ids or (None,) * len(table.rows)
    rows = [
        tag("tr", *(tag("td", text, class_=kind) for text, kind in zip(row, kinds, strict=True)), id=anchor)
        for row, anchor in zip(table.rows, ids, strict=True)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


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
    return _legend((*arms, ("rollback", "key diamond"), ("injected fault", "key triangle")), words)


def _legend(entries: Sequence[tuple[str, str]], words: str) -> Markup:
    keys = (tag("span", tag("i", class_=kind), name) for name, kind in entries)
    return tag("p", *keys, tag("span", words), class_="legend quiet")


_STAGES = ("dormant", "germinated", "training", "blending", "holding", "fossilized", "pruned", "embargoed", "resetting")


def _lane_blocks(blocks: Sequence[LaneBlock]) -> list[Markup]:
    if not blocks:
        return [tag("p", "No repeat of the grown network has begun yet.", class_="quiet")]
    words = "line below a bar: alpha from 0 to 1; ✕: pruned; shaded under an arrow: thrown away by a rollback"
    legend = _legend([(stage, f"swatch stage-{stage}") for stage in _STAGES], words)
    return [legend, *map(_lane_block, blocks)]


def _lane_block(block: LaneBlock) -> Markup:
    history = _folded("Every stage change and its reason", _table(block.history))
    return tag("figure", tag("figcaption", block.heading), lane_chart(block.chart), history)


def _rollbacks(stories: Sequence[RollbackStory]) -> list[Markup]:
    if not stories:
        return [tag("p", "None.", class_="quiet")]
    is_open = len(stories) <= _MAX_OPEN_ROLLBACKS
    return [_folded(story.heading, *_story(story), is_open=is_open, id_=story.anchor) for story in stories]


def _story(story: RollbackStory) -> list[Markup]:
    facts = (("reason", story.reason), *story.facts)
    listed = tag("dl", *(part for name, value in facts for part in (tag("dt", name), tag("dd", value))), class_="facts")
    curve = tag(
        "figure",
        tag("figcaption", "train loss around it, thrown away where shaded"),
        sparkline(story.losses, [story.lost_steps], f"train loss around: {story.heading}"),
    )
    return [tag("div", listed, curve, class_="story"), _table(story.findings)]


def _configuration(view: RunView) -> list[Markup]:
    parts = [_folded("Settings", tag("pre", view.config))]
    if view.versions:
        parts.append(_folded("Versions", tag("pre", view.versions)))
    if view.summary:
        parts.append(_folded("summary.json", tag("pre", view.summary)))
    return parts


def _notes(notes: Sequence[str]) -> list[Markup]:
    return [tag("footer", *(tag("p", note) for note in notes), class_="quiet")] if notes else []


_SCRIPT = """
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #1b1c1a; --quiet: #62645f; --line: #dcdcd6;
  --static: #7d7f79; --reference: #c2680d; --grown: #2468c8; --other: #8a4fb5; --good: #1a7f4b; --warn: #a86400;
  --bad: #c6302b; --dormant: #ecece7; --germinated: #cdebd6; --training: #98d3ac; --blending: #5cb57f;
  --holding: #2b8d5b; --fossilized: #0e5233; --pruned: #c6302b; --embargoed: #e6b9a8; --resetting: #cfc7bf; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #161715; --card: #1f201e; --ink: #ecece8;
  --quiet: #a5a7a0; --line: #393b37; --static: #9a9c95; --reference: #e39a45; --grown: #6aa5f5; --other: #c08be8;
  --good: #4cc38a; --warn: #e0a33a; --bad: #f0716b; --dormant: #2b2d2a; --germinated: #24473a; --training: #2c6a4e;
  --blending: #379067; --holding: #56bd8b; --fossilized: #a6ecc9; --pruned: #f0716b; --embargoed: #7a4a3f;
  --resetting: #57524c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; } h2 { font-size: 18px; margin: 0 0 10px; }
header p { margin: 4px 0 0; overflow-wrap: anywhere; } .quiet { color: var(--quiet); }
section { margin-top: 34px; }
.health { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 18px 0 0; padding: 10px 0;
  border-block: 1px solid var(--line); font-size: 14px; }
.sign { display: inline-block; width: 18px; font-weight: 700; } .sign.good { color: var(--good); }
.sign.warn { color: var(--warn); } .sign.bad { color: var(--bad); }
.verdict { font-size: 19px; line-height: 1.4; margin: 20px 0; padding-left: 14px; border-left: 4px solid var(--quiet); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.numbers dt { font-size: 13px; color: var(--quiet); } .numbers dd { margin: 0; font-size: 20px; font-weight: 600; }
.numbers dd span { display: block; font-size: 12px; font-weight: 400; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 13px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 2px; } .arm { white-space: nowrap; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:target td { background: color-mix(in srgb, var(--warn) 18%, transparent); }
.scroll { overflow-x: auto; }
figure { margin: 0 0 22px; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 0 0 12px; }
.swatch { display: inline-block; width: 14px; height: 10px; border-radius: 2px; margin-right: 6px;
  background: var(--c); }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 7px 0 2px; background: var(--bad); }
.key.diamond { transform: rotate(45deg) scale(.85); }
.key.triangle { background: var(--warn); clip-path: polygon(50% 0, 100% 100%, 0 100%); }
details { border-top: 1px solid var(--line); } figure + details, .scroll + details { margin-top: 8px; }
details[id] { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px;
  padding: 0 14px; }
details:target { border-color: var(--warn); }
summary { cursor: pointer; padding: 8px 0; font-size: 14px; font-weight: 600; }
pre { margin: 0 0 12px; padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.command { user-select: all; }
.story { display: flex; flex-wrap: wrap; gap: 8px 28px; padding-bottom: 8px; }
.story dl { flex: 2 1 340px; } .story figure { flex: 1 1 260px; margin: 0; }
.story figcaption { font-weight: 400; font-size: 13px; color: var(--quiet); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 14px; }
.facts dt { color: var(--quiet); } .facts dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 34px; border-top: 1px solid var(--line); font-size: 13px; } footer p { margin: 6px 0 0; }
svg { display: block; } svg a { cursor: pointer; }
.chart { width: 100%; min-width: 600px; height: auto; } .sparkline { width: 260px; max-width: 100%; height: 56px; }
.interval { width: 128px; height: 18px; margin-top: 2px; }
text { font-size: 11.5px; fill: var(--ink); } .tick { fill: var(--quiet); font-variant-numeric: tabular-nums; }
.right { text-anchor: end; } .middle { text-anchor: middle; } .name, .slot { font-size: 12px; font-weight: 600; }
.birth { fill: var(--quiet); font-size: 11px; }
path { fill: none; } .grid, .rail { stroke: var(--line); } .axis { stroke: var(--quiet); }
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
@media (max-width: 720px) { main { padding: 18px 12px 40px; } table { font-size: 12px; } th { font-size: 11.5px; }
  th, td { padding-right: 6px; } .picture { display: none; } .verdict { font-size: 17px; } }
@media print { body { font-size: 12px; } main { max-width: none; padding: 0; } .chart { min-width: 0; }
  figure, .story, tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""
