"""The report of a population, made from its log alone: scores, who took over whom, what was searched, and what paid.

Source: standard library only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

from morphogen.telemetry.jsonl import (
    ReadResult,
    Record,
    elapsed_seconds,
    last_of,
    list_in,
    mapping_in,
    number_in,
    of_kind,
    text_in,
)
from morphogen.telemetry.markup import (
    Figure,
    Markup,
    Point,
    document,
    folded,
    legend,
    number,
    section,
    table,
    table_of,
    tag,
    yaml,
)
from morphogen.telemetry.pbt_charts import Arrow, Bar, Life, LineageChart, Loss, lineage_chart, share_bars
from morphogen.telemetry.pbt_history import History, Report, Stretch, Takeover, history_of
from morphogen.telemetry.report_charts import Line, LineChart, line_chart
from morphogen.telemetry.report_page import STYLE, count_text, health, time_text

_STEPS = "steps of each member"


def population_page(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> str:
    """Return the report of the job whose records are in ``log``, as one complete HTML document.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    records = log.records
    start, history = last_of(records, "PopulationStarted") or {}, history_of(records)
    best = _best(records, history)
    lineage = () if best is None else history.lineage(best)
    title = f"{text_in(start, 'subject')}: a population of {text_in(start, 'population_size')}"
    verdict = _verdict(records, best)
    sections = (
        tag("ul", *map(health, _health(log, history)), class_="health"),
        tag("p", verdict.value, class_=f"verdict {verdict.tone}"),
        tag("dl", *map(number, _numbers(records, history, best)), class_="numbers"),
        section("Scores", _legend(), _figure(_scores(history, lineage))),
        section("Who took over whom", _lineage_legend(), _lineage(history, lineage)),
        section("Hyperparameters", _legend(), *map(_figure, _schedules(start, history, lineage))),
        section("Success of exploits by strategy", *_success(history)),
        section("Members", _members(history)),
        section("Takeovers", folded("Every takeover and exploration", _takeovers(history)), *_trouble(records)),
        section("Configuration", *_configuration(start, config, summary)),
        section("Run it again", tag("pre", text_in(start, "command"), class_="command")),
    )
    header = tag("header", tag("h1", title), tag("p", f"{name}, {len(records):,} records", class_="quiet"))
    return document(title, STYLE, [header, *sections])


# -- head -------------------------------------------------------------------------------------------------------------


def _best(records: Sequence[Record], history: History) -> Report | None:
    """Return the last report of whom the job chose; before its end, of whoever is best now."""
    end = last_of(records, "PopulationFinished")
    chosen = [] if end is None else history.of_member(int(number_in(end, "best") or 0))
    return chosen[-1] if chosen else history.best


def _verdict(records: Sequence[Record], best: Report | None) -> Figure:
    fault = last_of(records, "PopulationFaulted")
    if fault is not None and records[-1] is fault:
        words = f"Stopped by {text_in(fault, 'kind')}: {text_in(fault, 'message')}"
        return Figure(name="verdict", value=words, tone="bad")
    if best is None:
        return Figure(name="verdict", value="No member has a score yet.")
    values = ", ".join(f"{name} {_value_text(value)}" for name, value in best.hyperparameters.items())
    is_done = last_of(records, "PopulationFinished") is not None
    words = "Best" if is_done else "Best so far"
    return Figure(name="verdict", value=f"{words}: member {best.member}, score {best.score:.6g}, with {values}.")


def _health(log: ReadResult, history: History) -> tuple[Figure, ...]:
    done = min((len(history.of_member(member)) for member in range(history.population_size)), default=0)
    total = math.ceil(history.total_steps / history.interval_steps) if history.interval_steps else 0
    is_done = last_of(log.records, "PopulationFinished") is not None
    words = "finished" if is_done else f"not finished: interval {done} of {total}"
    return (
        Figure(name="run", value=words, tone="good" if is_done else "warn"),
        _alarm("members lost", sum(bool(report.problem) for report in history.reports.values())),
        _alarm("scores that are no number", sum(_is_bad(report) for report in history.reports.values())),
        _alarm("sources refused", len(of_kind(log.records, "SourceRefused"))),
        _alarm("faults", len(of_kind(log.records, "PopulationFaulted"))),
        _alarm("malformed lines", log.malformed_count),
    )


def _is_bad(report: Report) -> bool:
    return not report.problem and not math.isfinite(report.score)


def _alarm(name: str, count: int) -> Figure:
    return Figure(name=name, value=f"{count:,}", tone="warn" if count else "good")


