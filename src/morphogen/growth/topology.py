"""The structure of a growing model as plain JSON data, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from morphogen.errors import StateMismatch
from morphogen.growth.features import Site
from morphogen.growth.gates import Reading, SlotSensors
from morphogen.growth.host_changes import HostRecord
from morphogen.growth.lifecycle import SlotState, Sowing, Stage, Transition
from morphogen.growth.ramps import Ramp
from morphogen.growth.slots import SeedSlot
from morphogen.telemetry.events import Json

FORMAT = 2


def topology_of(slots: Mapping[str, SeedSlot], clock: int, host: HostRecord) -> Json:
    """Return the structure: format, clock, what of the host is not as built, and for each slot its site, state and sensors."""
    return {
        "format": FORMAT,
        "clock": clock,
        "host": host.as_json(),
        "slots": {
            name: {
                "site": _plain(slot.site),
                "state": _plain(slot.state),
                "sensors": _plain(slot.sensors),
            }
            for name, slot in slots.items()
        },
    }


def _plain(record: object) -> Json:
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Stage):
        return record.name
    if isinstance(record, tuple):
        return [_plain(item) for item in cast("tuple[object, ...]", record)]
    if isinstance(record, Mapping):
        return {str(key): _plain(value) for key, value in cast("Mapping[Any, object]", record).items()}
    return cast("Json", record)


def with_fossils(topology: Json, sowings: Mapping[str, Sowing]) -> Json:
    """Return ``topology`` with a fossil at full alpha in each of these slots: growth that was there from the start."""
    slots: dict[str, Any] = {name: dict(entry) for name, entry in cast("dict[str, Any]", topology)["slots"].items()}
    for name, sowing in sowings.items():
        state = SlotState(
            stage=Stage.FOSSILIZED,
            germination=1,
            blueprint=sowing.blueprint,
            options=dict(sowing.options),
            operator=sowing.operator,
            alpha=1.0,
        )
        slots[name]["state"] = _plain(state)
    return {**cast("dict[str, Any]", topology), "slots": slots}


def read_host(data: Json, host: nn.Module, present: HostRecord) -> HostRecord:
    """Return what of the host is not as built; none of it in a topology of before hosts could change.

    Raises:
        StateMismatch: It speaks of another host than ``host``, which is as ``present`` says.
    """
    entry = cast("dict[str, Any]", data).get("host", {})
    try:
        return HostRecord.read(entry, host, present)
    except (AttributeError, KeyError, TypeError) as error:
        raise StateMismatch(f"the topology's entry of the host was not written by this release: {error}.") from error


@dataclasses.dataclass(frozen=True)
class SlotRecord:
    """One slot's entry in a topology."""

    state: SlotState
    sensors: SlotSensors


def read_topology(data: Json, sites: Mapping[str, Site]) -> tuple[int, dict[str, SlotRecord]]:
    """Return the clock and each slot's record.

    Raises:
        StateMismatch: The data is of another format, or its slots are not those at ``sites``.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise StateMismatch(f"the topology must have format {FORMAT}, got {found}. Use the release that wrote it.")
    slots = cast("dict[str, Any]", data["slots"])
    problems = [f"slot {name!r} is in the model and missing from the topology" for name in sites if name not in slots]
    problems += [f"slot {name!r} is in the topology and missing from the model" for name in slots if name not in sites]
    problems += [
        f"slot {name!r} sits at {sites[name]} in the model and at {entry['site']} in the topology"
        for name, entry in slots.items()
        if name in sites and entry["site"] != _plain(sites[name])
    ]
    if problems:
        raise StateMismatch("the topology does not fit this model.", tuple(problems))
    return cast("int", data["clock"]), {name: _record(name, entry) for name, entry in slots.items()}


def _record(name: str, entry: Mapping[str, Any]) -> SlotRecord:
    try:
        return _read_record(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise StateMismatch(f"the topology's entry of slot {name!r} was not written by this release: {error}.") from error


def _read_record(entry: Mapping[str, Any]) -> SlotRecord:
    state = dict(entry["state"])
    state["stage"] = Stage[state["stage"]]
    state["ramp"] = None if state["ramp"] is None else Ramp(**state["ramp"])
    state["history"] = tuple(
        Transition(**cast("dict[str, Any]", {**item, "previous": Stage[item["previous"]], "stage": Stage[item["stage"]]}))
        for item in state["history"]
    )
    state["pruned_blueprints"] = tuple(state["pruned_blueprints"])
    sensors = {name: None if value is None else Reading(**value) for name, value in entry["sensors"].items()}
    return SlotRecord(SlotState(**state), SlotSensors(**sensors))
