"""What an executor is, and what every one of them does with the rows it was given.

Legend: N environments, H choices of an action.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.debug import DebugStatistics, debug_statistics
from morphogen.envs.episode import Episode
from morphogen.envs.frames import Frames
from morphogen.errors import EnvironmentFault, EpisodeFailed, TrainingCollapsed
from morphogen.tasks import Task

# What a network can run into by being trained: out of memory, a kernel that refuses, a decomposition that does not converge.
_OWN_FAULTS = (EpisodeFailed, TrainingCollapsed, RuntimeError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How an environment starts over.

    Attributes:
        seed: Of the environment.
        inject: Faults for its first episode, written ``kind@step``.
        number: Of the episode.
    """

    seed: int
    inject: tuple[str, ...] = ()
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Ended:
    """An episode that is over.

    Attributes:
        next: How the one after it, which is under way, began.
        reason: Why it ended before its time; empty where it did not.
    """

    next: Beginning
    reason: str


class Executor(Protocol):
    """Trains the networks of N environments, one tick at a time.

    Attributes:
        after: What each environment came to by its last step, before a new episode began.
        now: What each environment is at now.
        reasons: Environment -> why the last step ended its episode before its time.
    """

    after: Frames
    now: Frames
    reasons: dict[int, str]

    def reset(self, beginnings: Mapping[int, Beginning]) -> None:
        """Begin the first episode of some environments, and write ``now``."""
        ...

    def step(self, choices_NH: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Execute an action in each environment, train, write ``after`` and ``now``; return whose episode is over.

        Raises:
            EnvironmentFault: An environment raised what no network is to blame for.
            WorkerDied: A process died, again and again.
        """
        ...

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every environment as plain data."""
        ...

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Put every environment to its state, and write ``now``."""
        ...

    def debug(self) -> list[DebugStatistics]:
        """Return what the parameters and gradients of every environment look like."""
        ...

    def close(self) -> None:
        """Give back what is held; twice does no harm."""
        ...


def loaded_once(task: Task, device: str) -> Task:
    """Return ``task`` with data that is loaded, and brought to ``device``, when it is first needed, and kept."""
    return dataclasses.replace(task, load=functools.cache(lambda: task.load().to(device)))


class Rows:
    """Some environments, played in this process one after the other.

    An error that a network can run into by being trained is a fault of its environment alone: the network is given up, and
    the episode ends with the numbers it had before the step, as ``rolled_back``. Two episodes in a row that end so are
    nobody's bad luck, and raise.

    Args:
        task: What to train on.
        config: How.
        after: Frames of all environments, of which the rows that are played are written.
        now: The same.
    """

    def __init__(self, task: Task, config: GrowthEnvConfig, after: Frames, now: Frames) -> None:
        """Play nothing yet."""
        self._task, self._config, self._after, self._now = task, config, after, now
        self._episodes: dict[int, Episode] = {}
        self._failed: set[int] = set()

    def begin(self, row: int, beginning: Beginning) -> None:
        """Begin an episode of one environment."""
        self._episodes.pop(row, None)  # two networks of one row need not fit into memory
        self._failed.discard(row)
        self._begin(row, beginning)

    def step(self, row: int, choices: NDArray[np.int64]) -> Ended | None:
        """Play one step of one environment; if that ends the episode, the next begins.

        Raises:
            EnvironmentFault: The environment raised, and its state is lost.
        """
        episode = self._episodes[row]
        try:
            reason = self._played(row, episode, choices)
            if reason is None:
                self._now.put(row, self._after, row)
                return None
            ended = Ended(Beginning(episode.seed, number=episode.number + 1), reason)
            del self._episodes[row]
            self._begin(row, ended.next)
        except Exception as error:  # border: whatever it is, the caller is told where
            raise EnvironmentFault(
                f"environment {row} raised {type(error).__name__} in tick {episode.memory.tick} of episode {episode.number}: "
                f"{error}\nIt cannot go on: reset the environments, or load a state from before.",
                row,
            ) from error
        return ended

    def read(self, row: int) -> dict[str, Any]:
        """Return the state of one environment as plain data."""
        return self._episodes[row].state_dict()

    def debug(self, row: int) -> DebugStatistics:
        """Return what the parameters and gradients of one environment look like."""
        return debug_statistics(self._episodes[row].model)

    def put(self, row: int, state: dict[str, Any]) -> None:
        """Put one environment to a state."""
        self._failed.discard(row)
        self._episodes[row] = episode = Episode.from_state(self._task, self._config, state)
        episode.write(self._now, row)

    def _begin(self, row: int, beginning: Beginning) -> None:
        episode = Episode(self._task, self._config, beginning.seed, beginning.number, beginning.inject)
        episode.write(self._now, row)
        self._episodes[row] = episode

    def _played(self, row: int, episode: Episode, choices: NDArray[np.int64]) -> str | None:
        """Take the step and write ``after``; return why the episode is over, "" at its proper end, None if it goes on."""
        try:
            episode.step(choices)
            episode.write(self._after, row)
        except _OWN_FAULTS as error:
            if row in self._failed:
                raise
            self._failed.add(row)
            self._write_failed(row, choices)
            return f"{type(error).__name__}: {error}"
        if not episode.over:
            return None
        self._failed.discard(row)
        return episode.memory.reason

    def _write_failed(self, row: int, choices: NDArray[np.int64]) -> None:
        """Write into ``after`` what was known before the step, and that it came to nothing."""
        op, slot = int(choices[0]), int(choices[1])
        self._after.put(row, self._now, row)
        numbers = {"rolled_back": 1.0, "last_op": op, "last_slot": slot if op else -1}
        for name, value in numbers.items():
            self._after.run(name)[row] = value
        self._after.run("tick")[row] += 1
