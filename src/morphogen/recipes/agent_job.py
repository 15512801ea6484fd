"""What every job that trains an agent does: checkpoints after updates, interruption, rescue after a fault, the log."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable
from typing import Any

from morphogen.errors import EnvironmentFault, MorphogenError, UpdateDiverged
from morphogen.recipes.interrupts import interrupts
from morphogen.recipes.run_directory import RunDirectory
from morphogen.rl.events import Updated
from morphogen.rl.ppo import PPO
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Emit, Event, Json, Sink
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report
from morphogen.telemetry.tensorboard import TensorBoardSink

Fault = EnvironmentFault | UpdateDiverged


class AgentJob(abc.ABC):
    """One sitting of a job.

    Args:
        build: Makes the agent; what it emits goes to the log.
        total_steps: Environment steps of the job; whole rollouts are done.
        checkpoint_every_updates: Updates between checkpoints.

    Attributes:
        agent: What is trained.
        directory: Where; there from :meth:`run` on.
    """

    directory: RunDirectory

    def __init__(self, build: Callable[[Emit], PPO], *, total_steps: int, checkpoint_every_updates: int) -> None:
        """Build the agent; nothing is written yet."""
        self._total_steps, self._checkpoint_every_updates = total_steps, checkpoint_every_updates
        self._bus: EventBus | None = None
        self._held: list[Event] = []  # what happened before there was a log
        self._stop = False
        self._checkpoint: str | None = None
        self._seconds_before = 0.0
        self.agent = build(self.emit)

    # -- what a kind of job adds ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def started(self) -> Event:
        """Return the first event of the job."""

    @abc.abstractmethod
    def faulted(self, fault: Fault) -> Event:
        """Return the event of a fault that stops the job."""

    @abc.abstractmethod
    def conclude(self) -> None:
        """Do what remains after training; only then is the job done."""

    @abc.abstractmethod
    def after_update(self, event: Updated) -> None:
        """Do what is due after an update, before its checkpoint."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Json]:
        """Return what the job itself remembers, for the checkpoint."""

    @abc.abstractmethod
    def remember(self, facts: dict[str, Any]) -> None:
        """Take over what :meth:`facts` said when the checkpoint was written, the agent being restored."""

    # -- a sitting --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the environments."""
        self.agent.close()

    def restore(self, directory: RunDirectory) -> int:
        """Go back to the last checkpoint, if there is one; returns the length of the event log at that moment, in bytes."""
        pointer = directory.read_pointer()
        if pointer is None:
            return 0
        self._checkpoint, self._seconds_before = pointer["checkpoint"], pointer["wall_seconds"]
        self.agent.restore(directory.checkpoints / pointer["checkpoint"])
        self.remember(pointer)
        return pointer["log_offset"]

    def run(self, directory: RunDirectory, sinks: tuple[Sink, ...], *, log_offset: int) -> tuple[bool, tuple[str, ...]]:
        """Do what is left, or stop after the next update when interrupted.

        Returns:
            Whether the job is done, and the sinks that failed.

        Raises:
            EnvironmentFault: An environment failed. What was learned is saved; a note says how to resume.
            UpdateDiverged: Updates were not finite. Likewise.
            MorphogenError: Nothing could be saved; a note says that the last checkpoint is where it goes on.
        """
        self.directory, self._started_seconds = directory, time.perf_counter()
        self._log = JsonlSink(directory.events, resume_at=log_offset)
        self._bus = EventBus([self._log, TensorBoardSink(directory.path / "tensorboard"), *sinks])
        is_done = False
        with contextlib.closing(self._bus), interrupts(self._request_stop):
            if log_offset == 0:
                self.emit(self.started())
            for event in self._held:
                self.emit(event)
            try:
                if self._train():
                    self.conclude()
                    is_done = True
            except (EnvironmentFault, UpdateDiverged) as fault:
                self._rescue(fault)
                raise
            except MorphogenError as error:  # nothing can be saved now: a disk refused, or a worker died while it was asked
                error.add_note(f"Go on from the last checkpoint with: morphogen resume {directory.path}")
                raise
            finally:
                write_report(directory.path)
        return is_done, self._bus.dropped

    def emit(self, event: Event) -> None:
        """Log ``event``, once there is a log."""
        if self._bus is None:
            self._held.append(event)
        else:
            self._bus.emit(event)

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done."""
        return self.agent.num_steps >= self._total_steps

    @property
    def wall_seconds(self) -> float:
        """Time spent, over all sittings."""
        return self._seconds_before + time.perf_counter() - self._started_seconds

    def _train(self) -> bool:
        """Train to the end; False if a stop was requested first."""
        if not self.is_trained:
            self.agent.learn(self._total_steps - self.agent.num_steps, callback=self._after_update)
        return self.is_trained and not self._stop

    def _after_update(self, agent: PPO, event: Updated) -> bool:
        self.after_update(event)
        if self._stop or self.is_trained or event.update % self._checkpoint_every_updates == 0:
            self._save(f"step-{agent.num_steps}")
        return not self._stop

    def _save(self, name: str, *keep: str) -> None:
        """Write a checkpoint beside the last one, and remove that once the new one is whole, unless it is to be kept."""
        self.agent.save(self.directory.checkpoints / name)
        facts = {**self.facts(), "log_offset": self._log.offset, "wall_seconds": self.wall_seconds}
        self.directory.point_at(name, keep=keep, **facts)
        self._checkpoint = name

    def _rescue(self, fault: Fault) -> None:
        """Save what was learned, leave the checkpoint before it, and note in ``fault`` how to go on."""
        self.emit(self.faulted(fault))
        regular = () if self._checkpoint is None else (self._checkpoint,)
        self._save(f"fault-step-{self.agent.num_steps}", *regular)
        fault.add_note(f"What was learned is saved. Go on with: morphogen resume {self.directory.path}")

    def _request_stop(self) -> None:
        self._stop = True
