"""The report of a PPO job, made from its log alone: what the agent reached, and how it learned.

Source: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from morphogen.telemetry.jsonl import (
    ReadResult,
    Record,
    elapsed_seconds,
    last_of,
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
    number,
    section,
    table,
    table_of,
    tag,
    yaml,
)
from morphogen.telemetry.report_charts import Line, LineChart, line_chart
from morphogen.telemetry.report_page import STYLE, count_text, health, time_text

_CURVES = (
    ("KL from the policy of the rollout, in nats", "KL", "kl"),
    ("explained variance of returns, before the update", "EV", "explained_variance"),
    ("entropy of the actions, in nats", "entropy", "entropy"),
    ("environment steps per second", "steps/s", "steps_per_second"),
)


def ppo_page(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> str:
    """Return the report of the job whose records are in ``log``, as one complete HTML document.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    records = log.records
    start = last_of(records, "PPOStarted") or {}
    title = f"{text_in(start, 'env')}: PPO"
    header = tag("header", tag("h1", title), tag("p", f"{name}, {len(records):,} records", class_="quiet"))
    verdict = _verdict(records)
    sections = (
        tag("ul", *map(health, _health(log, start)), class_="health"),
        tag("p", verdict.value, class_=f"verdict {verdict.tone}"),
        tag("dl", *map(number, _numbers(records, start)), class_="numbers"),
        section("Curves", *map(_figure, _charts(records, start))),
        section("Evaluations", _evaluations(records)),
        section("Configuration", *_configuration(start, config, summary)),
        section("Run it again", tag("pre", text_in(start, "command"), class_="command")),
    )
    return document(title, STYLE, [header, *sections])


def _health(log: ReadResult, start: Record) -> tuple[Figure, ...]:
    records = log.records
    updates = of_kind(records, "Updated")
    skipped = sum(int(number_in(update, "skipped_minibatches") or 0) for update in updates)
    is_done = last_of(records, "PPOFinished") is not None
    done = number_in(last_of(records, "Updated") or {}, "step") or 0
    words = "finished" if is_done else f"not finished: step {done:,.0f} of {count_text(number_in(start, 'total_steps'))}"
    return (
        Figure(name="run", value=words, tone="good" if is_done else "warn"),
        _alarm("skipped minibatches", skipped),
        _alarm("faults", len(of_kind(records, "PPOFaulted"))),
        _alarm("episodes begun anew after resuming", len(of_kind(records, "EpisodesRestarted"))),
        _alarm("malformed lines", log.malformed_count),
    )


def _alarm(name: str, count: int) -> Figure:
    return Figure(name=name, value=f"{count:,}", tone="warn" if count else "good")


def _verdict(records: Sequence[Record]) -> Figure:
    fault, last = last_of(records, "PPOFaulted"), last_of(records, "Evaluated")
    if last_of(records, "PPOFinished") is None and fault is not None and records[-1] is fault:
        return Figure(name="verdict", value=f"Stopped by {text_in(fault, 'kind')}: {text_in(fault, 'message')}", tone="bad")
    if last is None:
        return Figure(name="verdict", value="Not evaluated yet.")
    episodes, step = text_in(last, "episodes"), count_text(number_in(last, "step"))
    value = f"Return {_return_text(last)} over {episodes} evaluation episodes after {step} steps (mean ± standard deviation)."
    return Figure(name="verdict", value=value)


def _return_text(evaluated: Record) -> str:
    return f"{text_in(evaluated, 'mean_return')} ± {text_in(evaluated, 'std_return')}"


def _numbers(records: Sequence[Record], start: Record) -> tuple[Figure, ...]:
    last = last_of(records, "Updated") or {}
    speeds = [speed for update in of_kind(records, "Updated") if (speed := number_in(update, "steps_per_second"))]
    values = (
        ("steps", count_text(number_in(last, "step")), f"of {count_text(number_in(start, 'total_steps'))}"),
        ("updates", count_text(number_in(last, "update")), ""),
        ("episodes", count_text(number_in(last, "episodes")), "in training"),
        ("return", text_in(last, "mean_return"), "last 100 training episodes"),
        ("length", text_in(last, "mean_length"), "last 100 training episodes"),
        ("parameters", count_text(number_in(start, "parameters")), ""),
        ("speed", count_text(sum(speeds) / len(speeds) if speeds else None), "steps per second"),
        ("wall time", time_text(elapsed_seconds(records)), "up to the last record"),
    )
    return tuple(Figure(name=name, value=value, note=note) for name, value, note in values)


def _charts(records: Sequence[Record], start: Record) -> tuple[LineChart, ...]:
    updates, last_step = of_kind(records, "Updated"), number_in(start, "total_steps") or 0
    lines = [_line("training", "mean of the last 100 training episodes", _points(updates, "mean_return"))]
    evaluated = _points(of_kind(records, "Evaluated"), "mean_return")
    if len(evaluated) > 1:  # a single one is in the words above
        lines.append(_line("grown", "evaluation", evaluated, label="evaluation"))
    others = [(label, _line("training", label, _points(updates, field), short)) for label, short, field in _CURVES]
    return (
        _chart("undiscounted return of episodes", lines, last_step),
        *(_chart(label, [line], last_step) for label, line in others),
    )


def _points(records: Sequence[Record], name: str) -> tuple[Point, ...]:
    measured = ((number_in(record, "step"), number_in(record, name)) for record in records)
    return tuple((x, y) for x, y in measured if x is not None and y is not None and math.isfinite(y))


def _line(arm: str, title: str, points: tuple[Point, ...], label: str = "") -> Line:
    return Line(points=points, arm=arm, kind="mean", title=title, label=label)


def _chart(label: str, lines: Sequence[Line], last_step: float) -> LineChart:
    return LineChart(
        label=label,
        lines=tuple(lines),
        value_text=lambda value: f"{value:.4g}",
        last_step=last_step,
        steps_name="environment steps",
    )


def _figure(chart: LineChart) -> Markup:
    return tag("figure", tag("figcaption", chart.label), line_chart(chart))


def _evaluations(records: Sequence[Record]) -> Markup:
    rows = (
        (
            count_text(number_in(record, "step")),
            _return_text(record),
            text_in(record, "mean_length"),
            text_in(record, "episodes"),
        )
        for record in of_kind(records, "Evaluated")
    )
    columns = "step|return, mean ± deviation|length|episodes"
    return table(table_of(columns, rows, numeric=columns))


def _configuration(start: Record, config: str, summary: str) -> list[Markup]:
    parts = {
        "Settings": config or yaml(mapping_in(start, "config")),
        "Spaces": f"observations: {text_in(start, 'observation_space')}\nactions: {text_in(start, 'action_space')}",
        "Versions": yaml(mapping_in(start, "versions")),
        "summary.json": summary,
    }
    return [folded(heading, tag("pre", text)) for heading, text in parts.items() if text]
