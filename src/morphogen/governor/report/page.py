"""A governor's report as one HTML page that loads nothing, for light and dark screens and for paper."""

from __future__ import annotations

from collections.abc import Sequence

from morphogen.governor.report import words
from morphogen.governor.report.chart import axis_of, loss_chart
from morphogen.governor.report.timeline import History
from morphogen.governor.report.words import GovernorSummary
from morphogen.telemetry.markup import (
    BASE_STYLE,
    DARK,
    DARK_SIGNALS,
    LIGHT,
    LIGHT_SIGNALS,
    NARROW_AND_PRINT_STYLE,
    Figure,
    Markup,
    Table,
    document,
    folded,
    number,
    section,
    table,
    tag,
    yaml,
)

_MAX_OPEN_FINDINGS = 20
_TONES = {"healthy": "good", "collapsed": "bad", "suspicious": "warn", "recovering": "warn"}


def page_of(history: History, summary: GovernorSummary) -> str:
    """Return the report as a complete HTML document."""
    body = [tag("header", tag("h1", "Governor report")), *_verdict(history, summary)]
    if summary.observations or history.observed:
        body += [tag("dl", *map(number, _figures(history)), class_="numbers"), *_sections(history)]
    return document("Governor report", _STYLE, [*body, *_setup(summary)]).encode("utf-8", "replace").decode()


def _verdict(history: History, summary: GovernorSummary) -> list[Markup]:
    tone = _TONES.get(words.status_of(history, summary), "") if summary.observations else ""
    parts = [tag("p", _capitalised(words.headline(history, summary)), class_=f"verdict {tone}")]
    advice = words.advice(history, summary)
    if history.collapse is not None:
        reason = words.plain(history.collapse.reason)
        parts.append(tag("p", f"Collapsed at step {words.number_text(history.collapse.step)}: {reason}", class_="collapse"))
    if advice:
        parts.append(section("What to do next", tag("ul", *(tag("li", item) for item in advice), class_="advice")))
    return parts


def _figures(history: History) -> list[Figure]:
    measured = [bucket for bucket in history.curve if bucket.is_measured]
    good = [entry for entry in history.snapshots.latest if entry.promoted is not None and entry.dropped is None]
    figures: list[Figure] = []
    if measured:
        lowest = words.number_text(min(bucket.low for bucket in measured))
        figures += [Figure(name="last loss", value=words.number_text(measured[-1].last), note=f"lowest {lowest}")]
    if history.non_finite:
        figures.append(Figure(name="losses not finite", value=words.number_text(history.non_finite)))
    figures += [
        Figure(name="findings", value=words.number_text(history.findings.count)),
    ]
    if good:
        age = words.number_text(max(0, history.observed - good[-1].observed))
        value = f"step {words.number_text(good[-1].step)}"
        figures.append(Figure(name="last known good", value=value, note=f"{age} observations ago"))
    return figures


def _sections(history: History) -> list[Markup]:
    rewinds, findings, snapshots = history.rewinds, history.findings, history.snapshots
    skips = words.skip_rows(history)
    kept = _table(words.KEPT_COLUMNS, words.kept_rows(history), "step|observations ago")
    every = _table(words.SNAPSHOT_COLUMNS, words.snapshot_rows(history), "|".join(words.SNAPSHOT_COLUMNS))
    anchors = tuple(f"rewind-{rewinds.num_dropped + index}" for index in range(1, len(rewinds.latest) + 1))
    numeric = "#|observation|from step|to step|learning rate"
    parts = [
        section("Loss", _chart(history)) if history.curve else Markup(""),
        section(
            f"Rewinds {words.shown(rewinds)}" if rewinds.count else "Rewinds",
            _table(words.REWIND_COLUMNS, words.rewind_rows(history), numeric, anchors),
            *_put_back(history),
        ),
        section(f"Findings {words.shown(findings)}" if findings.count else "Findings", *_findings(history)),
        section("Snapshots", kept, *([folded(f"Every snapshot {words.shown(snapshots)}", every)] if snapshots.latest else [])),
    ]
    for title, rows in (("Steps skipped", skips), ("New levels accepted, parts taken out", words.note_rows(history))):
        if rows:
            listed = _table(words.SKIP_COLUMNS, rows, "observation|step")
            parts.append(section(title, folded(f"The last {len(rows):,}, with reasons", listed)))
    return parts


