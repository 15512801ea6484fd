"""The report of an evaluation, made from its log alone: who does better on the same held-out episodes, and at what cost.

Source: standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from morphogen.telemetry.jsonl import (
    ReadResult,
    Record,
    elapsed_seconds,
    last_of,
    list_in,
    mapping_in,
    number_in,
    of_kind,
    records_in,
    text_in,
)
from morphogen.telemetry.markup import Figure, Markup, document, folded, number, section, table, table_of, tag, yaml
from morphogen.telemetry.metrics import difference_texts, interval_text, metric_text
from morphogen.telemetry.report_charts import interval_bar
from morphogen.telemetry.report_page import STYLE, count_text, health, time_text
from morphogen.telemetry.scatter_chart import ScatterChart, ScatterPoint, is_drawable, scatter_chart

_CLASSES = {"learned": "arm-grown", "wait": "arm-static", "heuristic": "arm-reference"}


def evaluation_page(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> str:
    """Return the report of the job whose records are in ``log``, as one complete HTML document.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    records = log.records
    start, end = last_of(records, "EvaluationStarted") or {}, last_of(records, "EvaluationFinished") or {}
    metric = text_in(start, "metric_name", "accuracy")
    transfer = text_in(start, "task") != text_in(start, "trained_on")
    title = f"{text_in(start, 'task')}: {text_in(start, 'policy')}"
    title += f", trained on {text_in(start, 'trained_on')} (transfer)" if transfer else ""
    header = tag("header", tag("h1", title), tag("p", f"{name}, {len(records):,} records", class_="quiet"))
    rows = records_in(end, "rows")
    sections = (
        tag("ul", *map(health, _health(log, start)), class_="health"),
        *_verdict(end),
        tag("dl", *map(number, _numbers(records, start)), class_="numbers"),
        section("Players", _players(rows, metric), _note()),
        section("The learned policy minus each other, on the same seeds", _differences(end, metric)),
        section("Pareto fronts", *map(_figure, _charts(rows, metric))),
        section("Episodes", folded("Every episode", _episodes(records, metric))),
        section("Configuration", *_configuration(start, config, summary)),
        section("Run it again", tag("pre", text_in(start, "command"), class_="command")),
    )
    return document(title, STYLE, [header, *sections])


def _health(log: ReadResult, start: Record) -> tuple[Figure, ...]:
    records = log.records
    played, is_done = of_kind(records, "EpisodePlayed"), last_of(records, "EvaluationFinished") is not None
    total = int(number_in(start, "episodes") or 0) * len(list_in(start, "players"))
    words = "finished" if is_done else f"not finished: {len(played)} of {total} episodes"
    rollbacks = sum(record.get("rolled_back") is True for record in played)
    return (
        Figure(name="run", value=words, tone="good" if is_done else "warn"),
        _alarm("episodes ended by the governor", rollbacks),
        _alarm("malformed lines", log.malformed_count),
    )


def _alarm(name: str, count: int) -> Figure:
    return Figure(name=name, value=f"{count:,}", tone="warn" if count else "good")


def _verdict(end: Record) -> list[Markup]:
    said = [str(words) for words in list_in(end, "sentences")]
    if not said:
        return [tag("p", "No verdict yet: not every episode has been played.", class_="verdict")]
    return [tag("p", words, class_=f"verdict {_tone(words)}") for words in said]


def _tone(words: str) -> str:
    if " beats " in words or words.startswith("It is on "):
        return "good"
    return "bad" if " loses to " in words or words.startswith("It is not on ") else ""


def _numbers(records: Sequence[Record], start: Record) -> tuple[Figure, ...]:
    values = (
        ("episodes", text_in(start, "episodes"), "of each player, on held-out seeds"),
        ("players", f"{len(list_in(start, 'players'))}", ""),
        ("wall time", time_text(elapsed_seconds(records)), "up to the last record"),
    )
    return tuple(Figure(name=name, value=value, note=note) for name, value, note in values)


def _players(rows: Sequence[Record], metric: str) -> Markup:
    cells = [
        (
            text_in(row, "player"),
            _estimate_text(mapping_in(row, "test_metric"), metric),
            count_text(number_in(row, "parameters")),
            text_in(row, "relative_flops"),
            _return_text(mapping_in(row, "total_return")),
            text_in(row, "rollbacks"),
            _front_text(row),
        )
        for row in rows
    ]
    columns = f"player|test {metric}|parameters|training FLOPs, host = 1|return|rollbacks|Pareto front"
    return table(table_of(columns, cells, numeric=columns.removeprefix("player|").removesuffix("|Pareto front")))


def _note() -> Markup:
    words = "Means over the episodes, with 95% bootstrap intervals; fronts are those of the means."
    return tag("p", words, class_="quiet")


