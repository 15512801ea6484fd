"""The null policies that every claim of a better one has to face."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from morphogen.control.actions import Action, Op
from morphogen.control.masks import ActionMask
from morphogen.control.observation import Observation
from morphogen.growth import Sowing


@dataclasses.dataclass(frozen=True)
class Wait:
    """Never does anything: the host stays as it is.

    Attributes:
        blueprints: Not sown.
    """

    blueprints: Sequence[Sowing]

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        """Return WAIT."""
        return Action()


@dataclasses.dataclass(frozen=True)
class Random:
    """Waits half of the time, else does any possible thing: op, slot and blueprint uniformly.

    Attributes:
        blueprints: What may be sown.
    """

    blueprints: Sequence[Sowing]

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        """Return a possible action drawn from ``generator``."""
        ops = [op for op in mask.ops if op is not Op.WAIT]
        if not ops or generator.random() < 0.5:
            return Action()
        op = ops[int(generator.integers(len(ops)))]
        slots = mask.slots_by_op[op]
        slot = slots[int(generator.integers(len(slots)))]
        sowing = self.blueprints[int(generator.integers(len(self.blueprints)))] if op is Op.GERMINATE else None
        over = 5 if op in (Op.SET_ALPHA_TARGET, Op.PRUNE) else 0
        target = float(generator.choice((0.5, 0.7, 1.0))) if op is Op.SET_ALPHA_TARGET else 1.0
        return Action(op=op, slot=slot, sowing=sowing, over=over, alpha_target=target, reason="drawn")


@dataclasses.dataclass(frozen=True)
class Periodic:
    """Grows early and at fixed intervals, the first blueprint everywhere, and keeps all it grows.

    Attributes:
        blueprints: The first is sown.
        interval_ticks: Ticks between germinations; the first is at tick 0.
    """

    blueprints: Sequence[Sowing]
    interval_ticks: int = 3

    def __post_init__(self) -> None:
        """Check the interval."""
        if self.interval_ticks < 1:
            raise ValueError(f"`interval_ticks` must be >= 1, got {self.interval_ticks}. 1 germinates whenever it can.")

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        """Return FOSSILIZE or ADVANCE where possible, else GERMINATE when it is time, else WAIT."""
        for op in (Op.FOSSILIZE, Op.ADVANCE):
            if mask.slots_by_op[op]:
                return Action(op=op, slot=mask.slots_by_op[op][0], reason="gate open")
        due = observation.tick % self.interval_ticks == 0
        if due and mask.slots_by_op[Op.GERMINATE]:
            slot = mask.slots_by_op[Op.GERMINATE][0]
            return Action(op=Op.GERMINATE, slot=slot, sowing=self.blueprints[0], reason="interval")
        return Action()
