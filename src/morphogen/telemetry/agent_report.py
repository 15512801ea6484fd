"""What the reports of all jobs that train an agent have in common, each made from the job's log alone.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

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
from morphogen.telemetry.markup import Figure, Markup, Point, document, folded, number, section, tag, yaml
from morphogen.telemetry.report_charts import Line, LineChart, line_chart
from morphogen.telemetry.report_page import STYLE, count_text, health, time_text

_CURVES = (
    ("KL from the policy of the rollout, in nats", "KL", "kl"),
    ("explained variance of returns, before the update", "EV", "explained_variance"),
    ("entropy of the actions, in nats", "entropy", "entropy"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job as its log tells of it.

    Attributes:
        log: Its records, in order.
        kind: What its own events begin with: "PPO" for ``PPOStarted``, ``PPOFaulted``, ``PPOFinished``.
        steps_name: What its steps are called.
    """

    log: ReadResult
    kind: str
    steps_name: str

    @property
    def records(self) -> tuple[Record, ...]:
        """All records."""
        return tuple(self.log.records)

    @property
    def start(self) -> Record:
        """The record of the beginning."""
        return last_of(self.records, f"{self.kind}Started") or {}

    @property
    def finish(self) -> Record | None:
        """The record of the end, if it came to that."""
        return last_of(self.records, f"{self.kind}Finished")

    @property
    def last_update(self) -> Record:
        """The record of the last update."""
        return last_of(self.records, "Updated") or {}

    def stop(self) -> Figure | None:
        """Return by what the job was stopped, if that is the last that is known of it."""
        fault = last_of(self.records, f"{self.kind}Faulted")
        if self.finish is not None or fault is None or self.records[-1] is not fault:
            return None
        return Figure(name="verdict", value=f"Stopped by {text_in(fault, 'kind')}: {text_in(fault, 'message')}", tone="bad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What a job's page shows, beside what all of them show.

    Attributes:
        title: Of the page.
        verdict: What was reached, in a sentence.
        numbers: Named values.
        charts: Curves.
        sections: Further parts.
        spaces: What is observed and done, for the configuration; empty: nothing.
    """

    title: str
    verdict: Figure
    numbers: tuple[Figure, ...]
    charts: tuple[LineChart, ...]
    sections: tuple[Markup, ...] = ()
    spaces: str = ""


def page(job: Job, content: Page, *, name: str, config: str, summary: str) -> str:
    """Return the report as one complete HTML document.

    Args:
        job: What is reported.
        content: What is special about it.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    header = tag("header", tag("h1", content.title), tag("p", f"{name}, {len(job.records):,} records", class_="quiet"))
    sections = (
        tag("ul", *map(health, _health(job)), class_="health"),
        tag("p", content.verdict.value, class_=f"verdict {content.verdict.tone}"),
        tag("dl", *map(number, content.numbers), class_="numbers"),
        section("Curves", *map(_figure, content.charts)),
        *content.sections,
        section("Configuration", *_configuration(job.start, config, summary, content.spaces)),
        section("Run it again", tag("pre", text_in(job.start, "command"), class_="command")),
    )
    return document(content.title, STYLE, [header, *sections])


def progress_numbers(job: Job) -> tuple[Figure, ...]:
    """Return how far the job is and how fast it goes."""
    last, speed = job.last_update, _mean_speed(job)
    of_total = f"of {count_text(number_in(job.start, 'total_steps'))}"
    return (
        Figure(name="steps", value=count_text(number_in(last, "step")), note=of_total),
        Figure(name="updates", value=count_text(number_in(last, "update"))),
        Figure(name="parameters", value=count_text(number_in(job.start, "parameters")), note="of the policy"),
        Figure(name="speed", value=count_text(speed), note="steps per second"),
        Figure(name="wall time", value=time_text(elapsed_seconds(job.records)), note="up to the last record"),
    )


def learning_charts(job: Job) -> tuple[LineChart, ...]:
    """Return how the agent learned, and how fast."""
    updates = of_kind(job.records, "Updated")
    curves = (*_CURVES, (f"{job.steps_name} per second", "steps/s", "steps_per_second"))
    return tuple(chart(job, label, [line(label, points(updates, field), short)]) for label, short, field in curves)


def points(records: Sequence[Record], name: str, inside: str = "") -> tuple[Point, ...]:
    """Return the numbers called ``name`` over steps, in the mapping ``inside`` where that is given; none that is not finite."""
    measured = (
        (number_in(record, "step"), number_in(mapping_in(record, inside) if inside else record, name)) for record in records
    )
    return tuple((x, y) for x, y in measured if x is not None and y is not None and math.isfinite(y))


def line(title: str, over_steps: tuple[Point, ...], label: str = "", arm: str = "training") -> Line:
    """Return a line in the colour of ``arm``."""
    return Line(points=over_steps, arm=arm, kind="mean", title=title, label=label)


def chart(job: Job, label: str, lines: Sequence[Line], value_text: Callable[[float], str] | None = None) -> LineChart:
    """Return a chart over all steps of the job."""
    return LineChart(
        label=label,
        lines=tuple(lines),
        value_text=value_text or (lambda value: f"{value:.4g}"),
        last_step=number_in(job.start, "total_steps") or 0,
        steps_name=job.steps_name,
    )


def _health(job: Job) -> tuple[Figure, ...]:
    updates = of_kind(job.records, "Updated")
    skipped = sum(int(number_in(update, "skipped_minibatches") or 0) for update in updates)
    is_done, done = job.finish is not None, number_in(job.last_update, "step") or 0
    words = "finished" if is_done else f"not finished: step {done:,.0f} of {count_text(number_in(job.start, 'total_steps'))}"
    return (
        Figure(name="run", value=words, tone="good" if is_done else "warn"),
        _alarm("skipped minibatches", skipped),
        _alarm("faults", len(of_kind(job.records, f"{job.kind}Faulted"))),
        _alarm("episodes begun anew after resuming", len(of_kind(job.records, "EpisodesRestarted"))),
        _alarm("malformed lines", job.log.malformed_count),
    )


def _alarm(name: str, count: int) -> Figure:
    return Figure(name=name, value=f"{count:,}", tone="warn" if count else "good")


def _mean_speed(job: Job) -> float | None:
    speeds = [speed for update in of_kind(job.records, "Updated") if (speed := number_in(update, "steps_per_second"))]
    return sum(speeds) / len(speeds) if speeds else None


def _figure(content: LineChart) -> Markup:
    return tag("figure", tag("figcaption", content.label), line_chart(content))


def _configuration(start: Record, config: str, summary: str, spaces: str) -> list[Markup]:
    parts = {
        "Settings": config or yaml(mapping_in(start, "config")),
        "Spaces": spaces,
        "Versions": yaml(mapping_in(start, "versions")),
        "summary.json": summary,
    }
    return [folded(heading, tag("pre", text)) for heading, text in parts.items() if text]
