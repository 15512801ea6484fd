"""The grow job: static host, full-size reference and grown network, trained alike and compared.

    for each repeat, for each arm:   run the arm tick by tick, checkpointing
                                     keep its result in summary.json; write the grown network's files
    at the end:                      table, verdict, report

Killed at any moment, ``resume`` goes on from the last checkpoint of the arm under way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
from pathlib import Path

from morphogen import control, tasks
from morphogen.envs.episode import menu_of
from morphogen.errors import CheckpointError
from morphogen.governor.faults import Fault
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.artefacts import write_network
from morphogen.recipes.config import Arm, GrowConfig
from morphogen.recipes.events import RunFinished, RunStarted
from morphogen.recipes.interrupts import interrupts
from morphogen.recipes.policy_file import FILE_NAME, find, load_policy
from morphogen.recipes.results import ArmResult, Interval, Row, paired_difference, sentence, table
from morphogen.recipes.run_directory import RunDirectory, write_bytes
from morphogen.recipes.versions import versions
from morphogen.tasks import Task
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Event, Json, Sink, to_json
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report
from morphogen.telemetry.tensorboard import TensorBoardSink

_EXAMPLE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class GrowResult:
    """What a job leaves behind.

    Attributes:
        directory: The run directory.
        results: Every finished arm of every repeat.
        rows: The table.
        difference: Grown minus static on the test split, paired.
        finished: False if it was interrupted; ``resume`` then goes on.
        metric_name: What the metric is called.
        lost_sinks: Sinks that failed on the way, so that their output is incomplete.
    """

    directory: Path
    results: tuple[ArmResult, ...]
    rows: tuple[Row, ...]
    difference: Interval | None
    finished: bool
    metric_name: str = "accuracy"
    lost_sinks: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Grown against static in one plain sentence."""
        return sentence(self.difference, self.metric_name)


def grow(config: GrowConfig, out: Path | None = None, *, sinks: tuple[Sink, ...] = ()) -> GrowResult:
    """Run the job from the start.

    Args:
        config: What to run; names are checked before anything is written.
        out: Run directory, new or empty; None for the next free one below ``runs/``.
        sinks: Further sinks, for example the console's.

    Raises:
        ValueError: A task, policy, device or fault does not exist.
        MorphogenError: The directory cannot be used.
    """
    check(config)
    directory = RunDirectory.create(out, config)
    keep_policy(config.policy, directory)
    return _Job(config, directory, sinks).run()


def resume(path: Path, *, sinks: tuple[Sink, ...] = ()) -> GrowResult:
    """Go on with a killed or interrupted job; on a CPU its results are bit-identical to those of an undisturbed one.

    Raises:
        MorphogenError: There is no run at ``path``, or its files are damaged.
    """
    directory, config = RunDirectory.open(path, GrowConfig)
    check(config, keep_policy(config.policy, directory))
    return _Job(config, directory, sinks).run()


def num_finished_arms(path: Path) -> int:
    """Return how many arms of the job at ``path`` are done."""
    return len(RunDirectory(path).read_summary().get("results", []))


def check(config: GrowConfig, copied: Path | None = None) -> None:
    """Check names, devices and data before anything is built or written.

    Args:
        config: What is to run.
        copied: The run's own copy of the trained policy, if it has one.

    Raises:
        ValueError: A task, policy, device or fault does not exist.
        DataError: The task's data is not here; the message says how to get it.
    """
    task = tasks.get(config.task)
    _check_policy(config.policy if copied is None else str(copied), task)
    if task.source is not None:
        task.source.require()
    tasks.resolve_device(config.device)
    for fault in map(Fault.parse, config.inject):
        if "grown" not in config.arms or fault.step >= (config.total_steps or task.total_steps):
            raise ValueError(
                f"`inject` must name a step of the grown arm, got {fault.kind}@{fault.step} for "
                f"{config.total_steps or task.total_steps} steps of {', '.join(config.arms)}. It would have no effect."
            )


def keep_policy(policy: str, directory: RunDirectory) -> Path | None:
    """Copy a trained policy into the run directory, unless it is there: what is resumed is what was begun.

    Returns the copy; None for a built-in policy.
    """
    if policy in control.names():
        return None
    copied = directory.path / FILE_NAME
    if not copied.is_file():
        write_bytes(copied, find(policy).read_bytes())
    return copied


def _check_policy(policy: str, task: Task) -> None:
    """Check that ``policy`` is a built-in or a trained one that can decide about ``task``."""
    if policy in control.names():
        return
    learned = load_policy(find(policy, also=control.names())).on(task.name)
    try:
        menu_of(task, learned.origin.env)
    except ValueError as error:
        raise CheckpointError(f"{policy}: cannot decide about {task.name}: {error}") from error


