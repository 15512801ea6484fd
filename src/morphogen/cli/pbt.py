"""`morphogen pbt`: flags into a config, the recipe, its result in print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from morphogen.cli.codes import DONE, FAILED
from morphogen.cli.commands import PBT, Resume
from morphogen.cli.printing import result_console, say_how_to_resume, say_where
from morphogen.pbt.config import OURS, PBTConfig
from morphogen.recipes.overrides import from_flags, parse_settings, with_flags
from morphogen.recipes.pbt import PBTJobResult, resume_population, train_population
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_replay import replay_run
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.telemetry.jsonl import Record, read_records
from morphogen.telemetry.pbt_console import PopulationConsoleSink


def pbt(command: PBT) -> int:
    """Run a job that trains a population, or replay the best lineage of one."""
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    if command.action:
        return _replay(_run_to_replay(command))
    config = _config(command)
    return _conclude(train_population(config, command.out, sinks=(_sink(config),)))


def resume(command: Resume) -> int:
    """Go on with a job."""
    torch.set_num_threads(1)
    directory, config = RunDirectory.open(command.run, PBTJobConfig)
    before = read_records(directory.events).records if directory.events.exists() else ()
    return _conclude(resume_population(command.run, accept_changes=command.accept_changes, sinks=(_sink(config, before),)))


def _config(command: PBT) -> PBTJobConfig:
    flags = {
        "member": command.member,
        "env": command.env,
        "task": command.task,
        "engine": command.engine,
        "ppo.num_envs": command.envs,
        "pbt.population_size": command.population,
        "pbt.total_steps": command.steps,
        "pbt.perturbation_interval": command.interval,
        "pbt.seed": command.seed,
    }
    settings = parse_settings(command.settings)
    for name in settings:
        theirs = name.removeprefix("pbt.")
        if theirs in OURS and theirs not in PBTConfig.model_fields:
            raise ValueError(f"`{name}` is not a setting: it is called `pbt.{OURS[theirs]}` here.")
    if command.config is not None:
        return with_flags(read_config(command.config, PBTJobConfig), flags, settings)
    return from_flags(PBTJobConfig, flags, settings)


def _sink(config: PBTJobConfig, before: Sequence[Record] = ()) -> PopulationConsoleSink:
    population = config.pbt
    return PopulationConsoleSink(population.population_size, population.num_intervals, mode=population.mode, before=before)


def _run_to_replay(command: PBT) -> Path:
    if len(command.action) != 2 or command.action[0] != "replay":
        raise ValueError(f"`morphogen pbt` takes options, or `replay RUN`, got {' '.join(command.action)!r}. Check the words.")
    given = [name for name, value in vars(command).items() if name != "action" and value not in (None, ())]
    if given:
        raise ValueError(f"`--{given[0].replace('settings', 'set')}` must be left out with `replay RUN`: the run says it all.")
    return Path(command.action[1])


def _replay(run: Path) -> int:
    """Print the lineage with both scores, and the verdict."""
    result, console = replay_run(run), result_console()
    sheet = Table(box=None, pad_edge=False)
    for column in ("member", "interval", "steps", "score then", "score now", ""):
        sheet.add_column(column, justify="right")
    for each in result.intervals:
        same = "same" if each.is_same else "differs"
        sheet.add_row(
            f"{each.member}", f"{each.interval}", f"{each.step:,}", f"{each.recorded_score:.6g}", f"{each.score:.6g}", same
        )
    console.print(sheet)
    console.print(result.verdict, highlight=False, soft_wrap=True)
    return DONE if result.is_same else FAILED


def _conclude(result: PBTJobResult) -> int:
    """Print what the best member reached and where everything is; or how to go on."""
    if not result.finished:
        return say_how_to_resume(result.directory)
    values = ", ".join(f"{name} {_text(value)}" for name, value in result.hyperparameters.items())
    console = result_console()
    console.print(f"Best: member {result.best}, score {result.score:.6g}, with {values}.", highlight=False, soft_wrap=True)
    return say_where(result.directory, (result.policy, "schedule.yaml", "report.html", "summary.json"), result.lost_sinks)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
