"""The PPO job: an agent trained in one environment, evaluated and saved.

    make one environment to see that it works; make the agent
    for each update:   learn; now and then evaluate and checkpoint
    at the end:        evaluate, record, save the policy, report

Killed at any moment, ``resume_ppo`` goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from morphogen.errors import EnvironmentFault, UpdateDiverged
from morphogen.recipes.environments import check_environment, record_episodes
from morphogen.recipes.interrupts import interrupts
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.ppo_events import Evaluated, PPOFaulted, PPOFinished, PPOStarted
from morphogen.recipes.run_directory import RunDirectory
from morphogen.recipes.versions import versions
from morphogen.rl.evaluation import EvaluationResult
from morphogen.rl.events import Updated
from morphogen.rl.ppo import PPO
from morphogen.rl.vector import make_vector
from morphogen.tasks import resolve_device
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Event, Sink
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report
from morphogen.telemetry.tensorboard import TensorBoardSink

_EVALUATION_ENVS = 8
_MAX_VIDEOS = 3


@dataclasses.dataclass(frozen=True)
class PPOResult:
    """What a job leaves behind.

    Attributes:
        directory: The run directory; ``policy/`` in it is what ``PPO.load`` takes.
        finished: False if it was interrupted; ``resume_ppo`` then goes on.
        num_steps: Environment steps done.
        evaluation: Of the trained agent; None before the end.
        lost_sinks: Sinks that failed on the way, so that their output is incomplete.
    """

    directory: Path
    finished: bool
    num_steps: int
    evaluation: EvaluationResult | None
    lost_sinks: tuple[str, ...] = ()


def train_ppo(config: PPOJobConfig, out: Path | None = None, *, sinks: tuple[Sink, ...] = ()) -> PPOResult:
    """Run the job from the start.

    Args:
        config: What to run; the environment is made and the agent built before anything is written.
        out: Run directory, new or empty; None for the next free one below ``runs/``.
        sinks: Further sinks, for example the console's.

    Raises:
        ValueError: There is no such environment or device, or the agent does not fit the environment.
        EnvironmentFault: An environment failed. What was learned is saved; a note says how to resume.
        UpdateDiverged: Updates were not finite. Likewise.
        MorphogenError: The directory cannot be used, or a package is missing.
    """
    with contextlib.closing(_Job(config)) as job:
        return job.run(RunDirectory.create(out, config), sinks, log_offset=0)


def resume_ppo(path: Path, *, sinks: tuple[Sink, ...] = ()) -> PPOResult:
    """Go on with a killed or interrupted job; on a CPU its results are bit-identical to those of an undisturbed one.

    That holds for environments that are determined by their seed and actions; see ``PPO.load``.

    Raises:
        MorphogenError: There is no run at ``path``, or its files are damaged. Besides, what :func:`train_ppo` raises.
    """
    directory, config = RunDirectory.open(path, PPOJobConfig)
    summary = directory.read_summary()
    if summary.get("finished"):
        write_report(path)
        played = summary["evaluation"]
        evaluation = EvaluationResult(tuple(played["returns"]), tuple(played["lengths"]))
        return PPOResult(path, finished=True, num_steps=summary["num_steps"], evaluation=evaluation)
    with contextlib.closing(_Job(config)) as job:
        return job.run(directory, sinks, log_offset=job.restore(directory))


def check(config: PPOJobConfig) -> None:
    """Check device and environment before the agent is built.

    Raises:
        ValueError: The device or the environment does not exist.
        MorphogenError: The environment cannot be made, or not be recorded.
    """
    resolve_device(config.ppo.device)
    check_environment(config.env, config.env_kwargs, video=config.video)


class _Job:
    """One sitting of a job."""

    def __init__(self, config: PPOJobConfig) -> None:
        check(config)
        self._config = config
        self._bus: EventBus | None = None
        self._held: list[Event] = []  # what happened before there was a log
        self._stop = False
        self._checkpoint: str | None = None
        self._seconds_before = 0.0
        self._agent = _agent(config, self._emit)
        self._seen_steps = 0  # up to here periodic evaluations are done

    def close(self) -> None:
        """Close the environments."""
        self._agent.close()

    def restore(self, directory: RunDirectory) -> int:
        """Go back to the last checkpoint, if there is one; returns the length of the event log at that moment, in bytes."""
        pointer = directory.read_pointer()
        if pointer is None:
            return 0
        self._checkpoint, self._seconds_before = pointer["checkpoint"], pointer["wall_seconds"]
        self._agent.restore(directory.checkpoints / pointer["checkpoint"])
        self._seen_steps = self._agent.num_steps
        return pointer["log_offset"]

    def run(self, directory: RunDirectory, sinks: tuple[Sink, ...], *, log_offset: int) -> PPOResult:
        """Do what is left, or stop after the next update when interrupted."""
        self._directory, self._started_seconds = directory, time.perf_counter()
        self._log = JsonlSink(directory.events, resume_at=log_offset)
        self._bus = EventBus([self._log, TensorBoardSink(directory.path / "tensorboard"), *sinks])
        evaluation: EvaluationResult | None = None
        with contextlib.closing(self._bus), interrupts(self._request_stop):
            if log_offset == 0:
                self._emit(_started(self._config, self._agent, directory.path))
            for event in self._held:
                self._emit(event)
            try:
                if self._train():
                    evaluation = self._conclude()
            except (EnvironmentFault, UpdateDiverged) as fault:
                self._rescue(fault)
                raise
            finally:
                write_report(directory.path)
        return PPOResult(
            directory.path,
            finished=evaluation is not None,
            num_steps=self._agent.num_steps,
            evaluation=evaluation,
            lost_sinks=self._bus.dropped,
        )

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def _is_trained(self) -> bool:
        return self._agent.num_steps >= self._config.total_steps

    def _train(self) -> bool:
        """Train to the end; False if a stop was requested first."""
        if not self._is_trained:
            self._agent.learn(self._config.total_steps - self._agent.num_steps, callback=self._after_update)
        return self._is_trained and not self._stop

    def _after_update(self, agent: PPO, event: Updated) -> bool:
        every, before, now = self._config.evaluate_every_steps, self._seen_steps, agent.num_steps
        self._seen_steps = now
        if every is not None and now // every > before // every and not self._is_trained:
            self._evaluate()
        if self._stop or self._is_trained or event.update % self._config.checkpoint_every_updates == 0:
            self._save(f"step-{now}")
        return not self._stop

    def _evaluate(self) -> EvaluationResult:
        config = self._config
        env = _environments(config, min(config.evaluation_episodes, _EVALUATION_ENVS))
        try:
            result = self._agent.evaluate(config.evaluation_episodes, env, seed=config.ppo.seed)
        finally:
            if not isinstance(env, str):
                env.close()
        self._emit(
            Evaluated(
                step=self._agent.num_steps,
                episodes=len(result.returns),
                mean_return=result.mean_return,
                std_return=result.std_return,
                mean_length=result.mean_length,
            )
        )
        return result

    def _conclude(self) -> EvaluationResult:
        """Evaluate, record and save what was trained; only then is the job done."""
        evaluation = self._evaluate()
        videos = self._record() if self._config.video else []
        self._agent.save(self._directory.path / "policy")
        updates, seconds = self._agent.progress.num_updates, self._wall_seconds
        self._emit(PPOFinished(step=self._agent.num_steps, updates=updates, wall_seconds=seconds))
        self._directory.write_summary(
            {
                "finished": True,
                "env": self._config.env,
                "num_steps": self._agent.num_steps,
                "num_updates": updates,
                "evaluation": {
                    "mean_return": evaluation.mean_return,
                    "std_return": evaluation.std_return,
                    "mean_length": evaluation.mean_length,
                    "returns": evaluation.returns,
                    "lengths": evaluation.lengths,
                },
                "policy": "policy",
                "videos": videos,
                "wall_seconds": seconds,
            }
        )
        self._directory.remove_checkpoints()
        return evaluation

    def _record(self) -> list[str]:
        config, folder = self._config, self._directory.path / "videos"
        episodes = min(config.evaluation_episodes, _MAX_VIDEOS)
        with contextlib.closing(record_episodes(config.env, config.env_kwargs, folder, episodes)) as env:
            self._agent.evaluate(episodes, env, seed=config.ppo.seed)
        return sorted(f"videos/{video.name}" for video in folder.glob("*.mp4"))

    # -- files and events -------------------------------------------------------------------------------------------

    @property
    def _wall_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started_seconds

    def _save(self, name: str, *keep: str) -> None:
        """Write a checkpoint beside the last one, and remove that once the new one is whole, unless it is to be kept."""
        self._agent.save(self._directory.checkpoints / name)
        self._directory.point_at(name, keep=keep, log_offset=self._log.offset, wall_seconds=self._wall_seconds)
        self._checkpoint = name

    def _rescue(self, fault: EnvironmentFault | UpdateDiverged) -> None:
        """Save what was learned, leave the checkpoint before it, and note in ``fault`` how to go on."""
        self._emit(PPOFaulted(step=self._agent.num_steps, kind=type(fault).__name__, message=str(fault)))
        regular = () if self._checkpoint is None else (self._checkpoint,)
        self._save(f"fault-step-{self._agent.num_steps}", *regular)
        fault.add_note(f"What was learned is saved. Go on with: morphogen resume {self._directory.path}")

    def _emit(self, event: Event) -> None:
        if self._bus is None:
            self._held.append(event)
        else:
            self._bus.emit(event)

    def _request_stop(self) -> None:
        self._stop = True


def _agent(config: PPOJobConfig, emit: Any) -> PPO:
    ppo = config.ppo.replace(schedule_steps=config.ppo.schedule_steps or config.total_steps)
    try:
        return PPO(_environments(config, ppo.num_envs), ppo, emit=emit)
    except TypeError as error:  # of a space that PPO cannot read
        raise ValueError(f"`env` must be an environment that PPO can learn in, got {config.env!r}: {error}") from error


def _environments(config: PPOJobConfig, num_envs: int) -> str | VectorEnv[Any, Any, Any]:
    """Return the id of the environments where that says all, so that a saved policy knows its environment; else make them."""
    return make_vector(config.env, num_envs, **config.env_kwargs) if config.env_kwargs else config.env


def _started(config: PPOJobConfig, agent: PPO, directory: Path) -> PPOStarted:
    return PPOStarted(
        step=0,
        env=config.env,
        total_steps=config.total_steps,
        parameters=sum(parameter.numel() for parameter in agent.policy.parameters()),
        observation_space=str(agent.env.single_observation_space),
        action_space=str(agent.env.single_action_space),
        command=shlex.join(["morphogen", "ppo", "--config", str(directory / "config.yaml")]),
        config=config.model_dump(mode="json"),
        versions=versions(),
    )
