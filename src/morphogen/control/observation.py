"""What a policy sees: plain numbers, where None means "not measured"."""

from __future__ import annotations

import dataclasses

from morphogen.growth import GrowableModel, Stage
from morphogen.growth.gates import Check, Reading, gate_into
from morphogen.growth.lifecycle import LIVE, NEXT_STAGE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotView:
    """One slot as a policy sees it.

    Attributes:
        name: The slot.
        stage: Its stage.
        ticks_in_stage: Clock ticks since the stage was entered.
        alpha: Present weight of the seed.
        at_rest: Whether no ramp is under way.
        is_pruning: Whether a ramp towards removal is under way.
        gate_open: Whether ADVANCE, or FOSSILIZE for a holding seed, would pass its gate now.
        refusals: What that gate lacks; empty where it is open, and where there is none.
        blueprint: Of the seed, or of the one cooling down.
        tried: Blueprints that were pruned here before, oldest first.
        contribution: Metric with the slot minus metric without; None if not measured at this clock.
        contribution_error: Its standard error.
    """

    name: str
    stage: Stage
    ticks_in_stage: int
    alpha: float
    at_rest: bool
    is_pruning: bool
    gate_open: bool
    blueprint: str | None
    tried: tuple[str, ...]
    contribution: float | None
    contribution_error: float | None
    refusals: tuple[Check, ...] = ()

    @property
    def is_live(self) -> bool:
        """Whether there is a seed that can still be pruned."""
        return self.stage in LIVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy sees before a decision.

    Attributes:
        tick: Decisions so far.
        total_ticks: Decisions in the whole run.
        metric: On the decision split.
        slots: In the order of actions.
    """

    tick: int
    total_ticks: int
    metric: float
    slots: tuple[SlotView, ...]

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return self.tick / self.total_ticks


def view_slots(model: GrowableModel) -> tuple[SlotView, ...]:
    """Return every slot of ``model`` as a policy sees it now."""
    return tuple(_view(model, name) for name in model.stages())


def _view(model: GrowableModel, name: str) -> SlotView:
    slot = model.slot(name)
    state, sensors = slot.state, slot.sensors
    into = Stage.FOSSILIZED if state.stage is Stage.HOLDING else NEXT_STAGE.get(state.stage)
    gate = None
    if into is not None and not state.is_pruning:
        gate = gate_into(into, state, sensors, model.clock, model.config.gates)
    return SlotView(
        name=name,
        stage=state.stage,
        ticks_in_stage=state.ticks_in_stage,
        alpha=state.alpha,
        at_rest=state.ramp is None,
        is_pruning=state.is_pruning,
        gate_open=gate is not None and gate.passed,
        refusals=() if gate is None else gate.refusals,
        blueprint=state.blueprint,
        tried=state.pruned_blueprints,
        contribution=_now(sensors.contribution, model.clock),
        contribution_error=_now(sensors.contribution_error, model.clock),
    )


def _now(reading: Reading | None, clock: int) -> float | None:
    return reading.value if reading is not None and reading.tick == clock else None
