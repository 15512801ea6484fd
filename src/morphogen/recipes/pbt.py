"""The job that trains a population of agents, and keeps the best of them.

    make one member to see that it works; make the engine
    the population trains; its directory holds reports, decisions and snapshots
    at the end:  save the best member and the schedule it was trained with, report

Killed at any moment, ``resume_population`` goes on from what the directory holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphogen import tasks
from morphogen.errors import MorphogenError
from morphogen.pbt import engines
from morphogen.pbt.changes import differences, fixed_differences
from morphogen.pbt.engines.base import Engine
from morphogen.pbt.scheduler import PBTScheduler
from morphogen.pbt.spaces import Categorical, Ordered
from morphogen.pbt.store import Store
from morphogen.pbt.trainer import PopulationResult, PopulationTrainer
from morphogen.recipes.environments import check_environment
from morphogen.recipes.interrupts import interrupts
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_events import PopulationFaulted, PopulationFinished, PopulationStarted
from morphogen.recipes.pbt_log import cut_back
from morphogen.recipes.pbt_members import AgentFactory
from morphogen.recipes.pbt_results import best_report, save_best, summary_of
from morphogen.recipes.run_directory import RunDirectory
from morphogen.recipes.versions import versions
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Sink
from morphogen.telemetry.jsonl import JsonlSink, Record, elapsed_seconds, last_of, mapping_in, read_records
from morphogen.telemetry.report import write_report
from morphogen.telemetry.tensorboard import TensorBoardSink

_ANY_ENGINE = ("engine", "num_workers", "engine_options")
"""Settings that change no number, so that a run may go on with others."""


@dataclasses.dataclass(frozen=True)
class PBTJobResult:
    """What a job leaves behind.

    Attributes:
        directory: The run directory.
        finished: False if it was interrupted; ``resume_population`` then goes on.
        best: Place of the best member; None before the end.
        score: Of it.
        hyperparameters: Of it, at the end; empty before that.
        policy: Name of its file: ``policy``, which ``PPO.load`` takes, or ``policy.safetensors``; empty before that.
        lost_sinks: Sinks that failed on the way, so that their output is incomplete.
    """

    directory: Path
    finished: bool
    best: int | None = None
    score: float = float("nan")
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    policy: str = ""
    lost_sinks: tuple[str, ...] = ()


def train_population(config: PBTJobConfig, out: Path | None = None, *, sinks: tuple[Sink, ...] = ()) -> PBTJobResult:
    """Run the job from the start.

    Args:
        config: What to run; a member and the engine are made before anything is written.
        out: Run directory, new or empty; None for the next free one below ``runs/``.
        sinks: Further sinks, for example the console's.

    Raises:
        ValueError: There is no such environment or device, a member does not fit it, or the engine has no such option.
        PopulationLost: No member was left that could be taken over.
        MorphogenError: The directory cannot be used, or a package is missing.
    """
    check(config)
    with contextlib.closing(_engine(config)) as engine:
        directory = RunDirectory.create(out, config)
        directory.checkpoints.rmdir()  # the directory of the population has snapshots instead
        return _run(_Sitting(config, engine, directory, is_first=True), sinks)


def resume_population(path: Path, *, accept_changes: bool = False, sinks: tuple[Sink, ...] = ()) -> PBTJobResult:
    """Go on with a killed or interrupted job; one that is synchronous comes to the same on a CPU, bit by bit.

    Args:
        path: Its directory.
        accept_changes: Go on although ``config.yaml`` says something else than when it began, as far as settings of `pbt` can
            change in a population that has begun; a finished job goes on if it has further steps to do.
        sinks: Further sinks, for example the console's.

    Raises:
        MorphogenError: There is no run at ``path``, its files are damaged, it is under way, or ``config.yaml`` says something
            else than when it began. Besides, what :func:`train_population` raises.
    """
    directory, config = RunDirectory.open(path, PBTJobConfig)
    summary = directory.read_summary()
    if summary.get("finished") and not accept_changes:
        write_report(path)
        best = summary["best"]
        return PBTJobResult(path, True, best["member"], float(best["score"]), best["hyperparameters"], summary["policy"])
    check(config)
    with contextlib.closing(_engine(config)) as engine:
        return _run(_Sitting(config, engine, directory, _start_in(directory) is None, accept_changes), sinks)


def check(config: PBTJobConfig) -> None:
    """Check devices, data and environment, and make one member.

    Raises:
        ValueError: The device or the environment does not exist, or a member does not fit it.
        MorphogenError: The environment cannot be made, or the task's data is not here.
    """
    tasks.resolve_device(config.ppo.device)
    if config.member == "ppo":
        check_environment(config.subject, config.env_kwargs, video=False)
    else:
        source = tasks.get(config.subject).source
        if source is not None:
            source.require()
        if config.growth_env is not None:
            tasks.resolve_device(config.growth_env.device)
    initial = PBTScheduler(config.pbt).initial(0)
    with contextlib.closing(_factory(config)(0, initial, 0)) as member:
        member.apply_hyperparameters(initial)


@dataclasses.dataclass(frozen=True)
class _Sitting:
    """One sitting of a job."""

    config: PBTJobConfig
    engine: Engine
    directory: RunDirectory
    is_first: bool
    accept_changes: bool = False


def _run(sitting: _Sitting, sinks: tuple[Sink, ...]) -> PBTJobResult:
    """Do what is left, or stop as soon as nobody trains when interrupted."""
    config, directory = sitting.config, sitting.directory
    if not sitting.is_first:
        _take_up(sitting)
    trainer = PopulationTrainer(
        _factory(config),
        config.pbt,
        sitting.engine,
        directory=directory.path,
        accept_changes=sitting.accept_changes,
        emit=lambda event: bus.emit(event),
    )
    with contextlib.closing(trainer):  # the directory is this process's from here on
        bus = EventBus([JsonlSink(directory.events), TensorBoardSink(directory.path / "tensorboard"), *sinks])
        with contextlib.closing(bus), interrupts(trainer.stop):
            result, policy = _trained(sitting, trainer, bus)
    if not result.finished:
        return PBTJobResult(directory.path, False, lost_sinks=bus.dropped)
    values = dict(result.hyperparameters)
    return PBTJobResult(directory.path, True, result.best, result.score, values, policy, lost_sinks=bus.dropped)


def _trained(sitting: _Sitting, trainer: PopulationTrainer, bus: EventBus) -> tuple[PopulationResult, str]:
    """Return what the population came to, and the name of its best member's file."""
    config, directory = sitting.config, sitting.directory
    if sitting.is_first:
        bus.emit(_started(config, directory))
    try:
        result = trainer.run()
        return result, _conclude(sitting, result, bus) if result.finished else ""
    except MorphogenError as error:
        bus.emit(PopulationFaulted(kind=type(error).__name__, message=str(error)))
        error.add_note(f"What was done is saved. Go on with: morphogen resume {directory.path}")
        raise
    finally:
        write_report(directory.path)