def _findings(history: History) -> list[Markup]:
    """The last findings, those before them folded."""
    rows = words.finding_rows(history)
    early, late = rows[:-_MAX_OPEN_FINDINGS], rows[-_MAX_OPEN_FINDINGS:]
    tables = [_table(words.FINDING_COLUMNS, part, "step|value|threshold") for part in (late, early)]
    return [tables[0], folded(f"The {len(early):,} before these", tables[1])] if early else tables[:1]


def _chart(history: History) -> Markup:
    facts = words.loss_line(history)
    measured = [bucket for bucket in history.curve if bucket.is_measured]
    is_log = bool(measured) and axis_of(measured).is_log
    scale = " on a log scale" if is_log else ""
    happened = f"{history.rewinds.count:,} rewinds, {history.skips.count:,} skipped steps, {history.findings.count:,} findings"
    label = f"Loss{scale} over {history.observed:,} observations: {facts}; {happened}"
    many = len(history.curve) < history.observed
    notes = [*(["log scale"] if is_log else []), *(["line: last of each stretch; band: lowest to highest"] if many else [])]
    hint = "○ snapshot taken, ● proved good; ◆ and arc: a rewind, back to where its snapshot was taken"
    caption = [tag("figcaption", "; ".join(notes), class_="quiet hint")] if notes else []
    return tag("figure", *caption, loss_chart(history, label), tag("p", hint, class_="legend quiet"))


def _put_back(history: History) -> list[Markup]:
    """What each rewind put back, once where it was always the same."""
    parts = [", ".join(map(words.plain, entry.event.parts)) for entry in history.rewinds.latest]
    if not parts:
        return []
    if len(set(parts)) == 1:
        return [tag("p", f"Put back each time: {parts[0]}.", class_="quiet")]
    numbers = range(history.rewinds.num_dropped + 1, history.rewinds.count + 1)
    rows = tuple((words.number_text(index), part) for index, part in zip(numbers, parts, strict=True))
    return [folded("What was put back", _table(("#", "parts"), rows, "#"))]


def _setup(summary: GovernorSummary) -> list[Markup]:
    parts: list[Markup] = []
    if summary.detectors:
        parts.append(tag("p", f"Detectors: {words.plain(', '.join(summary.detectors))}.", class_="detectors"))
    if summary.config:
        parts.append(folded("Settings", tag("pre", yaml(dict(summary.config)))))
    return [section("Configuration", *parts)] if parts else []


def _table(columns: Sequence[str], rows: words.Rows, numeric: str = "", ids: tuple[str, ...] = ()) -> Markup:
    return table(Table(columns=tuple(columns), rows=rows, numeric=frozenset(numeric.split("|")), ids=ids))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


_COLOURS = f"""
:root {{ color-scheme: light dark; {LIGHT} {LIGHT_SIGNALS} --loss: #2468c8; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} {DARK_SIGNALS} --loss: #6aa5f5; }} }}
"""

_CHART_STYLE = """\
.verdict.warn { border-color: var(--warn); } .verdict { font-weight: 600; }
.collapse, td { overflow-wrap: anywhere; } .advice { margin: 0; padding-left: 20px; } .advice li { margin-bottom: 6px; }
.hint { font-weight: 400; font-size: 13px; } figure .legend { margin: 4px 0 0; }
th { white-space: nowrap; } th, td { padding-right: 22px; } td:last-child { min-width: 220px; width: 99%; }
.numbers { margin-top: 24px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
td:not(:last-child) { white-space: nowrap; }
section > .scroll + .quiet { font-size: 14px; margin: 8px 0 0; } .detectors { margin: 0 0 8px; }
.band { fill: var(--loss); opacity: .2; } .loss { stroke: var(--loss); stroke-width: 1.6; stroke-linejoin: round; }
.end { fill: var(--loss); stroke: var(--page); stroke-width: 1.5; } .quiet-text { fill: var(--quiet); }
.beyond { fill: var(--loss); } .taken-back { fill: var(--bad); opacity: .1; }
.arc { stroke: var(--bad); stroke-width: 1.6; } .sign-rewind { fill: var(--bad); stroke: var(--page); }
.sign-finding { fill: var(--warn); stroke: var(--page); } .sign-skipped { stroke: var(--warn); stroke-width: 2; }
.sign-non-finite { stroke: var(--bad); stroke-width: 2.4; }
.sign-level, .sign-quarantine { stroke: var(--ink); stroke-width: 2; }
.sign-taken { fill: var(--page); stroke: var(--quiet); stroke-width: 1.5; }
.sign-promoted { fill: var(--good); stroke: var(--page); }
"""

_STYLE = _COLOURS + BASE_STYLE + _CHART_STYLE + NARROW_AND_PRINT_STYLE
