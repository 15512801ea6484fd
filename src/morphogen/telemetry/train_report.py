"""The report of a train job, made from its log alone: what the networks came to, what was paid, and how the agent learned.

Source: standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from morphogen.telemetry.agent_report import Job, Page, chart, learning_charts, line, page, points, progress_numbers
from morphogen.telemetry.jsonl import ReadResult, Record, last_of, mapping_in, number_in, of_kind, text_in
from morphogen.telemetry.markup import Figure, Markup, section, table, table_of
from morphogen.telemetry.metrics import metric_text
from morphogen.telemetry.report_charts import LineChart
from morphogen.telemetry.report_page import count_text

_ARMS = ("training", "grown", "reference", "static")
_LAST_EPISODES = 20


def train_page(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> str:
    """Return the report of the job whose records are in ``log``, as one complete HTML document.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    job = Job(log=log, kind="Train", steps_name="decisions")
    metric = text_in(job.start, "metric_name")
    content = Page(
        title=f"{text_in(job.start, 'task')}: learning when to grow",
        verdict=job.stop() or _verdict(job, metric),
        numbers=_numbers(job, metric),
        charts=_charts(job, metric),
        sections=(
            section(
                "What was paid", _first_and_last(job, "term", "term|first update|last update", lambda value: f"{value:+.4g}")
            ),
            section("What was done", _first_and_last(job, "op", "share of decisions|first update|last update", _share_text)),
            section(f"Last {_LAST_EPISODES} episodes", _episodes(job, metric)),
        ),
    )
    return page(job, content, name=name, config=config, summary=summary)


def _verdict(job: Job, metric: str) -> Figure:
    end = job.finish
    if end is None:
        return Figure(name="verdict", value="Not trained to the end yet.")
    value = (
        f"Last {text_in(end, 'episodes')} episodes, means: return {text_in(end, 'mean_return')}, {metric} "
        f"{metric_text(number_in(end, 'metric'), metric)} on the decision split, {count_text(number_in(end, 'parameters'))} "
        "parameters. How the policy does on the test split, against others, says morphogen evaluate."
    )
    return Figure(name="verdict", value=value)


def _numbers(job: Job, metric: str) -> tuple[Figure, ...]:
    last = last_of(job.records, "EpisodesAveraged") or {}
    flops = number_in(last, "relative_flops")
    values = (
        ("return", text_in(job.last_update, "mean_return"), "last 100 episodes"),
        (metric, metric_text(number_in(last, "metric"), metric), "decision split, last update"),
        ("network", count_text(number_in(last, "parameters")), "parameters, last update"),
        ("compute", "n/a" if flops is None else f"{flops:.3g}x", "training FLOPs over the host's"),
        ("episodes", count_text(number_in(job.last_update, "episodes")), ""),
        ("ended by the governor", count_text(number_in(last, "rollbacks")), "episodes"),
    )
    return (*(Figure(name=name, value=value, note=note) for name, value, note in values), *progress_numbers(job))


def _charts(job: Job, metric: str) -> tuple[LineChart, ...]:
    updates, averaged = of_kind(job.records, "Updated"), of_kind(job.records, "EpisodesAveraged")
    last = averaged[-1] if averaged else {}
    paid = [
        line(name, points(averaged, name, "term"), name, arm=_ARMS[place % len(_ARMS)])
        for place, name in enumerate(_largest(mapping_in(last, "term")))
    ]
    returns = "mean of the last 100 episodes"
    return (
        chart(job, "undiscounted return of episodes", [line(returns, points(updates, "mean_return"))]),
        chart(
            job,
            f"{metric} at the end of episodes, on the decision split",
            [line(metric, points(averaged, "metric"), arm="grown")],
            lambda value: metric_text(value, metric),
        ),
        chart(
            job,
            "parameters at the end of episodes",
            [line("parameters", points(averaged, "parameters"), arm="grown")],
            count_text,
        ),
        chart(job, "largest terms of the reward, summed over an episode", paid),
        *learning_charts(job),
    )


def _largest(terms: Record) -> list[str]:
    sizes = {name: abs(number_in(terms, name) or 0.0) for name in terms}
    return sorted(sizes, key=lambda name: -sizes[name])[: len(_ARMS)]


def _first_and_last(job: Job, inside: str, columns: str, text: Callable[[float], str]) -> Markup:
    """Return what the networks of the first update and of the last came to, name by name."""
    averaged = of_kind(job.records, "EpisodesAveraged")
    first, last = (mapping_in(averaged[place], inside) if averaged else {} for place in (0, -1))
    rows = ((name, _text_or_none(first, name, text), _text_or_none(last, name, text)) for name in last)
    return table(table_of(columns, rows, numeric="first update|last update"))


def _share_text(value: float) -> str:
    return f"{100 * value:.1f}%"


def _text_or_none(values: Record, name: str, text: Callable[[float], str]) -> str:
    value = number_in(values, name)
    return "n/a" if value is None else text(value)


def _episodes(job: Job, metric: str) -> Markup:
    rows = (
        (
            count_text(number_in(record, "step")),
            text_in(record, "total_reward"),
            metric_text(number_in(record, "metric"), metric),
            count_text(number_in(record, "parameters")),
            text_in(record, "relative_flops"),
            text_in(record, "ticks"),
            "governor" if record.get("rolled_back") is True else "task",
        )
        for record in of_kind(job.records, "EpisodeFinished")[-_LAST_EPISODES:]
    )
    columns = f"decisions so far|return|{metric}|parameters|FLOPs over host's|ticks"
    return table(table_of(f"{columns}|ended by", rows, numeric=columns))