class _Job:
    """One sitting of a job: what is left to do, done arm by arm."""

    def __init__(self, config: GrowConfig, directory: RunDirectory, sinks: tuple[Sink, ...]) -> None:
        summary = directory.read_summary()
        self._config, self._directory = config, directory
        self._results = [ArmResult(**result) for result in summary.get("results", [])]
        self._networks: dict[str, Json] = dict(summary.get("networks", {}))
        self._log_offset: int = summary.get("log_offset", 0)
        self._announced_end: bool = summary.get("finished", False)
        self._stop = False
        copied = keep_policy(config.policy, directory)
        self._learned = None if copied is None else load_policy(copied)
        self._arm: ArmRun | None = None
        self._reopened = self._reopen()
        self._log = JsonlSink(directory.events, resume_at=self._log_offset)
        self._bus = EventBus([self._log, TensorBoardSink(directory.path / "tensorboard"), *sinks])

    def run(self) -> GrowResult:
        """Do what is left, or stop at the next tick when interrupted."""
        with contextlib.closing(self._bus), interrupts(self._request_stop):
            if self._log.offset == 0:
                self._emit(_run_started(self._config, self._directory.path))
            for repeat, arm in self._remaining():
                self._arm = self._reopened or self._started(arm, repeat)
                self._reopened = None
                if not self._train(self._arm):
                    break
            finished = not self._remaining()
            self._arm = None
            if finished and not self._announced_end:
                rows, difference = table(self._results), paired_difference(self._results, "grown", "static")
                self._emit(RunFinished(rows=tuple(map(_flat, rows)), paired_difference=difference))
                self._write_summary(finished=True)
        write_report(self._directory.path)
        return GrowResult(
            directory=self._directory.path,
            results=tuple(self._results),
            rows=table(self._results),
            difference=paired_difference(self._results, "grown", "static"),
            finished=finished,
            metric_name=tasks.get(self._config.task).metric_name,
            lost_sinks=self._bus.dropped,
        )

    def _remaining(self) -> list[tuple[int, Arm]]:
        done = {(result.repeat, result.arm) for result in self._results}
        pairs: list[tuple[int, Arm]] = [(repeat, arm) for repeat in range(self._config.repeats) for arm in self._config.arms]
        return [pair for pair in pairs if pair not in done]

    def _started(self, arm: Arm, repeat: int) -> ArmRun:
        self._arm = run = ArmRun(self._config, arm, repeat, self._emit, learned=self._learned)
        run.start()
        return run

    def _train(self, run: ArmRun) -> bool:
        """Train to the end and keep the result; False if a stop was requested first, after a checkpoint."""
        ticks = 0
        while not run.done:
            run.run_tick()
            ticks += 1
            if self._stop and not run.done:
                self._checkpoint(run)
                return False
            if ticks % self._config.checkpoint_every_ticks == 0:
                self._checkpoint(run)
        self._results.append(run.finish())
        if run.arm == "grown":
            self._write_network(run)
        self._write_summary(finished=False)
        return not self._stop

    # -- files ------------------------------------------------------------------------------------------------------

    def _checkpoint(self, run: ArmRun) -> None:
        """Write a checkpoint beside the last one; the pointer moves when the new one is whole."""
        name = f"{run.arm}-{run.repeat}-step-{run.cursor.step}-{run.governor.rollbacks}"
        run.save(self._directory.checkpoints / name, self._log.offset)
        self._directory.point_at(name, arm=run.arm, repeat=run.repeat)

    def _reopen(self) -> ArmRun | None:
        """Return the arm under way at its last checkpoint; None if the next arm has to start anew."""
        remaining = self._remaining()
        pointer = self._directory.read_pointer() if remaining else None
        if pointer is None:
            return None
        if (pointer["repeat"], pointer["arm"]) != remaining[0]:
            return None  # the arm was finished after its last checkpoint
        run = ArmRun(self._config, pointer["arm"], pointer["repeat"], self._emit, learned=self._learned)
        self._log_offset = run.load(self._directory.checkpoints / pointer["checkpoint"])
        return run

    def _write_network(self, run: ArmRun) -> None:
        self._directory.networks.mkdir(exist_ok=True)
        stem = self._directory.networks / f"grown-{run.repeat}"
        difference = write_network(run.model, run.built.data.test.rows(slice(_EXAMPLE_SIZE))[0], stem)
        self._networks[str(run.repeat)] = {"file": f"networks/{stem.name}.pt2", "max_abs_difference": difference}

    def _write_summary(self, *, finished: bool) -> None:
        """Write results so far and how long the log was; only then is an arm done."""
        grown = [result for result in self._results if result.arm == "grown"]
        best = max(grown, key=lambda result: result.decision_metric, default=None)
        if best is not None:
            for ending in ("pt2", "safetensors"):
                source = self._directory.networks / f"grown-{best.repeat}.{ending}"
                shutil.copyfile(source, self._directory.path / f"grown.{ending}")
        difference = paired_difference(self._results, "grown", "static")
        self._directory.write_summary(
            {
                "finished": finished,
                "verdict": sentence(difference, tasks.get(self._config.task).metric_name),
                "paired_difference": to_json(difference),
                "rows": to_json(tuple(map(_flat, table(self._results)))),
                "results": to_json(tuple(self._results)),
                "networks": to_json(self._networks),
                "grown_is_repeat": None if best is None else best.repeat,
                "log_offset": self._log.offset,
            }
        )
        self._directory.remove_checkpoints()

    # -- events -----------------------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        run = self._arm
        if run is None:
            self._bus.emit(event)
        else:
            self._bus.emit(event, arm=run.arm, repeat=run.repeat, train_step=run.cursor.step)

    def _request_stop(self) -> None:
        self._stop = True


def _run_started(config: GrowConfig, directory: Path) -> RunStarted:
    return RunStarted(
        task=config.task,
        policy=config.policy,
        command=shlex.join(["morphogen", "grow", "--config", str(directory / "config.yaml")]),
        config=config.model_dump(mode="json"),
        versions=versions(),
        repeats=config.repeats,
        metric_name=tasks.get(config.task).metric_name,
    )


def _flat(row: Row) -> dict[str, Json]:
    """One row as flat data, the interval's numbers beside the rest."""
    metric = row.test_metric
    return {
        "arm": row.arm,
        "repeats": metric.repeats,
        "mean": metric.mean,
        "low": metric.low,
        "high": metric.high,
        "parameters": row.parameters,
        "train_flops": row.train_flops,
        "wall_seconds": row.wall_seconds,
        "rollbacks": row.rollbacks,
    }
