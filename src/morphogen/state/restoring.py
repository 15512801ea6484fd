"""How a snapshot gets back into a run: check everything, then change structure, then copy; undone whole on failure."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from morphogen.errors import StateMismatch
from morphogen.state import extras, fitting, inventory, schedules, surgery, trees
from morphogen.state.inventory import ModuleTensors
from morphogen.state.parts import Parts, Sections, first_names, section, tensors_of
from morphogen.state.records import OptimizerRecord, decode_optimizer
from morphogen.state.snapshot import Snapshot
from morphogen.state.topology import DynamicModel, TopologyChange
from morphogen.telemetry.events import Json

Records = Mapping[str, OptimizerRecord]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was checked.

    Attributes:
        changes: Structures that are built, ready to commit, by section.
        found: What is in each module now.
    """

    changes: Mapping[str, TopologyChange]
    found: Mapping[str, ModuleTensors]


def optimizer_records(snapshot: Snapshot) -> dict[str, OptimizerRecord]:
    """Return the optimizers in ``snapshot``; their tensors alias its buffers. StateMismatch if a moment is missing."""
    return {
        part: decode_optimizer(data, snapshot.table(section("optimizer", part)), snapshot.loose)
        for part, data in snapshot.meta.get("optimizer", {}).items()
    }


def plan(parts: Parts, snapshot: Snapshot, records: Records, adopting: bool) -> Plan:
    """Check that ``snapshot`` fits; build changed structures beside the live ones.

    Raises:
        StateMismatch: With one line for each part, tensor or moment that does not fit.
    """
    changes: dict[str, TopologyChange] = {}
    found = parts.found()
    tensors: dict[str, Mapping[str, Tensor]] = dict(tensors_of(found))
    problems = _missing_parts(parts, snapshot, adopting)
    for part, module in parts.modules().items():
        saved = snapshot.meta["model"].get(part)
        if saved is None:
            continue
        if isinstance(module, DynamicModel) and saved.get("topology") is not None:
            changes[part] = module.plan_topology(trees.decode(saved["topology"], snapshot.loose))
            tensors[part] = changes[part].named_tensors()
        problems += inventory.disagreements(snapshot.table(part), tensors[part])
    parameters = parts.parameters(tensors)
    for part, record in records.items():
        if part in parts.optimizers:
            problems += fitting.misfits(type(parts.optimizers[part]), record, parameters)
    if not _bare(snapshot):
        problems += inventory.disagreements(snapshot.table("tensors"), parts.tensor_extras())
    if problems:
        raise StateMismatch("the snapshot does not fit this run.", tuple(problems))
    return Plan(changes, found)


def _bare(snapshot: Snapshot) -> bool:
    """Whether only weights are in the snapshot, so that every other part stays as it is."""
    return "extras" not in snapshot.meta


def _missing_parts(parts: Parts, snapshot: Snapshot, adopting: bool) -> list[str]:
    models = [section("model", part) for part in parts.models]
    if _bare(snapshot):
        return _differences("model", models, snapshot)
    ours: dict[str, Iterable[str]] = {"model": parts.modules(), "extras": parts.extras_of("stream", "state")}
    if adopting:
        return [line for what, live in ours.items() for line in _differences(what, live, snapshot)]
    ours |= {"optimizer": parts.optimizers, "scheduler": parts.schedulers, "scaler": parts.scalers}
    problems = [line for what, live in ours.items() for line in _differences(what, live, snapshot)]
    for part, scheduler in parts.schedulers.items():
        ours_is, theirs_was = schedules.kind_of(scheduler), snapshot.meta["scheduler"].get(part, {}).get("kind")
        if theirs_was not in (ours_is, None):
            problems.append(f"scheduler {part!r} is {ours_is}, the snapshot's was {theirs_was}")
    return problems


def _differences(what: str, live: Iterable[str], snapshot: Snapshot) -> list[str]:
    ours, saved = list(live), list(snapshot.meta.get(what, {}))
    missing = [f"{what} {part!r} is in the run and missing from the snapshot" for part in ours if part not in saved]
    return missing + [f"{what} {part!r} is in the snapshot and missing from the run" for part in saved if part not in ours]


def remember_optimizers(parts: Parts, undo: contextlib.ExitStack) -> None:
    """Let ``undo`` put back groups, membership, state entries, schedules and scalers exactly as they are now."""
    for optimizer in parts.optimizers.values():
        undo.callback(surgery.remember(optimizer))
    for scheduler in parts.schedulers.values():
        undo.callback(schedules.remember(scheduler))
    for part, scaler in parts.scalers.items():
        _remember_extra(part, scaler, undo)


