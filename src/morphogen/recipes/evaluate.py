"""The evaluate job: a trained policy and others play the same held-out episodes, and are compared.

    for each batch of seeds, for each player:   play one episode on each seed; keep the results in summary.json
    at the end:                                 table, paired differences, Pareto fronts, report

Killed at any moment, ``resume_evaluation`` goes on with the batch that was under way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from morphogen import control, tasks
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.episode import menu_of
from morphogen.envs.learned import LearnedPolicy
from morphogen.envs.players import LearnedPlayer, Player, PolicyPlayer
from morphogen.errors import CheckpointError
from morphogen.recipes.comparison import LEARNED, Difference, Played, PlayerRow, compare, sentences
from morphogen.recipes.evaluate_config import EvaluateConfig
from morphogen.recipes.evaluate_events import EpisodePlayed, EvaluationFinished, EvaluationStarted
from morphogen.recipes.interrupts import interrupts
from morphogen.recipes.policy_file import FILE_NAME, find, load_policy
from morphogen.recipes.run_directory import RunDirectory, write_bytes
from morphogen.recipes.versions import versions
from morphogen.tasks import Task
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Sink, to_json
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report


@dataclasses.dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation leaves behind.

    Attributes:
        directory: The run directory.
        played: Every episode so far.
        rows: The table; empty before the end.
        differences: Of the trained policy against each other player, in return and test metric; empty before the end.
        sentences: The outcome in plain words; empty before the end.
        title: What was compared.
        metric_name: What the metric is called.
        lost_sinks: Sinks that failed on the way, so that their output is incomplete.
    """

    directory: Path
    played: tuple[Played, ...]
    rows: tuple[PlayerRow, ...]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]
    title: str
    metric_name: str
    lost_sinks: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """False if it was interrupted; ``resume_evaluation`` then goes on."""
        return bool(self.rows)


def evaluate(config: EvaluateConfig, out: Path | None = None, *, sinks: tuple[Sink, ...] = ()) -> EvaluateResult:
    """Run the job from the start.

    Args:
        config: What to play; everything is checked before anything is written.
        out: Run directory, new or empty; None for the next free one below ``runs/``. The policy is copied into it.
        sinks: Further sinks, for example the console's.

    Raises:
        ValueError: There is no such policy, player, task or device, or the task has more slots than the policy knows.
        CheckpointError: The policy's file is damaged, or made for something else.
        MorphogenError: The directory cannot be used.
    """
    file = find(config.policy)
    check(config, load_policy(file))
    content = file.read_bytes()
    directory = RunDirectory.create(out, config)
    write_bytes(directory.path / FILE_NAME, content)
    return _Job(config, directory, sinks).run()


def resume_evaluation(path: Path, *, sinks: tuple[Sink, ...] = ()) -> EvaluateResult:
    """Go on with a killed or interrupted job; its results are those of an undisturbed one, on a CPU to the bit.

    Raises:
        MorphogenError: There is no run at ``path``, or its files are damaged.
    """
    directory, config = RunDirectory.open(path, EvaluateConfig)
    if not (path / FILE_NAME).is_file():  # killed before it was copied
        write_bytes(path / FILE_NAME, find(config.policy).read_bytes())
    check(config, load_policy(path / FILE_NAME))
    return _Job(config, directory, sinks).run()


def check(config: EvaluateConfig, policy: LearnedPolicy) -> None:
    """Check names, device, data and layout before anything is built or written.

    Raises:
        ValueError: A player, the task or the device does not exist, or the task does not fit the policy's places.
        CheckpointError: The policy was made for something else.
        DataError: The task's data is not here; the message says how to get it.
    """
    task = tasks.get(config.task or policy.origin.task)
    for name in config.against:
        control.make(name, task.blueprints)
    tasks.resolve_device(config.device)
    try:
        menu = menu_of(task, environment(config, policy))
    except ValueError as error:
        raise CheckpointError(f"{config.policy}: cannot decide about {task.name}: {error}") from error
    policy.fit(menu, config.policy)
    if task.source is not None:
        task.source.require()


def environment(config: EvaluateConfig, policy: LearnedPolicy) -> GrowthEnvConfig:
    """Return how episodes are played: as in training, with the test split measured at the end.

    On another task than that of training, slots and length are those of the task.
    """
    given = {"total_steps": config.total_steps, "tick_steps": config.tick_steps}
    where: dict[str, Any] = {"executor": config.executor, "num_workers": config.num_workers, "device": config.device}
    changed = {name: value for name, value in given.items() if value is not None}
    own = policy.on(config.task or policy.origin.task).origin.env
    return own.replace(measure_test=True, worker_deadline_seconds=None, **where, **changed)


