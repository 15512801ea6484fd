"""Faults by name and step, and the contexts that put them into a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from morphogen.governor.faults.injection import Injection, at_work
from morphogen.governor.faults.kinds import ALIASES, KINDS, FaultKind
from morphogen.state import TrainingState


@dataclass(frozen=True, order=True)
class Fault:
    """One fault at a training step.

    Attributes:
        step: The first step it is at work in, >= 0.
        kind: A name in ``KINDS`` or ``ALIASES``.
        steps: How many steps in a row; None for the kind's own number.
        strength: How hard; None for the kind's own.

    Raises:
        ValueError: The kind is unknown, or a number is out of range.

    Example:
        >>> Fault(300, "label_shuffle").duration_steps
        40
    """

    step: int
    kind: str
    steps: int | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        kind_named(self.kind)
        if self.step < 0:
            raise ValueError(f"`step` must be >= 0, got {self.step}. Count steps from 0.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be >= 1, got {self.steps}. Leave it out for the kind's own number.")
        _check_strength(self.strength)

    @property
    def duration_steps(self) -> int:
        """Steps in a row that it is at work."""
        return kind_named(self.kind).steps if self.steps is None else self.steps

    def is_at_work(self, step: int) -> bool:
        """Whether it is at work in ``step``."""
        return self.step <= step < self.step + self.duration_steps

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault written as ``kind@step`` or ``kind@step+steps``.

        Raises:
            ValueError: The text has another form, or the kind is unknown.

        Example:
            >>> Fault.parse("nan_input@300")
            Fault(step=300, kind='nan_input', steps=None, strength=None)
            >>> str(Fault.parse("label_shuffle@300+40"))
            'label_shuffle@300+40'
        """
        kind, _, when = text.partition("@")
        step, plus, steps = when.partition("+")
        known = kind in KINDS or kind in ALIASES
        if not known or not step.isdecimal() or (plus and not (steps.isdecimal() and int(steps))):
            raise ValueError(
                f"a fault must be written as KIND@STEP or KIND@STEP+STEPS, for example nan@STEP, got {text!r}. "
                f"Kinds: {', '.join((*ALIASES, *KINDS))}."
            )
        return cls(int(step), kind, int(steps) if plus else None)

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}" + (f"+{self.steps}" if self.steps is not None else "")


def kind_named(name: str) -> FaultKind:
    """Return the row of ``KINDS`` for a name or an alias; ValueError names those there are."""
    name = ALIASES.get(name, name)
    if name not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join((*ALIASES, *KINDS))}, got {name!r}. Choose one of these.")
    return KINDS[name]


@contextlib.contextmanager
def inject(
    kind: str,
    state: TrainingState,
    *,
    generator: torch.Generator | None = None,
    strength: float | None = None,
) -> Generator[Injection]:
    """Put a fault into the one training step that the block makes.

    What was hooked into models and gradients, and a scaled learning rate, are as before when the block ends, also by an
    exception; damage to weights, buffers and moments stays. For a fault that lasts, do this in each of its steps.

    Args:
        kind: A name in ``KINDS`` or ``ALIASES``.
        state: The run; its models must be called as ``model(...)`` in the block.
        generator: The only thing that is drawn from; needed by kinds that draw.
        strength: How hard; by default the kind's own. Finite.

    Yields:
        The injection: pass labels through its ``labels``, if the fault may be one of labels.

    Raises:
        ValueError: The kind is unknown or does not fit the run, it draws and there is no generator, or the block ended
            without the fault having had an effect.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainingState(model)
        >>> with inject("nan_output", state):
        ...     bool(model(torch.ones(1, 2)).isnan().all())
        True
        >>> bool(model(torch.ones(1, 2)).isnan().any())
        False
    """
    injection = _begin(kind, state, generator, strength)
    with at_work((injection,)):
        yield injection


class Schedule:
    """Faults at their steps. A step that a rewind brings back is not hit again: the fault is in the past.

    Args:
        faults: In any order; several may be at work in one step. A text is parsed.
        state: The run.
        generator: The only thing that is drawn from; needed by kinds that draw.
        recurring: Hit a step again when it comes again: the fault is in the data.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> schedule = Schedule(["nan_output@1"], TrainingState(model))
        >>> for step in (0, 1, 1, 2):
        ...     with schedule.at(step):
        ...         print(step, bool(model(torch.ones(1, 2)).isnan().any()))
        0 False
        1 True
        1 False
        2 False
    """

    def __init__(
        self,
        faults: Sequence[Fault | str],
        state: TrainingState,
        generator: torch.Generator | None = None,
        *,
        recurring: bool = False,
    ) -> None:
        """Parse and sort the faults; nothing is hooked yet."""
        self.faults = tuple(sorted(_fault(fault) for fault in faults))
        self._state, self._generator, self._recurring = state, generator, recurring
        self._hit: set[tuple[Fault, int]] = set()

    def due(self, step: int) -> tuple[Fault, ...]:
        """Return the faults that :meth:`at` would put into ``step``."""
        at_work_now = (fault for fault in self.faults if fault.is_at_work(step))
        return tuple(fault for fault in at_work_now if self._recurring or (fault, step) not in self._hit)

    @contextlib.contextmanager
    def at(self, step: int) -> Generator[Injections]:
        """Put the faults due at ``step`` into the one training step that the block makes; see :func:`inject`."""
        injections: list[Injection] = []
        due = self.due(step)
        self._hit |= {(fault, step) for fault in due}
        try:
            for fault in due:
                injections.append(_begin(fault.kind, self._state, self._generator, fault.strength))
            with at_work(injections):
                yield Injections(tuple(injections))
        finally:
            for injection in injections:
                injection.close()


@dataclass(frozen=True)
class Injections:
    """The faults at work in one step, none in most."""

    all: tuple[Injection, ...]

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return ``labels`` as the faults leave them: themselves, unless there is a fault of labels."""
        for injection in self.all:
            labels = injection.labels(labels)
        return labels


def _begin(kind: str, state: TrainingState, generator: torch.Generator | None, strength: float | None) -> Injection:
    row = kind_named(kind)
    _check_strength(strength)
    injection = Injection(kind, state, row.strength if strength is None else strength, generator)
    row.effect(injection)
    return injection


def _check_strength(strength: float | None) -> None:
    if strength is not None and not math.isfinite(strength):
        raise ValueError(f"`strength` must be finite, got {strength}. Leave it out for the kind's own.")


def _fault(fault: Fault | str) -> Fault:
    return Fault.parse(fault) if isinstance(fault, str) else fault
