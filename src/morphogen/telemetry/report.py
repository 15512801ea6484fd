"""The report of a run, made from its log alone: at any time, of a finished, running or crashed run.

Records become views here (pure functions); ``report_page`` and ``report_charts`` turn views into HTML and SVG. Of the
metric more is better; accuracy is a fraction in the records and percent on the page.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from morphogen.telemetry import markup, report_charts as charts, report_page as pages
from morphogen.telemetry.evaluation_report import evaluation_page
from morphogen.telemetry.jsonl import (
    ArmRecords,
    ReadResult,
    Record,
    RollbackEntry,
    StageEntry,
    arm_records,
    elapsed_seconds,
    finished_records,
    last_of,
    list_in,
    mapping_in,
    number_in,
    of_kind,
    read_records,
    records_in,
    result_rows,
    rollback_entries,
    standing_stages,
    step_of,
    text_in,
)
from morphogen.telemetry.metrics import interval_text, metric_text
from morphogen.telemetry.pbt_report import population_page
from morphogen.telemetry.ppo_report import ppo_page
from morphogen.telemetry.train_report import train_page

_LOSSES_BEFORE, _LOSSES_AFTER = 12, 6
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?%?")
_SHOWN = {
    "RunStarted", "ArmStarted", "TickMeasured", "Decided", "StageChanged", "GateRefused", "StepSkipped", "Rollback",
    "FaultInjected", "ArmFinished", "RunFinished",
}  # fmt: skip

_PAGES = {
    "PPOStarted": ppo_page,
    "TrainStarted": train_page,
    "EvaluationStarted": evaluation_page,
    "PopulationStarted": population_page,
}
"""Which page, by the event a job begins with; else that of a grow job."""


def write_report(run_directory: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into ``run_directory`` from the log there, whole or not at all, and return its path.

    Args:
        run_directory: Holds ``events.jsonl``; ``config.yaml`` and ``summary.json`` are shown where they are there.

    Raises:
        FileNotFoundError: There is no ``events.jsonl``.
        OSError: The log cannot be read or the report cannot be written.
    """
    directory = Path(run_directory)
    log = directory / "events.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"`run_directory` must hold events.jsonl, got {directory}. Give the directory of a run.")
    written = datetime.datetime.fromtimestamp(log.stat().st_mtime, datetime.UTC)
    records, name = read_records(log), f"{directory.resolve().name}, log last written {written:%Y-%m-%d %H:%M:%S} UTC"
    config, summary = _text_of(directory / "config.yaml"), _text_of(directory / "summary.json")
    page_of = next((page for kind, page in _PAGES.items() if last_of(records.records, kind) is not None), _grow_page)
    page = page_of(records, name=name, config=config, summary=summary)
    path = directory / "report.html"
    draft = directory / ".report.html.draft"
    draft.write_bytes(page.encode("utf-8", "replace"))
    os.replace(draft, path)
    return path


def _grow_page(log: ReadResult, *, name: str, config: str, summary: str) -> str:
    return pages.page(view_of(log, name=name, config=config, summary=summary))


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def view_of(log: ReadResult, *, name: str, config: str = "", summary: str = "") -> pages.RunView:
    """Return what the page shows of the records of ``log``.

    Args:
        log: The records, in order.
        name: What the run is called, for the line under the title.
        config: The text of the run's ``config.yaml``; empty for the config in the log.
        summary: The text of the run's ``summary.json``, shown as it is.
    """
    records = log.records
    start = last_of(records, "RunStarted") or {}
    end = last_of(records, "RunFinished")
    metric = text_in(start, "metric_name", "accuracy")
    runs = arm_records(records)
    return pages.RunView(
        title=f"{text_in(start, 'task')}: {text_in(start, 'policy')} policy" if start else "morphogen run",
        subtitle=f"{name}, {len(records):,} records",
        is_empty=not records,
        health=_health(log, runs, end),
        verdict=_verdict(runs, start, end, metric),
        numbers=_numbers(log, runs, start, metric),
        metric=metric,
        results=tuple(_arm_result(row, metric) for row in result_rows(records)),
        repeats=_repeats_table(runs, metric),
        curves=_curves(runs, metric),
        lanes=tuple(_lane_block(run) for run in runs if run.arm == "grown"),
        rollbacks=tuple(story for run in runs for story in _stories(run)),
        skipped=_skipped_table(runs),
        refused=_refused_table(runs),
        config=config or markup.yaml(mapping_in(start, "config")) or "n/a",
        versions=markup.yaml(mapping_in(start, "versions")),
        summary=summary,
        command=text_in(start, "command"),
        notes=_notes(log),
    )