def write_extras(parts: Parts, snapshot: Snapshot, kinds: Sequence[str], undo: contextlib.ExitStack) -> None:
    """Load the extras of these kinds: theirs is code of the user's that may refuse, so it runs first."""
    for name, data in snapshot.meta.get("extras", {}).items():
        kind, extra = parts.kinds[name], parts.extras[name]
        if kind in kinds:
            _remember_extra(name, extra, undo)
            _write_extra(extra, data, snapshot.loose)


def _remember_extra(name: str, extra: object, undo: contextlib.ExitStack) -> None:
    table: trees.TensorTable = {}
    before = trees.encode(extras.read_extra(extra), table, name)
    undo.callback(_write_extra, extra, before, table)


def _write_extra(extra: object, data: Json, table: Mapping[str, Tensor]) -> None:
    extras.write_extra(extra, trees.decode(data, table))


def commit_topology(parts: Parts, planned: Plan, undo: contextlib.ExitStack) -> None:
    """Put the planned structures in place; ``undo`` puts the present ones back, the same objects."""
    modules = parts.modules()
    for part, change in planned.changes.items():
        module = cast("DynamicModel", modules[part])
        undo.callback(module.plan_topology(module.topology()).commit)
        change.commit()


def tensor_copies(parts: Parts, tensors: Sections, snapshot: Snapshot) -> list[tuple[Tensor, Tensor]]:
    """Return (live, saved) pairs for every tensor of models and extras."""
    copies: list[tuple[Tensor, Tensor]] = []
    for part, live_tensors in tensors.items():
        saved = snapshot.table(part)
        copies += [(live, saved[name]) for name, live in live_tensors.items() if name in saved]
    table = snapshot.table("tensors")
    return copies + [(live, table[name]) for name, live in parts.tensor_extras().items() if name in table]


def write_flags(
    found: Mapping[str, ModuleTensors], snapshot: Snapshot, kinds: Sequence[str], undo: contextlib.ExitStack
) -> bool:
    """Set the module flags of these kinds ("frozen", "evaluating", "extra_state"); return whether a freeze changed."""
    frozen = False
    for part, module in found.items():
        saved = snapshot.meta["model"].get(part, {})
        table: trees.TensorTable = {}
        before = inventory.module_flags(module, part, table)
        changed = {kind: saved[kind] for kind in kinds if kind in saved and saved[kind] != before[kind]}
        if "extra_state" in kinds and saved.get("extra_state"):  # its tensors are elsewhere, so equal data says nothing
            changed["extra_state"] = saved["extra_state"]
        if changed:
            undo.callback(inventory.write_module_flags, module, before, table)
            inventory.write_module_flags(module, changed, snapshot.loose)
        frozen |= "frozen" in changed
    return frozen


def load_each(live: Mapping[str, Any], saved: Mapping[str, Any], loose: Mapping[str, Tensor]) -> None:
    """Load schedulers or scalers by name."""
    for part, data in saved.items():
        if part in live:
            live[part].load_state_dict(trees.decode(data["state"], loose))


def ready_scalers(parts: Parts) -> None:
    """Let gradient scalers forget that the gradients now gone were unscaled, which their ``state_dict`` leaves out."""
    for scaler in parts.scalers.values():
        if isinstance(scaler, torch.amp.GradScaler):
            scaler._per_optimizer_states.clear()  # pyright: ignore[reportPrivateUsage]


@dataclasses.dataclass(frozen=True)
class AdoptedMoments:
    """State to write into one optimizer, and the factor for the first moments of each parameter."""

    state: Mapping[str, Mapping[str, Any]]
    ratios: Mapping[Parameter, float]


def adopted_moments(
    parts: Parts, parameters: Mapping[str, Parameter], records: Records, strategy: str
) -> dict[str, AdoptedMoments]:
    """Return what "copy", "rescale" or "adaptive" makes of another run's moments; StateMismatch if they do not fit."""
    names = first_names(parameters)
    moments: dict[str, AdoptedMoments] = {}
    problems: list[str] = []
    for part, target in parts.optimizers.items():
        if part not in records:
            problems.append(f"optimizer {part!r} is in the run and missing from the snapshot")
            continue
        kind, ours, theirs = type(target), surgery.read(target, names), records[part]
        if strategy == "adaptive":
            state = fitting.usable_state(kind, ours, theirs, parameters)
        else:
            state = theirs.state
            problems += fitting.copy_misfits(kind, ours, theirs, parameters)
        ratios = {} if strategy == "copy" else fitting.rate_ratios(ours, theirs)
        moments[part] = AdoptedMoments(state, {parameters[name]: ratios[name] for name in state if name in ratios})
    if problems and strategy != "adaptive":
        raise StateMismatch('another run\'s moments do not fit. Use "reset" or "adaptive".', tuple(problems))
    return moments
