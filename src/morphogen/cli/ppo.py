"""`morphogen ppo`: flags into a config, the recipe, its result in print."""

from __future__ import annotations

from typing import Any

from morphogen.cli.commands import PPO, Resume
from morphogen.cli.printing import result_console, say_how_to_resume, say_where
from morphogen.recipes.overrides import parse_settings, with_flags
from morphogen.recipes.ppo import PPOResult, resume_ppo, train_ppo
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.telemetry.console import PPOConsoleSink


def ppo(command: PPO) -> int:
    """Run a PPO job."""
    config = _config(command)
    return _conclude(train_ppo(config, command.out, sinks=(PPOConsoleSink(config.total_steps),)))


def resume(command: Resume) -> int:
    """Go on with a PPO job."""
    _, config = RunDirectory.open(command.run, PPOJobConfig)
    return _conclude(resume_ppo(command.run, sinks=(PPOConsoleSink(config.total_steps),)))


def _config(command: PPO) -> PPOJobConfig:
    if command.env is None and command.config is None:
        raise ValueError("`--env` must be given, for example --env CartPole-v1. Or give --config.")
    job = {
        "env": command.env,
        "total_steps": command.steps,
        "evaluation_episodes": command.eval_episodes,
        "video": command.video or None,
    }
    given: dict[str, Any] = {name: value for name, value in job.items() if value is not None}
    base = read_config(command.config, PPOJobConfig).replace(**given) if command.config else PPOJobConfig(**given)
    return base.replace(ppo=with_flags(base.ppo, _flags(command), parse_settings(command.settings)))


def _flags(command: PPO) -> dict[str, object]:
    """Return the settings of the agent that have a flag of their own."""
    return {
        "seed": command.seed,
        "num_envs": command.num_envs,
        "device": command.device,
        "policy.memory": command.memory,
        "critic.kind": command.critic,
        "normalize_observations": command.normalize or None,
        "normalize_rewards": command.normalize or None,
    }


def _conclude(result: PPOResult) -> int:
    """Print what the agent reached and where everything is; or how to go on."""
    played = result.evaluation
    if played is None:
        return say_how_to_resume(result.directory)
    words = (
        f"Return {played.mean_return:.4g} ± {played.std_return:.4g} (mean ± standard deviation) over {len(played.returns)} "
        f"evaluation episodes, after {result.num_steps:,} steps."
    )
    result_console().print(words, highlight=False, soft_wrap=True)
    return say_where(result.directory, ("report.html", "summary.json", "policy", "videos"), result.lost_sinks)
