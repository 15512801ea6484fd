"""`morphogen grow`: flags into a config, the recipe, its result in print."""

from __future__ import annotations

import torch
from rich.table import Table

from morphogen import tasks
from morphogen.cli.commands import Grow, Resume
from morphogen.cli.printing import absolute, result_console, say_how_to_resume, say_where
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.grow import GrowResult, grow as run_grow, num_finished_arms, resume as run_resume
from morphogen.recipes.results import Interval, Row
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.telemetry.console import ConsoleSink
from morphogen.telemetry.metrics import interval_text, metric_text


def grow(command: Grow) -> int:
    """Run a grow job."""
    given = {
        "task": command.task,
        "policy": absolute(command.policy),
        "seed": command.seed,
        "repeats": command.repeats,
        "total_steps": command.steps,
        "device": command.device,
        "inject": command.inject or None,
    }
    base = read_config(command.config, GrowConfig) if command.config else GrowConfig()
    config = base.replace(**{name: value for name, value in given.items() if value is not None})
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    sink = ConsoleSink(config.repeats * len(config.arms), metric=tasks.get(config.task).metric_name)
    return _conclude(run_grow(config, command.out, sinks=(sink,)))


def resume(command: Resume) -> int:
    """Go on with a job."""
    torch.set_num_threads(1)
    _, config = RunDirectory.open(command.run, GrowConfig)
    sink = ConsoleSink(
        config.repeats * len(config.arms),
        arms_done=num_finished_arms(command.run),
        metric=tasks.get(config.task).metric_name,
    )
    return _conclude(run_resume(command.run, sinks=(sink,)))


def _conclude(result: GrowResult) -> int:
    """Print the table and where everything is; or how to go on."""
    if not result.finished:
        return say_how_to_resume(result.directory)
    console = result_console()
    console.print(_sheet(result.rows, result.metric_name))
    console.print(result.verdict, highlight=False, soft_wrap=True)
    return say_where(result.directory, ("report.html", "summary.json", "grown.pt2", "grown.safetensors"), result.lost_sinks)


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
