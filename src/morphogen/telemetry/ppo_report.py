"""The report of a PPO job, made from its log alone: what the agent reached, and how it learned.

Source: standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from morphogen.telemetry.agent_report import Job, Page, chart, learning_charts, line, page, points, progress_numbers
from morphogen.telemetry.jsonl import ReadResult, Record, last_of, number_in, of_kind, text_in
from morphogen.telemetry.markup import Figure, Markup, section, table, table_of
from morphogen.telemetry.report_charts import LineChart
from morphogen.telemetry.report_page import count_text


def ppo_page(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> str:
    """Return the report of the job whose records are in ``log``, as one complete HTML document.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    job = Job(log=log, kind="PPO", steps_name="environment steps")
    start = job.start
    content = Page(
        title=f"{text_in(start, 'env')}: PPO",
        verdict=job.stop() or _verdict(job.records),
        numbers=_numbers(job),
        charts=_charts(job),
        sections=(section("Evaluations", _evaluations(job.records)),),
        spaces=f"observations: {text_in(start, 'observation_space')}\nactions: {text_in(start, 'action_space')}",
    )
    return page(job, content, name=name, config=config, summary=summary)


def _verdict(records: Sequence[Record]) -> Figure:
    last = last_of(records, "Evaluated")
    if last is None:
        return Figure(name="verdict", value="Not evaluated yet.")
    episodes, step = text_in(last, "episodes"), count_text(number_in(last, "step"))
    value = f"Return {_return_text(last)} over {episodes} evaluation episodes after {step} steps (mean ± standard deviation)."
    return Figure(name="verdict", value=value)


def _return_text(evaluated: Record) -> str:
    return f"{text_in(evaluated, 'mean_return')} ± {text_in(evaluated, 'std_return')}"


def _numbers(job: Job) -> tuple[Figure, ...]:
    last = job.last_update
    values = (
        ("return", text_in(last, "mean_return"), "last 100 training episodes"),
        ("length", text_in(last, "mean_length"), "last 100 training episodes"),
        ("episodes", count_text(number_in(last, "episodes")), "in training"),
    )
    return (*(Figure(name=name, value=value, note=note) for name, value, note in values), *progress_numbers(job))


def _charts(job: Job) -> tuple[LineChart, ...]:
    lines = [line("mean of the last 100 training episodes", points(of_kind(job.records, "Updated"), "mean_return"))]
    evaluated = points(of_kind(job.records, "Evaluated"), "mean_return")
    if len(evaluated) > 1:  # a single one is in the words above
        lines.append(line("evaluation", evaluated, "evaluation", arm="grown"))
    return (chart(job, "undiscounted return of episodes", lines), *learning_charts(job))


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
