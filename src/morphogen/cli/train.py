"""`morphogen train`: flags into a config, the recipe, its result in print."""

from __future__ import annotations

from morphogen import tasks
from morphogen.cli.commands import Resume, Train
from morphogen.cli.printing import absolute, result_console, say_how_to_resume, say_where
from morphogen.recipes.overrides import parse_settings, with_flags
from morphogen.recipes.policy_file import FILE_NAME
from morphogen.recipes.run_directory import RunDirectory, read_config
from morphogen.recipes.train import TrainResult, resume_train, train as run_train
from morphogen.recipes.train_config import TrainConfig
from morphogen.telemetry.console import TrainConsoleSink
from morphogen.telemetry.metrics import metric_text


def train(command: Train) -> int:
    """Run a train job."""
    flags = {
        "task": command.task,
        "start_from": absolute(command.start),
        "total_steps": command.steps,
        "env.executor": command.executor,
        "env.reward.preset": command.reward,
        "ppo.num_envs": command.envs,
        "ppo.critic.kind": command.critic,
        "ppo.seed": command.seed,
    }
    base = read_config(command.config, TrainConfig) if command.config else TrainConfig()
    config = with_flags(base, flags, parse_settings(command.settings))
    return _conclude(run_train(config, command.out, sinks=(_sink(config),)))


def resume(command: Resume) -> int:
    """Go on with a train job."""
    _, config = RunDirectory.open(command.run, TrainConfig)
    return _conclude(resume_train(command.run, sinks=(_sink(config),)))


def _sink(config: TrainConfig) -> TrainConsoleSink:
    return TrainConsoleSink(config.total_steps, metric=tasks.get(config.task).metric_name)


def _conclude(result: TrainResult) -> int:
    """Print what the last networks came to and where everything is; or how to go on."""
    recent, console = result.recent, result_console()
    if recent is None:
        return say_how_to_resume(result.directory)
    metric = f"{result.metric_name} {metric_text(recent.metric, result.metric_name)} on the decision split"
    words = (
        f"Last {recent.episodes} episodes of {result.num_steps:,} decisions, means: return {recent.mean_return:.4g}, {metric}, "
        f"{recent.parameters:,.0f} parameters; {recent.rollbacks} ended by the governor."
        if recent.episodes
        else f"No episode ended within {result.num_steps:,} decisions."
    )
    console.print(words, highlight=False, soft_wrap=True)
    code = say_where(result.directory, (FILE_NAME, "report.html", "summary.json"), result.lost_sinks)
    console.print(f"Compare the policy with others: morphogen evaluate {result.directory}", highlight=False, soft_wrap=True)
    return code