def _conclude(sitting: _Sitting, result: PopulationResult, bus: EventBus) -> str:
    """Save the best member, its schedule and the summary; returns the name of the first."""
    config, directory = sitting.config, sitting.directory
    policy = save_best(config, directory, result)
    seconds = elapsed_seconds(read_records(directory.events).records)
    bus.emit(
        PopulationFinished(
            step=best_report(result).step,
            best=result.best,
            score=result.score,
            hyperparameters=dict(result.hyperparameters),
            wall_seconds=seconds,
            cpu_seconds=sum(report.cpu_seconds for report in result.reports),
        )
    )
    directory.write_summary(summary_of(config, result, policy=policy, wall_seconds=seconds))
    return policy


def _take_up(sitting: _Sitting) -> None:
    """Refuse another config than that of the run, and cut the log back to what the directory holds."""
    config, directory = sitting.config, sitting.directory
    with Store(directory.path) as store:
        reports, exploits = store.reports(), store.exploits()
        intervals = max((report.interval for report in reports), default=0)
        _refuse_changes(sitting, mapping_in(_start_in(directory) or {}, "config"), store.fact("config"), intervals)
        cut_back(directory.events, reports, exploits, synchronous=config.pbt.synchronous)


def _refuse_changes(
    sitting: _Sitting, start: Mapping[str, Any], population: Mapping[str, Any] | None, intervals_done: int
) -> None:
    """Refuse what cannot change; what can, unless it was asked for. Schedules of the agents may be told in another way.

    Args:
        sitting: With the config as it is now.
        start: The config that the job began with.
        population: That of the population when it last went on; None if it never began.
        intervals_done: How many intervals somebody has behind it.

    Raises:
        MorphogenError: Something was changed.
    """
    config, where = sitting.config, sitting.directory.config
    now, before = config.model_dump(mode="json"), dict(start)
    if population is not None:
        now["pbt"], before["pbt"] = config.pbt.model_dump(mode="json"), population
    old_agent = PBTJobConfig(**start).agent()
    is_same_agent = config.agent() == old_agent
    ignored = {*_ANY_ENGINE, *(["ppo"] if is_same_agent else [])}
    then, today = ({name: value for name, value in each.items() if name not in ignored} for each in (before, now))
    changed = differences(then, today)
    fixed = [change for change in changed if not change.startswith("pbt.")]
    if population is not None:
        fixed += fixed_differences(population, now["pbt"], intervals_done)
    if not changed:
        return
    again = f"begin a new run with `morphogen pbt --config {where} --out NEW`"
    if fixed or not sitting.accept_changes:
        also = "" if fixed else f", go on with them by `morphogen resume {sitting.directory.path} --accept-changes`"
        raise MorphogenError(f"{where}: is not the config of this run: {'; '.join(changed)}. Put it back{also}, or {again}.")
    if not is_same_agent:
        raise MorphogenError(
            f"{where}: `ppo.schedule_steps` must be {old_agent.schedule_steps}: the members' schedules end there, and not "
            f"after {config.pbt.total_steps} steps. Set it, or {again}."
        )


def _start_in(directory: RunDirectory) -> Record | None:
    """Return the record of the beginning, if it came to that."""
    return last_of(read_records(directory.events).records, "PopulationStarted") if directory.events.exists() else None


def _engine(config: PBTJobConfig) -> Engine:
    return engines.make(config.engine, _factory(config), config.pbt, config.options)


def _factory(config: PBTJobConfig) -> AgentFactory:
    return AgentFactory(config.model_dump(mode="json"))


def _started(config: PBTJobConfig, directory: RunDirectory) -> PopulationStarted:
    spaces = config.pbt.hyperparameters
    return PopulationStarted(
        step=0,
        member=config.member,
        subject=config.subject,
        population_size=config.pbt.population_size,
        total_steps=config.pbt.total_steps,
        interval_steps=config.pbt.perturbation_interval,
        kinds={name: space.kind for name, space in spaces.items()},
        choices={name: space.values for name, space in spaces.items() if isinstance(space, Categorical | Ordered)},
        mode=config.pbt.mode,
        engine=config.engine,
        command=shlex.join(["morphogen", "pbt", "--config", str(directory.config)]),
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
