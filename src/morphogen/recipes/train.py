"""The train job: an agent learns when and where networks grow, and is saved as a policy.

    for each update:   the agent plays whole episodes, each the training of a network; it learns from them
                       note what each network came to; now and then checkpoint the whole run
    at the end:        save the policy, report

Killed at any moment, ``resume_train`` goes on from the last checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morphogen import tasks
from morphogen.errors import CheckpointError, StateMismatch
from morphogen.recipes.agent_job import AgentJob, Fault
from morphogen.recipes.policy_file import FILE_NAME, find, load_policy, save_policy
from morphogen.recipes.recorded_growth import FinishedEpisode, RecordedGrowth
from morphogen.recipes.run_directory import RunDirectory, write_bytes
from morphogen.recipes.train_config import TrainConfig
from morphogen.recipes.train_events import EpisodeFinished, EpisodesAveraged, TrainFaulted, TrainFinished, TrainStarted
from morphogen.recipes.versions import versions
from morphogen.rl.events import Updated
from morphogen.rl.ppo import PPO
from morphogen.rl.rollout import EPISODES_AVERAGED
from morphogen.telemetry.events import Emit, Event, Json, Sink
from morphogen.telemetry.report import write_report

_START = "start.safetensors"  # the policy that training started from


@dataclasses.dataclass(frozen=True)
class Recent:
    """What the last episodes of a job came to; means over ``episodes``, at most 100, of them."""

    episodes: int
    mean_return: float
    metric: float
    parameters: float
    rollbacks: int


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a job leaves behind.

    Attributes:
        directory: The run directory; ``policy.safetensors`` in it is the policy.
        finished: False if it was interrupted; ``resume_train`` then goes on.
        num_steps: Decisions taken, over all environments.
        metric_name: What the metric is called.
        recent: What the last episodes came to; None before the end.
        lost_sinks: Sinks that failed on the way, so that their output is incomplete.
    """

    directory: Path
    finished: bool
    num_steps: int
    metric_name: str
    recent: Recent | None
    lost_sinks: tuple[str, ...] = ()


def train(config: TrainConfig, out: Path | None = None, *, sinks: tuple[Sink, ...] = ()) -> TrainResult:
    """Run the job from the start.

    Args:
        config: What to run; environments and agent are built before anything is written.
        out: Run directory, new or empty; None for the next free one below ``runs/``.
        sinks: Further sinks, for example the console's.

    Raises:
        ValueError: A setting does not fit the task, or there is no such device or policy to start from.
        CheckpointError: The policy to start from is damaged or does not fit.
        EnvironmentFault: The environments failed, for example because a worker process died and could not be replaced. What
            was learned is saved; a note says how to resume.
        UpdateDiverged: Updates were not finite. Likewise.
        MorphogenError: The task's data is not here, or the directory cannot be used.
    """
    check(config)
    start = None if config.start_from is None else find(config.start_from)
    with contextlib.closing(_Job(config)) as job:
        if start is not None:
            job.start_from(start)
        directory = RunDirectory.create(out, config)
        if start is not None:
            write_bytes(directory.path / _START, start.read_bytes())
        return _run(job, directory, sinks, log_offset=0)


def resume_train(path: Path, *, sinks: tuple[Sink, ...] = ()) -> TrainResult:
    """Go on with a killed or interrupted job; on a CPU its results are bit-identical to those of an undisturbed one.

    Raises:
        MorphogenError: There is no run at ``path``, or its files are damaged. Besides, what :func:`train` raises.
    """
    directory, config = RunDirectory.open(path, TrainConfig)
    summary = directory.read_summary()
    if summary.get("finished"):
        write_report(path)
        return TrainResult(path, True, summary["num_steps"], summary["metric_name"], Recent(**summary["recent"]))
    check(config)
    with contextlib.closing(_Job(config)) as job:
        log_offset = job.restore(directory)
        if log_offset == 0 and config.start_from is not None:  # there is no checkpoint yet
            job.start_from(path / _START if (path / _START).is_file() else find(config.start_from))
        return _run(job, directory, sinks, log_offset=log_offset)


def check(config: TrainConfig) -> None:
    """Check devices and data before anything is built or written.

    Raises:
        ValueError: There is no such device.
        DataError: The task's data is not here; the message says how to get it.
    """
    source = tasks.get(config.task).source
    if source is not None:
        source.require()
    for device in (config.env.device, config.ppo.device):
        tasks.resolve_device(device)


