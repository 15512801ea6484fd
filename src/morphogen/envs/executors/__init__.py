"""Executors: who trains the networks of N environments."""

from __future__ import annotations

from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.executors.base import Executor
from morphogen.envs.executors.inline import InlineExecutor
from morphogen.envs.executors.processes import ProcessesExecutor
from morphogen.tasks import Task


def make_executor(task: Task, config: GrowthEnvConfig, num_envs: int) -> Executor:
    """Return the executor that ``config`` names; nothing is built or started yet.

    Raises:
        ValueError: The task or the number of workers does not fit it.
    """
    kind = ProcessesExecutor if config.executor == "processes" else InlineExecutor
    return kind(task, config, num_envs)