# Head: health, verdict, numbers, result table


def _health(log: ReadResult, runs: Sequence[ArmRecords], end: Record | None) -> tuple[markup.Figure, ...]:
    governor = text_in(last_of(log.records, "TickMeasured") or {}, "governor")
    state = markup.Figure(name="run", value=_position(runs) if end is None else "finished", tone="good" if end else "warn")
    tone = {"healthy": "good", "n/a": ""}.get(governor, "warn")
    return (
        state,
        markup.Figure(name="governor", value=governor, tone=tone),
        _alarm("rollbacks", len(of_kind(log.records, "Rollback"))),
        _alarm("skipped steps", len(of_kind(log.records, "StepSkipped"))),
        markup.Figure(name="injected faults", value=f"{len(of_kind(log.records, 'FaultInjected'))}"),
        _alarm("malformed lines", log.malformed_count, tone="bad"),
    )


def _alarm(name: str, count: int, tone: str = "warn") -> markup.Figure:
    return markup.Figure(name=name, value=f"{count:,}", tone=tone if count else "good")


def _position(runs: Sequence[ArmRecords]) -> str:
    if not runs:
        return "not finished"
    run = runs[-1]
    total = number_in(last_of(run.records, "ArmStarted") or {}, "total_steps")
    return f"not finished: {run.title}, step {step_of(run.records[-1]):,.0f} of {pages.count_text(total)}"


def _verdict(runs: Sequence[ArmRecords], start: Record, end: Record | None, metric: str) -> markup.Figure:
    if end is None:
        done = len(finished_records(runs, "grown"))
        words = f"the run has not finished ({done} of {text_in(start, 'repeats')} repeats of the grown network done)"
        return markup.Figure(name="verdict", value=f"No verdict yet: {words}.")
    paired = mapping_in(end, "paired_difference")
    mean, low, high = (_finite(number_in(paired, name)) for name in ("mean", "low", "high"))
    return pages.verdict_of(mean, low, high, repeats=text_in(paired, "repeats"), metric=metric)


def _arm_result(row: Record, metric: str) -> pages.ArmResult:
    mean, low, high = (_finite(number_in(row, name)) for name in ("mean", "low", "high"))
    cells = (
        f"{metric_text(number_in(row, 'mean'), metric)} {interval_text(low, high, metric)}",
        text_in(row, "repeats"),
        pages.count_text(number_in(row, "parameters")),
        pages.large_text(number_in(row, "train_flops")),
        pages.time_text(number_in(row, "wall_seconds")),
        pages.count_text(number_in(row, "rollbacks")),
    )
    return pages.ArmResult(arm=text_in(row, "arm"), cells=cells, mean=mean, low=low, high=high)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _numbers(log: ReadResult, runs: Sequence[ArmRecords], start: Record, metric: str) -> tuple[markup.Figure, ...]:
    rows = {text_in(row, "arm"): row for row in result_rows(log.records)}
    grown, static, reference = (rows.get(arm, {}) for arm in ("grown", "static", "reference"))
    stages = Counter(
        entry.stage for run in runs if run.arm == "grown" for slot in _slots(run) for entry in standing_stages(run, slot)
    )
    done = len(finished_records(runs, "grown"))
    values = (
        ("grown", metric_text(number_in(grown, "mean"), metric), f"test {metric}"),
        ("static host", metric_text(number_in(static, "mean"), metric), f"test {metric}"),
        ("reference", metric_text(number_in(reference, "mean"), metric), f"test {metric}"),
        ("grown", pages.count_text(number_in(grown, "parameters")), "parameters"),
        ("reference", pages.count_text(number_in(reference, "parameters")), "parameters"),
        ("grown", pages.large_text(number_in(grown, "train_flops")), "training FLOPs"),
        ("grown", f"{done} of {text_in(start, 'repeats')}", "repeats done"),
        ("seeds", f"{stages['fossilized']} of {stages['germinated']}", "kept, all repeats"),
        ("wall time", pages.time_text(elapsed_seconds(log.records)), "up to the last record"),
    )
    return tuple(markup.Figure(name=name, value=value, note=note) for name, value, note in values)