class _Job(AgentJob):
    """One sitting of a train job."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._env = RecordedGrowth(config.task, config.num_envs, config=config.env)
        self._recent: collections.deque[FinishedEpisode] = collections.deque(maxlen=EPISODES_AVERAGED)
        self._rollbacks = 0
        self.recent: Recent | None = None
        super().__init__(self._build, total_steps=config.total_steps, checkpoint_every_updates=config.checkpoint_every_updates)

    def _build(self, emit: Emit) -> PPO:
        try:
            return PPO(self._env, self._config.agent(), emit=emit)
        except ValueError:  # a setting of the agent: nobody else would end the workers
            self._env.close()
            raise

    def start_from(self, file: Path) -> None:
        """Take over the weights of a policy.

        Raises:
            CheckpointError: They do not fit the agent, or the file is damaged.
        """
        policy = load_policy(file)
        policy.fit(self._env.menu, str(file))
        try:
            self.agent.set_parameters(policy.weights())
        except StateMismatch as error:
            raise CheckpointError(f"{file}: does not fit the agent that `ppo` describes: {error}") from error

    @property
    def metric_name(self) -> str:
        """What the metric is called."""
        return self._env.task.metric_name

    def started(self) -> TrainStarted:
        return TrainStarted(
            step=0,
            task=self._config.task,
            metric_name=self.metric_name,
            total_steps=self._config.total_steps,
            episode_steps=self._config.episode_steps,
            parameters=sum(parameter.numel() for parameter in self.agent.policy.parameters()),
            num_envs=self._config.num_envs,
            slots=self._env.menu.slots,
            command=shlex.join(["morphogen", "train", "--config", str(self.directory.config)]),
            config=self._config.model_dump(mode="json"),
            versions=versions(),
        )

    def emit(self, event: Event) -> None:
        """Log ``event``; before an update, the episodes that went into it."""
        if isinstance(event, Updated):
            self._note_episodes(event.step)
        super().emit(event)

    def after_update(self, event: Updated) -> None:
        """Nothing: its episodes are noted already."""

    def facts(self) -> dict[str, Json]:
        return {"recent": [dataclasses.asdict(episode) for episode in self._recent], "rollbacks": self._rollbacks}

    def remember(self, facts: dict[str, Any]) -> None:
        self._recent.extend(FinishedEpisode(**episode) for episode in facts["recent"])
        self._rollbacks = facts["rollbacks"]

    def faulted(self, fault: Fault) -> TrainFaulted:
        return TrainFaulted(step=self.agent.num_steps, kind=type(fault).__name__, message=str(fault))

    def conclude(self) -> None:
        """Save the policy and what the last episodes came to."""
        recent = recent_of(self._recent)
        steps, updates, seconds = self.agent.num_steps, self.agent.progress.num_updates, self.wall_seconds
        facts = {"steps": steps, "updates": updates, "recent": dataclasses.asdict(recent)}
        save_policy(
            self.agent, self._env, self.directory.path / FILE_NAME, {**facts, "config": self._config.model_dump(mode="json")}
        )
        self.emit(TrainFinished(step=steps, updates=updates, wall_seconds=seconds, **dataclasses.asdict(recent)))
        self.directory.write_summary(
            {
                "finished": True,
                "task": self._config.task,
                "metric_name": self.metric_name,
                "num_steps": steps,
                "num_updates": updates,
                "recent": dataclasses.asdict(recent),
                "rollbacks": self._rollbacks,
                "policy": FILE_NAME,
                "wall_seconds": seconds,
            }
        )
        self.directory.remove_checkpoints()
        self.recent = recent

    def _note_episodes(self, step: int | None) -> None:
        finished = self._env.take_finished()
        if not finished:
            return
        self._recent.extend(finished)
        self._rollbacks += sum(episode.rolled_back for episode in finished)
        for episode in finished:
            super().emit(EpisodeFinished(step=step, **dataclasses.asdict(episode)))
        super().emit(_averaged(finished, step, self._rollbacks))


def recent_of(episodes: Sequence[FinishedEpisode] | collections.deque[FinishedEpisode]) -> Recent:
    """Return what ``episodes`` came to; NaN where there are none."""
    return Recent(
        episodes=len(episodes),
        mean_return=_mean([episode.total_reward for episode in episodes]),
        metric=_mean([episode.metric for episode in episodes]),
        parameters=_mean([episode.parameters for episode in episodes]),
        rollbacks=sum(episode.rolled_back for episode in episodes),
    )


def _averaged(episodes: Sequence[FinishedEpisode], step: int | None, rollbacks: int) -> EpisodesAveraged:
    ticks = sum(episode.ticks for episode in episodes)
    return EpisodesAveraged(
        step=step,
        episodes=len(episodes),
        mean_return=_mean([episode.total_reward for episode in episodes]),
        metric=_mean([episode.metric for episode in episodes]),
        parameters=_mean([episode.parameters for episode in episodes]),
        relative_flops=_mean([episode.relative_flops for episode in episodes]),
        rollbacks=rollbacks,
        term={name: _mean([episode.terms[name] for episode in episodes]) for name in episodes[0].terms},
        op={name: sum(episode.ops[name] for episode in episodes) / ticks for name in episodes[0].ops},
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def _run(job: _Job, directory: RunDirectory, sinks: tuple[Sink, ...], *, log_offset: int) -> TrainResult:
    is_done, lost = job.run(directory, sinks, log_offset=log_offset)
    return TrainResult(directory.path, is_done, job.agent.num_steps, job.metric_name, job.recent, lost)
