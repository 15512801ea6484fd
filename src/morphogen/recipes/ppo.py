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
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from morphogen.recipes.agent_job import AgentJob, Fault
from morphogen.recipes.environments import check_environment, record_episodes
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.ppo_events import Evaluated, PPOFaulted, PPOFinished, PPOStarted
from morphogen.recipes.run_directory import RunDirectory
from morphogen.recipes.versions import versions
from morphogen.rl.evaluation import EvaluationResult
from morphogen.rl.events import Updated
from morphogen.rl.ppo import PPO
from morphogen.rl.vector import make_vector
from morphogen.tasks import resolve_device
from morphogen.telemetry.events import Emit, Json, Sink
from morphogen.telemetry.report import write_report

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
        return _run(job, RunDirectory.create(out, config), sinks, log_offset=0)


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
        return _run(job, directory, sinks, log_offset=job.restore(directory))


def check(config: PPOJobConfig) -> None:
    """Check device and environment before the agent is built.

    Raises:
        ValueError: The device or the environment does not exist.
        MorphogenError: The environment cannot be made, or not be recorded.
    """
    resolve_device(config.ppo.device)
    check_environment(config.env, config.env_kwargs, video=config.video)


class _Job(AgentJob):
    """One sitting of a PPO job."""

    def __init__(self, config: PPOJobConfig) -> None:
        check(config)
        self._config = config
        super().__init__(
            lambda emit: _agent(config, emit),
            total_steps=config.total_steps,
            checkpoint_every_updates=config.checkpoint_every_updates,
        )
        self._seen_steps = 0  # up to here periodic evaluations are done
        self.evaluation: EvaluationResult | None = None

    def started(self) -> PPOStarted:
        return _started(self._config, self.agent, self.directory.path)

    def faulted(self, fault: Fault) -> PPOFaulted:
        return PPOFaulted(step=self.agent.num_steps, kind=type(fault).__name__, message=str(fault))

    def facts(self) -> dict[str, Json]:
        return {}

    def remember(self, facts: dict[str, Any]) -> None:
        self._seen_steps = self.agent.num_steps

    def after_update(self, event: Updated) -> None:
        every, before, now = self._config.evaluate_every_steps, self._seen_steps, self.agent.num_steps
        self._seen_steps = now
        if every is not None and now // every > before // every and not self.is_trained:
            self._evaluate()

    def conclude(self) -> None:
        """Evaluate, record and save what was trained."""
        evaluation = self._evaluate()
        videos = self._record() if self._config.video else []
        self.agent.save(self.directory.path / "policy")
        updates, seconds = self.agent.progress.num_updates, self.wall_seconds
        self.emit(PPOFinished(step=self.agent.num_steps, updates=updates, wall_seconds=seconds))
        self.directory.write_summary(
            {
                "finished": True,
                "env": self._config.env,
                "num_steps": self.agent.num_steps,
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
        self.directory.remove_checkpoints()
        self.evaluation = evaluation

    def _evaluate(self) -> EvaluationResult:
        config = self._config
        env = _environments(config, min(config.evaluation_episodes, _EVALUATION_ENVS))
        try:
            result = self.agent.evaluate(config.evaluation_episodes, env, seed=config.ppo.seed)
        finally:
            if not isinstance(env, str):
                env.close()
        self.emit(
            Evaluated(
                step=self.agent.num_steps,
                episodes=len(result.returns),
                mean_return=result.mean_return,
                std_return=result.std_return,
                mean_length=result.mean_length,
            )
        )
        return result

    def _record(self) -> list[str]:
        config, folder = self._config, self.directory.path / "videos"
        episodes = min(config.evaluation_episodes, _MAX_VIDEOS)
        with contextlib.closing(record_episodes(config.env, config.env_kwargs, folder, episodes)) as env:
            self.agent.evaluate(episodes, env, seed=config.ppo.seed)
        return sorted(f"videos/{video.name}" for video in folder.glob("*.mp4"))


def _run(job: _Job, directory: RunDirectory, sinks: tuple[Sink, ...], *, log_offset: int) -> PPOResult:
    is_done, lost = job.run(directory, sinks, log_offset=log_offset)
    return PPOResult(directory.path, is_done, job.agent.num_steps, job.evaluation, lost)


def _agent(config: PPOJobConfig, emit: Emit) -> PPO:
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