def _repeats_table(runs: Sequence[ArmRecords], metric: str) -> markup.Table:
    rows = [
        (
            run.arm,
            f"{run.repeat}",
            metric_text(number_in(end, "test_metric"), metric),
            metric_text(number_in(end, "decision_metric"), metric),
            pages.count_text(number_in(end, "parameters")),
            pages.large_text(number_in(end, "train_flops")),
            pages.time_text(number_in(end, "wall_seconds")),
            pages.count_text(number_in(end, "rollbacks")),
            pages.count_text(number_in(end, "skipped_steps")),
        )
        for run in runs
        if (end := last_of(run.records, "ArmFinished")) is not None
    ]
    columns = f"arm|repeat|test {metric}|decision {metric}|parameters|training FLOPs|wall time|rollbacks|skipped steps"
    return markup.table_of(columns, rows, numeric=columns.removeprefix("arm|"))


# Curves


def _curves(runs: Sequence[ArmRecords], metric: str) -> tuple[charts.LineChart, ...]:
    metrics = {run: _ticked(run, "metric") for run in runs}
    parameters = {run: charts.stepped(_starting(run) + _ticked(run, "parameters")) for run in runs}
    return (
        charts.LineChart(
            label=f"{metric} on the decision split",
            lines=charts.arm_lines((run.arm, run.title, points) for run, points in metrics.items()),
            value_text=lambda value: metric_text(value, metric),
            marks=tuple(mark for run, points in metrics.items() for mark in _curve_marks(run, points)),
            last_step=_total_steps(runs),
            is_focused=True,
        ),
        charts.LineChart(
            label="parameters",
            lines=charts.arm_lines((run.arm, run.title, points) for run, points in parameters.items()),
            value_text=pages.count_text,
            marks=tuple(mark for run, points in parameters.items() for mark in _curve_marks(run, points)),
            last_step=_total_steps(runs),
            includes_zero=True,
        ),
    )


def _total_steps(runs: Sequence[ArmRecords]) -> float:
    return max(
        (number_in(record, "total_steps") or 0 for run in runs for record in of_kind(run.records, "ArmStarted")),
        default=0,
    )


def _ticked(run: ArmRecords, name: str) -> list[markup.Point]:
    return _finite_points(run, lambda tick: number_in(tick, name))


def _finite_points(run: ArmRecords, value_in: Callable[[Record], float | None]) -> list[markup.Point]:
    """The finite values of the ticks over train steps, as measured, also where the run went back."""
    ticks = ((step_of(tick), value_in(tick)) for tick in of_kind(run.records, "TickMeasured"))
    return [(step, value) for step, value in ticks if value is not None and math.isfinite(value)]


def _starting(run: ArmRecords) -> list[markup.Point]:
    started = number_in(last_of(run.records, "ArmStarted") or {}, "parameters")
    return [] if started is None else [(0, started)]


def _curve_marks(run: ArmRecords, measured: Sequence[markup.Point]) -> list[charts.Mark]:
    points, _ = charts.timeline(measured)
    rollbacks = [
        charts.Mark(
            step=entry.end,
            y=charts.value_at(points, entry.end) if points else None,
            kind="rollback",
            title=_rollback_title(run, entry),
            target=_rollback_anchor(run, entry),
        )
        for entry in rollback_entries(run)
    ]
    return rollbacks + _fault_marks(run)


def _fault_marks(run: ArmRecords) -> list[charts.Mark]:
    faults = of_kind(run.records, "FaultInjected")
    return [charts.Mark(step=step_of(fault), kind="fault", title=f"{run.title}: {_fault_text(fault)}") for fault in faults]


def _fault_text(fault: Record) -> str:
    return f"{text_in(fault, 'fault')} injected at step {step_of(fault):,.0f}: {text_in(fault, 'detail')}"


# Slots


def _slots(run: ArmRecords) -> list[str]:
    """The slots that the start of the arm names, then those that its ticks add."""
    named = map(str, list_in(last_of(run.records, "ArmStarted") or {}, "slots"))
    seen = (slot for tick in of_kind(run.records, "TickMeasured") for slot in mapping_in(tick, "stages"))
    return list(dict.fromkeys((*named, *seen)))


