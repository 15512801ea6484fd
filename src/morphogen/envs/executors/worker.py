"""What a worker process does: play its environments as it is told through a pipe, until the pipe is closed.

A message is a list of (command, order by row), to be obeyed one after the other; its answer is (None, what the last command
gave back by row), or (a failure, nothing).
"""

from __future__ import annotations

import dataclasses
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from morphogen import tasks
from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.debug import DebugStatistics
from morphogen.envs.executors.base import Beginning, Ended, Rows, loaded_once
from morphogen.envs.executors.shared import SharedData, SharedFrames
from morphogen.errors import CheckpointError, EnvironmentFault, EpisodeFailed, MorphogenError, SlotError

READY = "ready"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a worker needs to know.

    Attributes:
        task: Name of the task.
        config: As JSON.
        after: Frames of all environments, of which it writes the rows that it plays.
        now: The same.
        data: Of the task; None to load it.
    """

    task: str
    config: str
    after: SharedFrames
    now: SharedFrames
    data: SharedData | None


@dataclasses.dataclass(frozen=True)
class Past:
    """All that an environment has come to, as the way to get there: exact, since an episode depends on nothing else.

    Attributes:
        beginning: Of the episode.
        state: To go on from instead, if it was loaded.
        actions: Played since.
    """

    beginning: Beginning
    state: dict[str, Any] | None = None
    actions: tuple[NDArray[np.int64], ...] = ()

    def followed_by(self, action: NDArray[np.int64], ended: Ended | None) -> Past:
        """Return the past one step later."""
        if ended is not None:
            return Past(ended.next)
        return dataclasses.replace(self, actions=(*self.actions, action))


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a command raised, in words: objects of any class do not survive a pipe.

    Attributes:
        kind: Name of the class of the error.
        message: What it says.
        env_index: Of an ``EnvironmentFault``.
        where: Its traceback.
    """

    kind: str
    message: str
    env_index: int | None
    where: str

    @property
    def error(self) -> Exception:
        """The error again; a ``MorphogenError`` that names its class where that is not one of ours."""
        if self.kind == EnvironmentFault.__name__:
            return EnvironmentFault(self.message, self.env_index)
        known = {kind.__name__: kind for kind in (ValueError, TypeError, CheckpointError, SlotError, EpisodeFailed)}
        return known[self.kind](self.message) if self.kind in known else MorphogenError(f"{self.kind}: {self.message}")


Command = Literal["go_to", "step", "read", "debug"]
Message = list[tuple[Command, dict[int, Any]]]
Answer = tuple[Failure | None, dict[int, Any]]


def work(pipe: Connection, assignment: Assignment) -> None:
    """Play environments until the other end of ``pipe`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever gives the orders
    torch.set_num_threads(1)
    config = GrowthEnvConfig.model_validate_json(assignment.config)
    task = tasks.get(assignment.task)
    if assignment.data is not None:
        task = dataclasses.replace(task, load=assignment.data.view)
    task = loaded_once(task, config.device)
    rows = Rows(task, config, assignment.after.view(), assignment.now.view())
    with pipe:
        try:
            pipe.send(READY)
            while True:
                pipe.send(_obeyed(rows, pipe.recv()))
        except (EOFError, ConnectionError):
            return


def _obeyed(rows: Rows, message: Message) -> Answer:
    answers: dict[int, Any] = {}
    try:
        for command, orders in message:
            answers = {row: _COMMANDS[command](rows, row, order) for row, order in orders.items()}
    except Exception as error:  # border: it belongs to whoever gave the order
        return Failure(type(error).__name__, str(error), getattr(error, "env_index", None), traceback.format_exc()), {}
    return None, answers


def _go_to(rows: Rows, row: int, past: Past) -> None:
    if past.state is None:
        rows.begin(row, past.beginning)
    else:
        rows.put(row, past.state)
    for action in past.actions:
        rows.step(row, action)


def _read(rows: Rows, row: int, order: None) -> dict[str, Any]:
    return rows.read(row)


def _debug(rows: Rows, row: int, order: None) -> DebugStatistics:
    return rows.debug(row)


_COMMANDS: Mapping[Command, Callable[[Rows, int, Any], Any]] = {
    "go_to": _go_to,
    "step": Rows.step,
    "read": _read,
    "debug": _debug,
}
