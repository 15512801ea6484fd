"""All environments in this process, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.debug import DebugStatistics
from morphogen.envs.executors.base import Beginning, Rows, loaded_once
from morphogen.envs.frames import Frames
from morphogen.tasks import Task


class InlineExecutor:
    """See :class:`~morphogen.envs.executors.base.Executor`."""

    def __init__(self, task: Task, config: GrowthEnvConfig, num_envs: int) -> None:
        """Hold N environments."""
        self.after = Frames.empty(num_envs, config.num_slots)
        self.now = Frames.empty(num_envs, config.num_slots)
        self.reasons: dict[int, str] = {}
        self._rows = Rows(loaded_once(task, config.device), config, self.after, self.now)

    def reset(self, beginnings: Mapping[int, Beginning]) -> None:
        """Begin the first episode of some environments."""
        with one_thread():
            for row, beginning in beginnings.items():
                self._rows.begin(row, beginning)

    def step(self, choices_NH: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Play one step of each environment."""
        with one_thread():
            ended = [self._rows.step(row, choices) for row, choices in enumerate(choices_NH)]
        self.reasons = {row: each.reason for row, each in enumerate(ended) if each is not None and each.reason}
        return np.array([each is not None for each in ended])

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every environment."""
        return [self._rows.read(row) for row in range(self.now.num_envs)]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Put every environment to its state."""
        with one_thread():
            for row, own in enumerate(state):
                self._rows.put(row, own)

    def debug(self) -> list[DebugStatistics]:
        """Return what the parameters and gradients of every environment look like."""
        return [self._rows.debug(row) for row in range(self.now.num_envs)]

    def close(self) -> None:
        """Hold nothing any more."""


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Let torch use one thread in the block, as workers do: with more, sums are rounded otherwise, and small ones wait."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