def _lane_block(run: ArmRecords) -> pages.LaneBlock:
    last_step = max((step_of(record) for record in run.records), default=0)
    chart = charts.LaneChart(
        label=f"slots of {run.title}",
        lanes=tuple(_lane(run, slot, last_step) for slot in _slots(run)),
        rewinds=tuple(
            charts.Rewind(span=(entry.start, entry.end), title=_rollback_title(run, entry), target=_rollback_anchor(run, entry))
            for entry in rollback_entries(run)
        ),
        marks=tuple(_fault_marks(run)),
        last_step=max(last_step, _total_steps([run])),
    )
    return pages.LaneBlock(heading=f"Repeat {run.repeat}", chart=chart, history=_history(run))


def _lane(run: ArmRecords, slot: str, last_step: float) -> charts.Lane:
    entries = standing_stages(run, slot)
    ends = [*(entry.step for entry in entries[1:]), last_step]
    alphas, _ = charts.timeline(_finite_points(run, lambda tick: number_in(mapping_in(tick, "alphas"), slot)))
    return charts.Lane(
        slot=slot,
        segments=tuple(_segment(slot, entry, end) for entry, end in zip(entries, ends, strict=True)),
        alphas=alphas,
        births=tuple((entry.step, entry.blueprint or "?") for entry in entries if entry.stage == "germinated"),
        marks=tuple(
            charts.Mark(
                step=entry.step,
                kind="prune",
                title=f"{slot} pruned at step {entry.step:,.0f}. {entry.why}",
                target=None if entry.number is None else _change_anchor(run, entry.number),
            )
            for entry in entries
            if entry.stage == "pruned"
        ),
    )


def _segment(slot: str, entry: StageEntry, end: float) -> charts.Segment:
    title = f"{slot}: {entry.stage} from step {entry.step:,.0f} to {end:,.0f}. {entry.why}"
    return charts.Segment(start=entry.step, end=end, stage=entry.stage, title=title)


def _change_anchor(run: ArmRecords, number: int) -> str:
    return f"change-{run.index}-{number}"


def _history(run: ArmRecords) -> markup.Table:
    """Every stage change with its reason and the decision behind it, and every rollback, in the order of the log."""
    rows: dict[str, tuple[str, ...]] = {}
    decided: dict[str, Record] = {}
    rollbacks = {entry.place: entry for entry in rollback_entries(run)}
    num_changes = 0
    for place, record in enumerate(run.records):
        if record["event"] == "Decided":
            decided[text_in(record, "slot")] = record
        elif record["event"] == "StageChanged":
            rows[_change_anchor(run, num_changes)] = _history_row(record, decided.get(text_in(record, "slot"), {}))
            num_changes += 1
        elif place in rollbacks:
            entry, reason = rollbacks[place], text_in(record, "reason")
            words = f"rewound to step {entry.start:,.0f}"
            rows[f"rewound-{run.index}-{entry.number}"] = (f"{entry.end:,.0f}", "", "all", words, "", "", reason, "")
    columns = "step|tick|slot|change|after|blueprint|reason|decision"
    return markup.table_of(columns, rows.values(), numeric="step|tick|after", ids=rows)


def _history_row(change: Record, decision: Record) -> tuple[str, ...]:
    is_cause = decision.get("tick") == change.get("tick") and decision.get("op") != "wait"
    return (
        f"{step_of(change):,.0f}",
        text_in(change, "tick"),
        text_in(change, "slot"),
        f"{text_in(change, 'previous')} → {text_in(change, 'stage')}",
        f"{text_in(change, 'ticks_in_previous')} ticks",
        text_in(change, "blueprint", ""),
        text_in(change, "reason"),
        f"{text_in(decision, 'op')}: {text_in(decision, 'reason')}" if is_cause else "",
    )


# Rollbacks, skipped steps, refused gates


def _rollback_anchor(run: ArmRecords, entry: RollbackEntry) -> str:
    return f"rollback-{run.index}-{entry.number}"


def _rollback_title(run: ArmRecords, entry: RollbackEntry) -> str:
    lost = entry.end - entry.start
    return f"{run.title}: step {entry.end:,.0f} back to {entry.start:,.0f}, {lost:,.0f} steps thrown away"


