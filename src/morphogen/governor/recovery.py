"""Recovery: what is sound, and how a run is put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from morphogen.governor.config import Strategy
from morphogen.state import DynamicModel, Snapshot, TrainingState, surgery
from morphogen.state.inventory import all_finite, disagreements, module_tensors
from morphogen.state.parts import section

_MOVING_PARTS = frozenset({"optimizer", "scheduler", "scaler"})


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the governor knew when it took a snapshot; a rewind takes it back too.

    Attributes:
        position: Clean observations on the way to the snapshot.
        detectors: State of each detector by name.
    """

    position: int
    detectors: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recovered:
    """How a run was put back.

    Attributes:
        strategy: "restore", "reset" or "zero_momentum"; with several, as "owner: strategy" joined by commas.
        parts: Parts of the run that are as in the snapshot.
        rates_restored: Whether learning rates and schedule are as in the snapshot.
        moments_reset: Whether some moments were forgotten.
    """

    strategy: str
    parts: tuple[str, ...]
    rates_restored: bool
    moments_reset: bool


def put_back(state: TrainingState, snapshot: Snapshot, strategy: Strategy | Mapping[str, Strategy]) -> Recovered:
    """Put ``state`` back to ``snapshot``.

    A strategy says what becomes of the moments. "restore" takes them from the snapshot. "reset" forgets them; learning rates
    and schedule stay as they are now. "zero_momentum" takes them from the snapshot and zeroes the first ones, so that nothing
    pushes the run where it went before. "auto" is "restore". A snapshot without moments makes all of them "reset". Given for
    each owner (as in ``TrainingState.learning_rates``), learning rates and schedule come from the snapshot for all, and owners
    left out have their moments restored.

    Raises:
        StateMismatch: The snapshot does not fit the run, which is as it was.
        ValueError: An owner is unknown.
    """
    synchronize(state)
    if state.optimizers and not snapshot.has_optimizer_state:
        strategy = "reset"
    if isinstance(strategy, str):
        wanted = "restore" if strategy == "auto" else strategy
        state.restore(snapshot, optimizer="reset" if wanted == "reset" else "restore")
        if wanted == "zero_momentum":
            for optimizer in state.optimizers.values():
                surgery.zero_momentum(optimizer)
        kept = snapshot.parts - _MOVING_PARTS if wanted == "reset" else snapshot.parts
        recovered = Recovered(wanted, tuple(sorted(kept)), wanted != "reset", wanted == "reset")
    else:
        state.restore(snapshot)
        for owner, wanted in strategy.items():
            optimizer, members = state.group_of(owner)
            if wanted == "reset":
                surgery.reset_moments(optimizer, members)
            elif wanted == "zero_momentum":
                surgery.zero_momentum(optimizer, members)
        words = ", ".join(f"{owner}: {wanted}" for owner, wanted in strategy.items())
        recovered = Recovered(words, tuple(sorted(snapshot.parts)), True, "reset" in strategy.values())
    synchronize(state)
    return recovered


def synchronize(state: TrainingState) -> None:
    """Wait for everything that still runs on the run's devices, side streams too; for moments outside the step path."""
    devices = {tensor.device for model in state.models.values() for tensor in (*model.parameters(), *model.buffers())}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def fits(state: TrainingState, snapshot: Snapshot) -> bool:
    """Whether ``snapshot`` has the tensors of every model that cannot put its structure back by itself."""
    fixed = {part: module for part, module in state.models.items() if not isinstance(module, DynamicModel)}
    return not any(
        disagreements(snapshot.table(section("model", part)), module_tensors(module).tensors) for part, module in fixed.items()
    )


def live_damage(state: TrainingState, trusted: Snapshot) -> list[str]:
    """Return the names of tensors of the models as they are that are not finite but should be; see :func:`snapshot_damage`."""
    tables = {section("model", part): module_tensors(module).tensors for part, module in state.models.items()}
    return _damage(state, tables, trusted)


def snapshot_damage(state: TrainingState, snapshot: Snapshot, trusted: Snapshot | None) -> list[str]:
    """Return the names of tensors of ``snapshot`` that are not finite but should be.

    Parameters and moments should. Anything else (a mask of -inf, a best loss of inf) should if it was finite in ``trusted``,
    a snapshot that proved good; None for the first.
    """
    if snapshot.is_finite():
        return []
    tables: dict[str, dict[str, Tensor]] = {}
    for part, name, tensor in snapshot.named_tensors():
        tables.setdefault(part, {})[name] = tensor
    tables.pop("loose", None)
    return _damage(state, tables, trusted)


def _damage(state: TrainingState, tables: Mapping[str, Mapping[str, Tensor]], trusted: Snapshot | None) -> list[str]:
    trained = {
        (section("model", part), name) for part, module in state.models.items() for name in module_tensors(module).parameters()
    }
    damaged: list[str] = []
    for part, table in tables.items():
        before = trusted.table(part) if trusted is not None else {}
        for name in _not_finite(table):
            is_trained = part.startswith("optimizer") or (part, name) in trained
            if is_trained or (name in before and all_finite([before[name]])):
                damaged.append(f"{part}: {name}")
    return damaged


def _not_finite(table: Mapping[str, Tensor]) -> list[str]:
    return [] if all_finite(table.values()) else [name for name, tensor in table.items() if not all_finite([tensor])]
