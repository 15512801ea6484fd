"""`morphogen evaluate`: flags into a config, the recipe, its result in print."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table

from morphogen.cli.commands import Evaluate, Resume
from morphogen.cli.printing import absolute, result_console, say_how_to_resume, say_where
from morphogen.recipes.comparison import Estimate, PlayerRow
from morphogen.recipes.evaluate import EvaluateResult, evaluate as run_evaluate, resume_evaluation
from morphogen.recipes.evaluate_config import EvaluateConfig
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.telemetry.console import EvaluationConsoleSink
from morphogen.telemetry.metrics import interval_text, metric_text


def evaluate(command: Evaluate) -> int:
    """Run an evaluate job."""
    config = _config(command)
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    return _conclude(run_evaluate(config, command.out, sinks=(_sink(config),)))


def resume(command: Resume) -> int:
    """Go on with a job."""
    torch.set_num_threads(1)
    directory, config = RunDirectory.open(command.run, EvaluateConfig)
    done = len(directory.read_summary().get("episodes", []))
    return _conclude(resume_evaluation(command.run, sinks=(_sink(config, done),)))


def _config(command: Evaluate) -> EvaluateConfig:
    if command.run is None and command.config is None:
        raise ValueError("`RUN` must be given: a run directory, a policy file or the name of a policy. Or give --config.")
    given = {
        "policy": absolute(command.run),
        "against": None if command.against is None else _names(command.against),
        "task": command.task,
        "episodes": command.episodes,
        "seed": command.seed,
        "deterministic": command.deterministic or None,
        "num_envs": command.envs,
        "executor": command.executor,
        "total_steps": command.steps,
        "device": command.device,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return read_config(command.config, EvaluateConfig).replace(**changes) if command.config else EvaluateConfig(**changes)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"`--against` must be names with commas between them, got {text!r}. Write for example wait,heuristic.")
    return names


def _sink(config: EvaluateConfig, done: int = 0) -> EvaluationConsoleSink:
    return EvaluationConsoleSink(config.episodes * (1 + len(config.against)), episodes_done=done)


def _conclude(result: EvaluateResult) -> int:
    """Print the table and where everything is; or how to go on."""
    if not result.finished:
        return say_how_to_resume(result.directory)
    console = result_console()
    console.print(result.title, highlight=False, soft_wrap=True)
    console.print(_sheet(result))
    for words in result.sentences:
        console.print(words, highlight=False, soft_wrap=True)
    return say_where(result.directory, ("report.html", "summary.json"), result.lost_sinks)


def _sheet(result: EvaluateResult) -> Table:
    sheet = Table(box=None, pad_edge=False)
    names = (
        "player",
        f"test {result.metric_name}",
        "95% interval",
        "parameters",
        "FLOPs / host",
        "return",
        "rollbacks",
        "front",
    )
    for column in names:
        sheet.add_column(column, justify="left" if column in ("player", "front") else "right")
    for row in result.rows:
        sheet.add_row(
            row.player,
            metric_text(row.test_metric.mean, result.metric_name),
            _span(row.test_metric, result.metric_name),
            f"{row.parameters:,.0f}",
            f"{row.relative_flops:.2f}",
            f"{row.total_return.mean:.3f}",
            f"{row.rollbacks}",
            _front(row),
        )
    return sheet


def _span(estimate: Estimate, metric: str) -> str:
    return interval_text(estimate.low, estimate.high, metric).strip("[]").replace(", ", " to ")


def _front(row: PlayerRow) -> str:
    fronts = (("parameters", row.on_parameters_front), ("FLOPs", row.on_flops_front))
    return ", ".join(name for name, is_on in fronts if is_on)