def _stories(run: ArmRecords) -> Iterator[pages.RollbackStory]:
    previous = 0
    for entry in rollback_entries(run):
        record, faults = entry.record, of_kind(run.records[previous : entry.place], "FaultInjected")
        nearby = [_fault_text(fault) for fault in faults if step_of(fault) >= entry.start]
        previous = entry.place
        facts = (
            ("injected in these steps", "; ".join(nearby) or "nothing"),
            ("action before it", _action_text(of_kind(run.records[: entry.place], "Decided"))),
            ("parts restored", text_in(record, "parts")),
            ("optimizer", text_in(record, "optimizer_strategy")),
            ("learning rates times", text_in(record, "learning_rate_factor")),
            ("penalty", text_in(record, "penalty")),
            ("rewinds in a row", text_in(record, "count")),
            ("governor's own count", f"{text_in(record, 'from_step')} back to {text_in(record, 'to_step')}"),
        )
        yield pages.RollbackStory(
            anchor=_rollback_anchor(run, entry),
            heading=_rollback_title(run, entry),
            reason=text_in(record, "reason"),
            facts=facts,
            findings=_findings_table(record),
            losses=_losses_around(run, entry.place),
            lost_steps=(entry.start, entry.end),
        )


def _action_text(decisions: Sequence[Record]) -> str:
    action = next((decision for decision in reversed(decisions) if decision.get("op") != "wait"), None)
    if action is None:
        return "none"
    what = " ".join(filter(None, (text_in(action, "op"), text_in(action, "slot", ""), text_in(action, "blueprint", ""))))
    return f"{what} at step {step_of(action):,.0f}: {text_in(action, 'reason')}"


def _losses_around(run: ArmRecords, place: int) -> tuple[markup.Point, ...]:
    """The finite losses of the last ticks before the rollback at ``place`` and of the first new ones after it."""
    before, after = (
        _ticked(dataclasses.replace(run, records=part), "train_loss") for part in (run.records[:place], run.records[place:])
    )
    old, _ = charts.timeline(before)
    new = [point for point in after if not old or point[0] > old[-1][0]]
    return (*old[-_LOSSES_BEFORE:], *new[:_LOSSES_AFTER])


def _findings_table(record: Record) -> markup.Table:
    names = "detector|value|threshold|window_steps|message"
    rows = (tuple(text_in(finding, name) for name in names.split("|")) for finding in records_in(record, "findings"))
    return markup.table_of(names.replace("_", " "), rows, numeric="value|threshold|window steps")


def _skipped_table(runs: Sequence[ArmRecords]) -> markup.Table:
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for run in runs:
        for record in of_kind(run.records, "StepSkipped"):
            detectors = ", ".join(text_in(finding, "detector") for finding in records_in(record, "findings"))
            grouped.setdefault((run.title, text_in(record, "reason"), detectors), []).append(record)
    rows = (
        (*key, _message_text(group[-1]), f"{len(group)}", f"{step_of(group[0]):,.0f}", f"{step_of(group[-1]):,.0f}")
        for key, group in grouped.items()
    )
    columns = "arm|reason|detectors|finding (the last one)|steps|first|last"
    return markup.table_of(columns, rows, numeric="steps|first|last")


def _message_text(skipped: Record) -> str:
    return "; ".join(text_in(finding, "message") for finding in records_in(skipped, "findings")) or "n/a"


def _refused_table(runs: Sequence[ArmRecords]) -> markup.Table:
    """Refusals by slot, gate and reason; of reasons that differ in their numbers alone the last is shown."""
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for run in runs:
        for record in of_kind(run.records, "GateRefused"):
            for reason in map(str, list_in(record, "reasons") or ["n/a"]):
                key = (run.arm, text_in(record, "slot"), text_in(record, "gate"), _NUMBER.sub("#", reason))
                grouped.setdefault(key, []).append(reason)
    counted = sorted(grouped.items(), key=lambda item: -len(item[1]))
    rows = ((arm, slot, gate, reasons[-1], f"{len(reasons)}") for (arm, slot, gate, _), reasons in counted)
    return markup.table_of("arm|slot|gate|reason (the last one)|times", rows, numeric="times")


def _notes(log: ReadResult) -> tuple[str, ...]:
    others = Counter(str(record["event"]) for record in log.records if record["event"] not in _SHOWN)
    unshown = ", ".join(f"{kind} {count}" for kind, count in others.items())
    notes = (
        f"Malformed log lines, left out here: {log.malformed_count}." if log.malformed_count else "",
        "The last line of the log is not complete: the run is writing it now, or was killed while it did."
        if log.has_torn_line
        else "",
        f"Records of other kinds, not shown: {unshown}." if unshown else "",
    )
    return tuple(filter(None, notes))
