"""The numbers of the slots of one model, read into a row of frames."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from morphogen.control.observation import SlotView, view_slots
from morphogen.envs.choices import Menu
from morphogen.envs.frames import Frames
from morphogen.growth import GrowableModel
from morphogen.growth.accounting import count_parameters
from morphogen.growth.gates import Check, Reading
from morphogen.growth.lifecycle import OPERATORS
from morphogen.growth.ramps import CURVES

_CHECKS = tuple(Check)


def write_slots(
    frames: Frames,
    row: int,
    model: GrowableModel,
    menu: Menu,
    *,
    births: Mapping[str, float],
    peaks: Mapping[str, float],
    parameters: Mapping[str, int] | None = None,
) -> None:
    """Write the slots of ``model`` into one row of ``frames``; places without a slot are NaN throughout.

    Args:
        frames: Written to.
        row: Which row.
        model: Read.
        menu: Places of slots and blueprints.
        births: Slot -> the metric when its seed was germinated.
        peaks: Slot -> the highest contribution of its seed so far.
        parameters: Slot -> how many its seed has; by default they are counted.
    """
    frames.slots_NSR[row] = np.nan
    parameters = count_parameters(model) if parameters is None else parameters
    blueprints = [sowing.blueprint for sowing in menu.blueprints]
    for place, view in enumerate(view_slots(model)):
        numbers = _numbers(model, view, blueprints) | {"parameters": parameters.get(view.name, 0)}
        if model.slot(view.name).state.has_seed:
            numbers |= {
                "metric_at_birth": births.get(view.name, np.nan),
                "contribution_peak": peaks.get(view.name, np.nan),
            }
        frames.write_slot(row, place, numbers)


def _numbers(model: GrowableModel, view: SlotView, blueprints: list[str]) -> dict[str, float]:
    slot = model.slot(view.name)
    state, sensors = slot.state, slot.sensors
    numbers: dict[str, float] = {
        "stage": int(state.stage),
        "ticks_in_stage": state.ticks_in_stage,
        "age_ticks": state.age_ticks,
        "alpha": state.alpha,
        "alpha_target": state.alpha_target if state.has_seed else 0.0,
        "ramp_ticks_left": 0 if state.ramp is None else state.ramp.num_ticks - state.ramp.tick,
        "is_pruning": float(state.is_pruning),
        "gate_open": float(view.gate_open),
        "refusals": sum(2 ** _CHECKS.index(check) for check in view.refusals),
        "germinations": state.germination,
        "tried": sum(2 ** blueprints.index(name) for name in set(state.pruned_blueprints) if name in blueprints),
    }
    if state.has_seed:
        numbers["operator"] = OPERATORS.index(state.operator)
        numbers["blend_ticks"] = state.blend_ticks
        numbers["curve"] = CURVES.index(state.curve)
        numbers["blueprint"] = blueprints.index(state.blueprint) if state.blueprint in blueprints else np.nan
        numbers["gradient_ratio"] = _fresh(sensors.gradient_ratio, model.clock)
        numbers["finite"] = _fresh(sensors.finite, model.clock)
        numbers["contribution"] = np.nan if sensors.contribution is None else sensors.contribution.value
        numbers["contribution_tick"] = np.nan if sensors.contribution is None else sensors.contribution.tick
        numbers["contribution_error"] = np.nan if sensors.contribution_error is None else sensors.contribution_error.value
    return numbers


def _fresh(reading: Reading | None, clock: int) -> float:
    """Return a value measured at this clock or, as sensing comes before the tick, at the one before; else NaN."""
    return reading.value if reading is not None and 0 <= clock - reading.tick <= 1 else np.nan