def _numbers(records: Sequence[Record], history: History, best: Report | None) -> tuple[Figure, ...]:
    exploits = sum(each.is_exploit for each in history.takeovers)
    cpu_seconds = sum(number_in(record, "cpu_seconds") or 0.0 for record in of_kind(records, "MemberReported"))
    values = (
        ("best score", "n/a" if best is None else f"{best.score:.6g}", ""),
        ("members", f"{history.population_size}", ""),
        ("steps", count_text(history.total_steps), "of each member"),
        ("exploits", f"{exploits}", "members taken over"),
        ("explorations", f"{len(history.takeovers) - exploits}", "without a takeover"),
        ("training", time_text(cpu_seconds), "of CPU time"),
        ("wall time", time_text(elapsed_seconds(records)), "up to the last record"),
    )
    return tuple(Figure(name=name, value=value, note=note) for name, value, note in values)


# -- curves -----------------------------------------------------------------------------------------------------------


def _figure(content: LineChart) -> Markup:
    return tag("figure", tag("figcaption", content.label), line_chart(content))


def _legend() -> Markup:
    return legend([("best lineage", "swatch arm-grown"), ("each member", "swatch arm-other")], "")


def _scores(history: History, lineage: Sequence[Stretch]) -> LineChart:
    lines = [_line(member, _score_points(history, history.of_member(member))) for member in range(history.population_size)]
    best = _score_points(history, _reports_of(history, lineage))
    return _chart(history, "score at the end of each interval", [*lines, _best_line(best)])


def _score_points(history: History, reports: Iterable[Report]) -> tuple[Point, ...]:
    points = ((float(history.step_after(report.interval)), report.score) for report in reports)
    return _forwards(point for point in points if math.isfinite(point[1]))


def _schedules(start: Record, history: History, lineage: Sequence[Stretch]) -> list[LineChart]:
    """Return a chart for each hyperparameter; what is searched on a log scale is drawn on one."""
    charts: list[LineChart] = []
    for name, kind in mapping_in(start, "kinds").items():
        choices = [_key(value) for value in list_in(mapping_in(start, "choices"), name)]
        place = functools.partial(_place, str(kind), choices)
        text = functools.partial(_place_text, str(kind), choices)
        lines = [
            _line(member, _values(history, history.of_member(member), name, place)) for member in range(history.population_size)
        ]
        best = _values(history, _reports_of(history, lineage), name, place)
        charts.append(_chart(history, name, [*lines, _best_line(best)], text))
    return charts


def _values(
    history: History, reports: Iterable[Report], name: str, place: Callable[[object], float | None]
) -> tuple[Point, ...]:
    """Return the values in use, level within each interval."""
    points: list[Point] = []
    for report in reports:
        value = place(report.hyperparameters.get(name))
        if value is not None and math.isfinite(value):
            points += [(history.step_after(report.interval - 1), value), (history.step_after(report.interval), value)]
    return _forwards(points)


def _place(kind: str, choices: Sequence[str], value: object) -> float | None:
    """Return where ``value`` is drawn: at its logarithm on a log scale, at its number among choices."""
    if choices:
        return float(choices.index(_key(value))) if _key(value) in choices else None
    if not isinstance(value, int | float):
        return None
    return math.log10(value) if kind == "log_float" and value > 0 else float(value)


def _place_text(kind: str, choices: Sequence[str], place: float) -> str:
    """Return which value is drawn at ``place``."""
    if choices:
        index = round(place)
        return choices[index] if abs(place - index) < 1e-6 and 0 <= index < len(choices) else ""
    return f"{10**place:.2g}" if kind == "log_float" else f"{place:.4g}"


