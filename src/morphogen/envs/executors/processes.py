"""Environments shared out over worker processes, each of which plays several. Worker processes may die; nothing is lost by it.

Legend: N environments, H choices of an action.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morphogen import tasks
from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.debug import DebugStatistics
from morphogen.envs.executors.base import Beginning, Ended
from morphogen.envs.executors.shared import SharedData, SharedFrames
from morphogen.envs.executors.worker import READY, Answer, Assignment, Command, Message, Past, work
from morphogen.errors import MorphogenError, WorkerDied
from morphogen.state.processes import available_cores
from morphogen.tasks import Task

_MAX_DEATHS = 3  # within one command
_CLOSING_SECONDS = 5.0


class ProcessesExecutor:
    """See :class:`~morphogen.envs.executors.base.Executor`.

    Workers are spawned, never forked, when they are first needed. They write their rows of the frames into shared memory; the
    data of a task is there too, once for all, unless it is tokens, which workers map or load themselves.

    A worker that dies is replaced, as is one that does not answer within ``worker_deadline_seconds``. The new one brings each
    of its environments to where it was, exactly, by playing the actions of its present episode again, and goes on.

    Args:
        task: One of the registry.
        config: How.
        num_envs: N.

    Raises:
        ValueError: The task is not in the registry, or there are more workers than environments.
    """

    def __init__(self, task: Task, config: GrowthEnvConfig, num_envs: int) -> None:
        """Check; nothing is started yet."""
        _check_registered(task)
        num_workers = min(available_cores(), num_envs) if config.num_workers is None else config.num_workers
        if num_workers > num_envs:
            raise ValueError(
                f"`num_workers` must be at most num_envs, {num_envs}, got {num_workers}. A worker without an environment "
                "has nothing to do."
            )
        self._task, self._config = task, config
        self._frames = (SharedFrames.empty(num_envs, config.num_slots), SharedFrames.empty(num_envs, config.num_slots))
        self.after, self.now = (frames.view() for frames in self._frames)
        self.reasons: dict[int, str] = {}
        self._rows = [rows.tolist() for rows in np.array_split(np.arange(num_envs), num_workers)]
        self._assignment: Assignment | None = None
        self._workers: list[_Worker] = []
        self._pasts: dict[int, Past] = {}

    @property
    def process_ids(self) -> list[int]:
        """Of the workers, in the order of the environments they play; empty before the first reset."""
        return [worker.process_id for worker in self._workers]

    def reset(self, beginnings: Mapping[int, Beginning]) -> None:
        """Begin the first episode of some environments."""
        self._go_to({row: Past(beginning) for row, beginning in beginnings.items()})

    def step(self, choices_NH: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Play one step of each environment."""
        answers: dict[int, Ended | None] = self._command("step", dict(enumerate(choices_NH)))
        self._pasts = {row: past.followed_by(choices_NH[row], answers[row]) for row, past in self._pasts.items()}
        self.reasons = {row: ended.reason for row, ended in answers.items() if ended is not None and ended.reason}
        return np.array([answers[row] is not None for row in range(len(choices_NH))])

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every environment."""
        return self._asked("read")

    def debug(self) -> list[DebugStatistics]:
        """Return what the parameters and gradients of every environment look like."""
        return self._asked("debug")

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Put every environment to its state."""
        self._go_to({row: _past_of(own) for row, own in enumerate(state)})

    def close(self) -> None:
        """End the workers."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.end()

    # -- commands ---------------------------------------------------------------------------------------------------

    def _go_to(self, pasts: dict[int, Past]) -> None:
        self._pasts |= pasts
        self._command("go_to", pasts)

    def _asked(self, command: Command) -> list[Any]:
        answers = self._command(command, dict.fromkeys(range(self.now.num_envs)))
        return [answers[row] for row in range(self.now.num_envs)]

    def _command(self, command: Command, orders: Mapping[int, Any]) -> dict[int, Any]:
        """Give each worker its part of the orders, and return all answers."""
        try:
            for rows in self._rows[len(self._workers) :]:
                self._workers.append(_Worker(self._assigned(), rows))
            for worker in self._workers:
                worker.send([(command, worker.part_of(orders))])
            answered = [self._answer(place, command, orders) for place in range(len(self._workers))]
        except BaseException:
            self.close()  # answers would be taken for those to a later command
            raise
        for failure, _ in answered:
            if failure is not None:
                raise failure.error from _InWorker(failure.where)
        return {row: answer for _, answers in answered for row, answer in answers.items()}

    def _answer(self, place: int, command: Command, orders: Mapping[int, Any]) -> Answer:
        """Wait for the answer of a worker, and of those that take its place if it dies."""
        worker = self._workers[place]
        again: Message = [(command, worker.part_of(orders))]
        if command != "go_to":
            again.insert(0, ("go_to", worker.part_of(self._pasts)))
        for _ in range(_MAX_DEATHS):
            answer = worker.receive(self._config.worker_deadline_seconds)
            if answer is not None:
                return answer
            code = worker.end()
            if code == 1 and not worker.was_ready:
                raise _could_not_start(worker.rows)
            self._workers[place] = worker = _Worker(self._assigned(), worker.rows)
            worker.send(again)
        answer = worker.receive(self._config.worker_deadline_seconds)
        if answer is None:
            raise _died(worker.rows, command, worker.end())
        return answer

    def _assigned(self) -> Assignment:
        """Return what workers need to know; data is loaded here, once for all."""
        if self._assignment is None:
            data = self._task.load()
            shared = SharedData.of(data) if data.train.inputs.is_floating_point() else None
            self._assignment = Assignment(self._task.name, self._config.model_dump_json(), *self._frames, shared)
        return self._assignment


class _Worker:
    """A worker process, seen from outside."""

    def __init__(self, assignment: Assignment, rows: list[int]) -> None:
        """Start it, without waiting until it is ready."""
        context = multiprocessing.get_context("spawn")
        self.rows = rows
        self.was_ready = False
        self._exit_code: int | None = None
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, assignment), name=f"environments {_span(rows)}", daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()  # so that the pipe ends when the process does
        self.process_id = self._process.pid or 0

    def part_of(self, orders: Mapping[int, Any]) -> dict[int, Any]:
        """Return the orders for environments that it plays."""
        return {row: orders[row] for row in self.rows if row in orders}

    def send(self, message: Message) -> None:
        """Give orders; that the process is dead is noticed when the answer is awaited."""
        with contextlib.suppress(OSError):
            self._pipe.send(message)

    def receive(self, deadline_seconds: float | None) -> Answer | None:
        """Wait for the answer to what was sent; None if the process is dead, or was killed after the deadline."""
        try:
            answer = self._received(deadline_seconds)
            if answer == READY:
                self.was_ready = True
                answer = self._received(deadline_seconds)
        except (EOFError, OSError):
            return None
        return answer

    def _received(self, deadline_seconds: float | None) -> Any:
        if not self._pipe.poll(deadline_seconds):
            self._process.kill()
            raise TimeoutError
        return self._pipe.recv()

    def stop(self) -> None:
        """Tell it to end, at once: it has nothing to put away."""
        self._pipe.close()
        if self._exit_code is None:
            self._process.terminate()

    def end(self) -> int:
        """Wait until it has ended, see to it that it does, and return its exit code."""
        if self._exit_code is None:
            self._pipe.close()
            self._process.join(_CLOSING_SECONDS)
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join()
            self._exit_code = self._process.exitcode or 0
            self._process.close()
        return self._exit_code


class _InWorker(Exception):
    """Shows where in a worker an error was raised."""

    def __init__(self, where: str) -> None:
        super().__init__(f"\n{where}")


def _past_of(state: dict[str, Any]) -> Past:
    return Past(Beginning(state["seed"], tuple(state["inject"]), state["number"]), state)


def _check_registered(task: Task) -> None:
    if task.name not in tasks.names() or tasks.get(task.name) is not task:
        raise ValueError(
            f'`task` must be one of {", ".join(tasks.names())} with the executor "processes", got an own one named '
            f'{task.name!r}. Workers are told a name alone: use the executor "inline".'
        )


def _could_not_start(rows: Sequence[int]) -> MorphogenError:
    return WorkerDied(
        f"the worker of the environments {_span(rows)} could not start; its own message is above. A script that uses the "
        'executor "processes" is imported by each worker: what it does must stand below `if __name__ == "__main__":`.',
        tuple(rows),
    )


def _died(rows: Sequence[int], command: Command, code: int) -> MorphogenError:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return WorkerDied(
        f"the worker of the environments {_span(rows)} died {_MAX_DEATHS + 1} times in a row in {command!r}, last by {how}. "
        "SIGKILL often means that memory ran out: use fewer workers or environments. Reset the environments, or load a state "
        "from before.",
        tuple(rows),
    )


def _span(rows: Sequence[int]) -> str:
    first, last = rows[0], rows[-1]
    return f"{first} to {last}" if first != last else str(first)
