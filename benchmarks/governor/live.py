"""Whole runs from their first step, as they are or under a governor: the loop of the README."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter

import torch
from tasks import Run
from torch import Tensor
from training import NOTHING, Faults, Watch, train_step

from morphogen.errors import TrainingCollapsed
from morphogen.governor import Governor
from morphogen.governor.events import Collapsed, LevelShiftAccepted, Rollback, StepSkipped, Warned
from morphogen.governor.faults import Injections, Schedule
from morphogen.telemetry.events import Event

MAX_SEEN = 12


class Nobody:
    """Lets every step be taken."""

    def look(self, step: int, loss: Tensor, norm: Tensor | None, outputs: Tensor, labels: Tensor) -> bool:
        return True


class Watched:
    """A governor with the default config, and everything it said."""

    def __init__(self, run: Run) -> None:
        self.events: list[Event] = []
        self.governor = Governor(run.state, emit=self.events.append)
        self._run = run

    def look(self, step: int, loss: Tensor, norm: Tensor | None, outputs: Tensor, labels: Tensor) -> bool:
        verdict = self.governor.observe(loss, grad_norm=norm, step=step, **self._run.shown(outputs, labels))
        return verdict.proceed


class Passing:
    """A schedule that is over with the first rewind."""

    def __init__(self, schedule: Schedule, governor: Governor) -> None:
        self._schedule, self._governor = schedule, governor

    def at(self, step: int) -> contextlib.AbstractContextManager[Injections]:
        return contextlib.nullcontext(NOTHING) if self._governor.rollbacks else self._schedule.at(step)


class LiveRun:
    """A run and its position, the number of batches drawn: a part of the state, so that a rewind takes it back, too.

    A run has ended when it has drawn so many batches. A governed one gets no batch more than a healthy one: a skipped step is
    lost, and rewound steps are made again from the same batches.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.position = torch.zeros((), dtype=torch.int64)
        run.extras["position"] = self.position

    def train(self, end: int, faults: Faults | None = None, watch: Watch | None = None) -> None:
        """Train up to position ``end``."""
        while (step := int(self.position)) < end:
            self.position += 1
            train_step(self.run, watch or Nobody(), step, faults)

    def train_governed(self, end: int, faults: Schedule | None = None, *, passing: bool = False) -> Governed:
        """Train up to position ``end``, or until training collapsed, under a governor.

        A rewind ends a ``passing`` fault. Else it goes on in those of its steps that the run has not met yet.
        """
        watch = Watched(self.run)
        with contextlib.suppress(TrainingCollapsed):  # it is among the events
            self.train(end, Passing(faults, watch.governor) if faults and passing else faults, watch)
        return Governed.of(watch)

    def lose_batch(self) -> None:
        """Draw a batch and do not train on it."""
        self.position += 1
        self.run.draw()

    def metrics(self) -> dict[str, float]:
        """Return the loss on held-out data and the accuracy of a classifier."""
        found = {"loss": self.run.evaluate()}
        return found | ({"accuracy": self.run.accuracy()} if self.run.accuracy else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Governed:
    """What a governor did in a run.

    Attributes:
        observations: Calls of ``observe``, those of steps made again included.
        alarm_steps: Positions at which a step was skipped or the run rewound.
        seen: The first events in words, equal ones in a row as one.
        report: The governor's report as text.
    """

    observations: int
    skipped_steps: int
    rewinds: int
    collapsed: bool
    level_shifts: int
    warnings: int
    alarm_steps: tuple[int, ...]
    seen: tuple[str, ...]
    report: str

    @classmethod
    def of(cls, watch: Watched) -> Governed:
        """Read events and counters."""
        report = watch.governor.report()
        count = Counter(type(event) for event in watch.events)
        stopped = (StepSkipped, Rollback, Collapsed)
        return cls(
            observations=report.summary.observations,
            skipped_steps=count[StepSkipped],
            rewinds=count[Rollback],
            collapsed=count[Collapsed] > 0,
            level_shifts=count[LevelShiftAccepted],
            warnings=count[Warned],
            alarm_steps=tuple(event.step for event in watch.events if isinstance(event, stopped) and event.step is not None),
            seen=_in_words(watch.events),
            report=report.text(),
        )

    def counts(self) -> dict[str, int | bool]:
        """Return the counts alone."""
        names = ("observations", "skipped_steps", "rewinds", "collapsed", "level_shifts", "warnings")
        return {name: getattr(self, name) for name in names}


def _in_words(events: list[Event]) -> tuple[str, ...]:
    """Return the first events, those of one kind at the next step left to the one before."""
    lines: list[str] = []
    left_out = 0
    before: Event | None = None
    for event in events:
        follows = type(event) is type(before) and isinstance(event, StepSkipped | Warned)
        before = event
        if follows or len(lines) == MAX_SEEN:
            left_out += 1
            continue
        findings = getattr(event, "findings", ())
        target = f" to {event.to_step}" if isinstance(event, Rollback | Collapsed) else ""
        said = "; ".join(f"{finding.detector}: {finding.message}" for finding in findings)
        lines.append(f"{event.step}: {type(event).__name__}{target}: {said}")
    return (*lines, f"and {left_out} more, most of them skipped steps or warnings in a row") if left_out else tuple(lines)