def _key(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reports_of(history: History, lineage: Sequence[Stretch]) -> list[Report]:
    keys = [(part.member, interval) for part in lineage for interval in range(part.first, part.last + 1)]
    return [history.reports[key] for key in keys if key in history.reports]


def _forwards(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return ``points`` without those behind the one before: an asynchronous source may be less far than who took it over."""
    kept: list[Point] = []
    for point in points:
        if not kept or point[0] >= kept[-1][0]:
            kept.append(point)
    return tuple(kept)


def _line(member: int, points: tuple[Point, ...]) -> Line:
    return Line(points=points, arm="member", kind="repeat", title=f"member {member}")


def _best_line(points: tuple[Point, ...]) -> Line:
    return Line(points=points, arm="grown", kind="mean", title="best lineage", label="best")


def _chart(history: History, label: str, lines: Sequence[Line], value_text: Callable[[float], str] | None = None) -> LineChart:
    return LineChart(
        label=label,
        lines=tuple(lines),
        value_text=value_text or (lambda value: f"{value:.4g}"),
        last_step=history.total_steps,
        steps_name=_STEPS,
    )


# -- who took over whom -----------------------------------------------------------------------------------------------


def _lineage_legend() -> Markup:
    words = "a dot: a takeover, at the end of a line from its source; ✕: a member that was lost"
    return legend([("best lineage", "swatch arm-grown"), ("others", "swatch arm-other")], words)


def _lineage(history: History, lineage: Sequence[Stretch]) -> Markup:
    entries = {(part.member, part.first - 1) for part in lineage if part.first > 1}
    lives = [
        Life(member=member, start=0, end=history.step_after(reports[-1].interval), is_best=False)
        for member in range(history.population_size)
        if (reports := history.of_member(member))
    ]
    best = [
        Life(
            member=part.member,
            start=history.step_after(part.first - 1),
            end=history.step_after(part.last),
            is_best=True,
        )
        for part in lineage
    ]
    chart = LineageChart(
        label="who took over whom",
        population_size=history.population_size,
        last_step=history.total_steps,
        lives=(*lives, *best),
        arrows=tuple(
            Arrow(
                member=each.member,
                step=history.step_after(each.interval),
                source=each.source,
                source_step=history.step_after(each.source_interval),
                title=_takeover_text(history, each),
                is_best=(each.member, each.interval) in entries,
            )
            for each in history.takeovers
            if each.is_exploit
        ),
        losses=tuple(
            Loss(
                member=report.member,
                step=history.step_after(report.interval),
                title=f"member {report.member} was lost: {_first_line(report.problem)}",
            )
            for report in history.reports.values()
            if report.problem
        ),
    )
    return lineage_chart(chart)


def _takeover_text(history: History, each: Takeover) -> str:
    step = history.step_after(each.interval)
    scores = f"{_score_text(each.score_before)} against {_score_text(each.source_score)}"
    return f"member {each.member} took over member {each.source} after {step:,} steps ({each.reason}: {scores})"


# -- tables -----------------------------------------------------------------------------------------------------------


def _success(history: History) -> list[Markup]:
    rows = history.success()
    if not rows:
        return [tag("p", "No exploit yet.", class_="quiet")]
    words = "An exploit is a success where the member scores better an interval later."
    cells = [
        (
            row.strategy,
            f"{row.exploits}",
            _share_text(row.above_own_past),
            _share_text(row.above_source),
            _score_text(row.mean_gain_on_source, "+.4g"),
        )
        for row in rows
    ]
    bars = [
        Bar(name=f"{row.strategy}, above {than}", share=share, text=_share_text(share))
        for row in rows
        for than, share in (("its own past", row.above_own_past), ("its source", row.above_source))
    ]
    columns = "moments|exploits with a score since|above its own past|above its source|mean gain on its source"
    sheet = table(table_of(columns, cells, numeric=columns.removeprefix("moments|")))
    return [tag("p", words, class_="quiet"), sheet, share_bars("success of exploits by strategy", bars)]


def _members(history: History) -> Markup:
    names = sorted({name for report in history.reports.values() for name in report.hyperparameters})
    rows: list[tuple[str, ...]] = []
    for member in range(history.population_size):
        reports = history.of_member(member)
        if not reports:
            continue
        own = [each for each in history.takeovers if each.member == member and each.is_exploit]
        last = reports[-1]
        parent = f"{own[-1].source} at {history.step_after(own[-1].source_interval):,}" if own else "-"
        values = (_value_text(last.hyperparameters.get(name, "-")) for name in names)
        score = "lost" if last.problem else _score_text(last.score)
        rows.append((f"{member}", f"{last.interval}", score, *values, parent, f"{len(own)}"))
    columns = "|".join(("member", "interval", "score", *names, "last parent", "exploits"))
    return table(table_of(columns, rows, numeric=columns))


def _takeovers(history: History) -> Markup:
    rows = [
        (
            f"{history.step_after(each.interval):,}",
            f"{each.member}",
            f"{each.source}" if each.is_exploit else "-",
            each.reason,
            _score_text(each.score_before),
            _score_text(each.source_score),
            "n/a" if each.score_after is None else _score_text(each.score_after),
            each.strategy if each.is_exploit else "-",
        )
        for each in history.takeovers
    ]
    columns = "steps|member|source|reason|score before|score of the source|score an interval later|moments"
    numeric = "steps|member|source|score before|score of the source|score an interval later"
    return table(table_of(columns, rows, numeric=numeric))


def _trouble(records: Sequence[Record]) -> list[Markup]:
    rows = [
        (text_in(record, "member"), "lost", _first_line(text_in(record, "problem")))
        for record in of_kind(records, "MemberLost")
    ]
    rows += [
        (text_in(record, "member"), f"could not take over {text_in(record, 'source')}", _first_line(text_in(record, "reason")))
        for record in of_kind(records, "SourceRefused")
    ]
    return [folded("Trouble", table(table_of("member|what|why", rows, numeric="member")))] if rows else []


def _configuration(start: Record, config: str, summary: str) -> list[Markup]:
    parts = {
        "Settings": config or yaml(mapping_in(start, "config")),
        "Versions": yaml(mapping_in(start, "versions")),
        "summary.json": summary,
    }
    return [folded(heading, tag("pre", text)) for heading, text in parts.items() if text]


def _share_text(share: float) -> str:
    return f"{100 * share:.0f}%" if math.isfinite(share) else "n/a"


def _score_text(score: float, form: str = ".6g") -> str:
    return f"{score:{form}}" if math.isfinite(score) else "n/a"


def _value_text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _first_line(text: str) -> str:
    return text.split("\n")[0]