class _Job:
    """One sitting of a job: what is left to play, batch by batch."""

    def __init__(self, config: EvaluateConfig, directory: RunDirectory, sinks: tuple[Sink, ...]) -> None:
        summary = directory.read_summary()
        self._config, self._directory = config, directory
        self._policy = load_policy(directory.path / FILE_NAME)
        self._task: Task = tasks.get(config.task or self._policy.origin.task)
        self._played = [_read(episode) for episode in summary.get("episodes", [])]
        self._announced_end: bool = summary.get("finished", False)
        self._stop = False
        self._env: GrowthVectorEnv | None = None
        self._log = JsonlSink(directory.events, resume_at=summary.get("log_offset", 0))
        self._bus = EventBus([self._log, *sinks])

    def run(self) -> EvaluateResult:
        """Play what is left, or stop within a batch when interrupted: it is then played again."""
        with contextlib.closing(self._bus), contextlib.closing(self), interrupts(self._request_stop):
            if self._log.offset == 0:
                self._bus.emit(self._started())
            for name, seeds in self._remaining():
                found = self._play(name, seeds)
                if found is None:
                    break
                self._played += found
                for episode in found:
                    self._bus.emit(EpisodePlayed(**dataclasses.asdict(episode)))
                self._write_summary()
            result = self._result()
            if result.finished and not self._announced_end:
                rows, differences = (tuple(map(dataclasses.asdict, part)) for part in (result.rows, result.differences))
                self._bus.emit(EvaluationFinished(rows=rows, differences=differences, sentences=result.sentences))
                self._write_summary(result)
        write_report(self._directory.path)
        return dataclasses.replace(result, lost_sinks=self._bus.dropped)

    def close(self) -> None:
        """Close the environments."""
        if self._env is not None:
            self._env.close()
            self._env = None

    # -- playing ----------------------------------------------------------------------------------------------------

    def _remaining(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return which player is to play which batch of seeds; all players play a batch before the next one begins."""
        done = {(episode.player, episode.seed) for episode in self._played}
        seeds, size = self._config.seeds, self._config.num_envs
        batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
        left = [(name, batch) for batch in batches for name in (LEARNED, *self._config.against)]
        return [(name, batch) for name, batch in left if (name, batch[0]) not in done]

    def _play(self, name: str, seeds: Sequence[int]) -> list[Played] | None:
        """Return one whole episode for each seed; None if a stop was requested first.

        An environment whose episode is over begins another one by itself, in which it waits: it is not looked at.
        """
        env, player = self._environments(len(seeds)), self._player(name)
        observation, info = env.reset(seed=list(seeds))
        player.begin(seeds)
        found: dict[int, Played] = {}
        while len(found) < len(seeds):
            if self._stop:
                return None
            choices_NH = player.choose(env, observation, info)
            choices_NH[list(found)] = 0
            observation, _, ended_N, _, info = env.step(choices_NH)
            for row in map(int, np.flatnonzero(ended_N)):
                if row not in found:
                    found[row] = _played(name, seeds[row], {key: value[row] for key, value in info["final_info"].items()})
        return [found[row] for row in range(len(seeds))]

    def _environments(self, num_envs: int) -> GrowthVectorEnv:
        if self._env is None or self._env.num_envs != num_envs:  # the last batch may be smaller
            self.close()
            config = environment(self._config, self._policy)
            self._env = GrowthVectorEnv(self._task, num_envs, config=config)
        return self._env

    def _player(self, name: str) -> Player:
        if name == LEARNED:
            return LearnedPlayer(self._policy, name, deterministic=self._config.deterministic)
        return PolicyPlayer(name, menu_of(self._task, environment(self._config, self._policy)))

    # -- results ----------------------------------------------------------------------------------------------------

    def _result(self) -> EvaluateResult:
        rows, differences, said = (), (), ()
        if not self._remaining():
            rows, differences = compare(self._played, seed=self._config.seed, resamples=self._config.resamples)
            said = sentences(rows, differences, self._task.metric_name)
        return EvaluateResult(
            directory=self._directory.path,
            played=tuple(self._played),
            rows=rows,
            differences=differences,
            sentences=said,
            title=self._title,
            metric_name=self._task.metric_name,
        )

    @property
    def _title(self) -> str:
        trained = self._policy.origin.task
        transfer = f", trained on {trained} (transfer)" if trained != self._task.name else ""
        return f"{self._task.name}: {self._config.policy}{transfer}, {self._config.episodes} held-out episodes of each player"

    def _write_summary(self, result: EvaluateResult | None = None) -> None:
        """Write results so far and how long the log was; only then is a batch done."""
        self._directory.write_summary(
            {
                "finished": result is not None,
                "title": self._title,
                "task": self._task.name,
                "trained_on": self._policy.origin.task,
                "sentences": [] if result is None else list(result.sentences),
                "rows": [] if result is None else to_json(tuple(map(dataclasses.asdict, result.rows))),
                "differences": [] if result is None else to_json(tuple(map(dataclasses.asdict, result.differences))),
                "episodes": to_json(tuple(map(dataclasses.asdict, self._played))),
                "log_offset": self._log.offset,
            }
        )

    def _started(self) -> EvaluationStarted:
        origin = self._policy.origin
        return EvaluationStarted(
            task=self._task.name,
            policy=self._config.policy,
            trained_on=origin.task,
            trained_by=str(origin.facts.get("command", "")),
            players=(LEARNED, *self._config.against),
            episodes=self._config.episodes,
            metric_name=self._task.metric_name,
            command=shlex.join(["morphogen", "evaluate", "--config", str(self._directory.path / "config.yaml")]),
            config=self._config.model_dump(mode="json"),
            versions=versions(),
        )

    def _request_stop(self) -> None:
        self._stop = True


def _read(episode: dict[str, Any]) -> Played:
    """Return an episode as the summary has it, where NaN is a word."""
    numbers: dict[str, Any] = {name: float(episode[name]) for name in ("test_metric", "metric", "total_return")}
    return Played(**{**episode, **numbers})


def _played(player: str, seed: int, final: dict[str, float]) -> Played:
    return Played(
        player=player,
        seed=seed,
        test_metric=float(final["test_metric"]),
        metric=float(final["metric"]),
        total_return=float(final["return"]),
        parameters=int(final["parameters"]),
        host_parameters=int(final["host_parameters"]),
        relative_flops=float(final["relative_flops"]),
        ticks=int(final["tick"]),
        rolled_back=bool(final["rolled_back"]),
    )