def _front_text(row: Record) -> str:
    fronts = (("parameters", "on_parameters_front"), ("FLOPs", "on_flops_front"))
    return ", ".join(words for words, name in fronts if row.get(name) is True) or "-"


def _estimate_text(estimate: Record, metric: str) -> str:
    mean, low, high = (number_in(estimate, name) for name in ("mean", "low", "high"))
    return f"{metric_text(mean, metric)} {interval_text(low, high, metric)}"


def _return_text(estimate: Record) -> str:
    return f"{text_in(estimate, 'mean')} [{text_in(estimate, 'low')}, {text_in(estimate, 'high')}]"


def _differences(end: Record, metric: str) -> Markup:
    found = records_in(end, "differences")
    if not found:
        return tag("p", "None yet.", class_="quiet")
    names = ("against", "in", "95% interval, 0 in the middle", "mean difference", "interval")
    head = tag("tr", *(tag("th", name) for name in names))
    rows = [_difference(each, found, metric) for each in found]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def _difference(each: Record, found: Sequence[Record], metric: str) -> Markup:
    mean, low, high = _three(each)
    quantity = text_in(each, "quantity")
    alike = [value for other in found if text_in(other, "quantity") == quantity for value in _three(other)]
    reach = max(map(abs, alike)) or 1.0
    of_return = quantity == "total_return"
    values = (mean, low, high)
    shown, *ends = [f"{value:+.3g}" for value in values] if of_return else difference_texts(values, metric)
    bar = interval_bar(low, mean, high, (-reach, reach), _arm(text_in(each, "other")))
    cells = (
        text_in(each, "other"),
        "return" if of_return else f"test {metric}",
        bar,
        shown,
        f"[{', '.join(end.split()[0] for end in ends)}]",
    )
    return tag("tr", *(tag("td", cell) for cell in cells))


def _three(difference: Record) -> tuple[float, float, float]:
    estimate = mapping_in(difference, "estimate")
    mean, low, high = (number_in(estimate, name) or 0.0 for name in ("mean", "low", "high"))
    return mean, low, high


def _charts(rows: Sequence[Record], metric: str) -> tuple[ScatterChart, ...]:
    costs = (
        ("parameters", "parameters", "on_parameters_front", count_text),
        ("relative_flops", "training FLOPs over those of the host alone", "on_flops_front", _decimal_text),
    )
    return tuple(
        ScatterChart(
            label=f"test {metric} against {name}",
            points=tuple(_points(rows, field, front)),
            cost_name=name,
            cost_text=cost_text,
            value_text=lambda value: metric_text(value, metric),
        )
        for field, name, front, cost_text in costs
    )


def _points(rows: Sequence[Record], field: str, front: str) -> list[ScatterPoint]:
    points: list[ScatterPoint] = []
    for row in rows:
        estimate, player = mapping_in(row, "test_metric"), text_in(row, "player")
        numbers = (number_in(row, field), *(number_in(estimate, name) for name in ("mean", "low", "high")))
        if is_drawable(*numbers):
            cost, value, low, high = cast("tuple[float, float, float, float]", numbers)
            points.append(
                ScatterPoint(
                    name=player,
                    cost=cost,
                    value=value,
                    low=low,
                    high=high,
                    class_=_CLASSES.get(player, "arm-other"),
                    is_on_front=row.get(front) is True,
                )
            )
    return points


def _arm(player: str) -> str:
    return _CLASSES.get(player, "arm-other").removeprefix("arm-")


def _decimal_text(value: float) -> str:
    return f"{value:.3g}"


def _figure(chart: ScatterChart) -> Markup:
    return tag("figure", tag("figcaption", chart.label), scatter_chart(chart))


def _episodes(records: Sequence[Record], metric: str) -> Markup:
    rows = [
        (
            text_in(record, "player"),
            text_in(record, "seed"),
            metric_text(number_in(record, "test_metric"), metric),
            metric_text(number_in(record, "metric"), metric),
            text_in(record, "total_return"),
            count_text(number_in(record, "parameters")),
            text_in(record, "relative_flops"),
            text_in(record, "ticks"),
            "yes" if record.get("rolled_back") is True else "",
        )
        for record in of_kind(records, "EpisodePlayed")
    ]
    columns = f"player|seed|test {metric}|decision {metric}|return|parameters|training FLOPs|ticks|rolled back"
    return table(table_of(columns, rows, numeric=columns.removeprefix("player|")))


def _configuration(start: Record, config: str, summary: str) -> list[Markup]:
    parts = {
        "Settings": config or yaml(mapping_in(start, "config")),
        "How the policy was trained": text_in(start, "trained_by", ""),
        "Versions": yaml(mapping_in(start, "versions")),
        "summary.json": summary,
    }
    return [folded(heading, tag("pre", text)) for heading, text in parts.items() if text]
