"""What each command does: turn flags into a config, call a recipe, print its result."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from morphogen import tasks
from morphogen.cli.commands import Grow, Report, Resume, Tasks
from morphogen.errors import MorphogenError
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.grow import GrowResult, grow as run_grow, num_finished_arms, resume as run_resume
from morphogen.recipes.results import Interval, Row
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.telemetry.console import ConsoleSink
from morphogen.telemetry.metrics import interval_text, metric_text
from morphogen.telemetry.report import write_report

_DONE, _LOST_OUTPUT, _INTERRUPTED = 0, 1, 130


def show_tasks(command: Tasks) -> int:
    """Print every task and whether its data is here; nothing is loaded or generated."""
    sheet = Table(title="tasks", title_justify="left", box=None, pad_edge=False)
    for column in ("task", "metric", "steps", "slots", "data"):
        sheet.add_column(column, justify="right" if column == "steps" else "left", overflow="fold")
    known = {name: tasks.get(name) for name in tasks.names()}
    for name, task in known.items():
        here = "comes with morphogen" if task.source is None else str(task.source.locate() or "not here")
        sheet.add_row(name, task.metric_name, f"{task.total_steps:,}", str(len(task.points)), here)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(sheet)
    for name, task in known.items():
        console.print(f"{name}: {task.summary}", highlight=False, soft_wrap=True)
    for source in dict.fromkeys(task.source for task in known.values() if task.source):
        if source.locate() is None:
            console.print(f"To get {source.name}: {source.how_to_get}", highlight=False, soft_wrap=True)
    return _DONE


def grow(command: Grow) -> int:
    """Run a grow job."""
    given = {
        "task": command.task,
        "policy": command.policy,
        "seed": command.seed,
        "repeats": command.repeats,
        "total_steps": command.steps,
        "device": command.device,
        "inject": command.inject or None,
    }
    base = read_config(command.config) if command.config else GrowConfig()
    config = base.replace(**{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    sink = ConsoleSink(config.repeats * len(config.arms), metric=tasks.get(config.task).metric_name)
    return _conclude(run_grow(config, command.out, sinks=(sink,)))


def resume(command: Resume) -> int:
    """Go on with a job."""
    torch.set_num_threads(1)
    _, config = RunDirectory.open(command.run)
    sink = ConsoleSink(
        config.repeats * len(config.arms),
        arms_done=num_finished_arms(command.run),
        metric=tasks.get(config.task).metric_name,
    )
    return _conclude(run_resume(command.run, sinks=(sink,)))


def report(command: Report) -> int:
    """Write the report again."""
    if not RunDirectory(command.run).events.exists():
        raise MorphogenError(f"{command.run}: holds no events.jsonl, so there is nothing to report. Check the path.")
    print(write_report(command.run))
    return _DONE


def _conclude(result: GrowResult) -> int:
    """Print the table and where everything is; or how to go on."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not result.finished:
        console.print(f"Interrupted. Go on with: morphogen resume {result.directory}", highlight=False, soft_wrap=True)
        return _INTERRUPTED
    console.print(_sheet(result.rows, result.metric_name))
    console.print(result.verdict, highlight=False, soft_wrap=True)
    files = [f"{name}" for name in ("report.html", "summary.json", "grown.pt2", "grown.safetensors")]
    present = [name for name in files if (Path(result.directory) / name).exists()]
    console.print(f"In {result.directory}: {', '.join(present)}", highlight=False, soft_wrap=True)
    if result.lost_sinks:
        print(f"morphogen: output was lost: {', '.join(result.lost_sinks)} failed on the way.", file=sys.stderr)
        return _LOST_OUTPUT
    return _DONE


def _sheet(rows: tuple[Row, ...], metric: str) -> Table:
    sheet = Table(box=None, pad_edge=False)
    for column in ("network", f"test {metric}", "95% interval", "parameters", "training GFLOPs", "seconds", "rollbacks"):
        sheet.add_column(column, justify="left" if column == "network" else "right")
    names = {"static": "static host", "reference": "full-size reference", "grown": "grown network"}
    for row in rows:
        sheet.add_row(
            names[row.arm],
            metric_text(row.test_metric.mean, metric),
            _span(row.test_metric, metric),
            f"{row.parameters:,.0f}",
            f"{row.train_flops / 1e9:,.1f}",
            f"{row.wall_seconds:.1f}",
            f"{row.rollbacks:.1f}",
        )
    return sheet


def _span(interval: Interval, metric: str) -> str:
    if interval.low is None or interval.high is None:
        return "one repeat"
    return interval_text(interval.low, interval.high, metric).strip("[]").replace(", ", " to ")
