"""Recovery: what is sound, and how a run is put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from morphogen.errors import StateMismatch
from morphogen.governor.config import Strategy
from morphogen.state import Snapshot, TrainingState, surgery
from morphogen.state.inventory import all_finite, module_tensors
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
        strategy: "restore", "reset" or "zero_momentum".
        parts: Parts of the run that are as in the snapshot.
    """

    strategy: str
    parts: tuple[str, ...]


def put_back(state: TrainingState, snapshot: Snapshot, strategy: Strategy) -> Recovered:
    """Put ``state`` back to ``snapshot``.

    "auto" restores moments where the snapshot has them, else resets. So does "zero_momentum" if a second moment of the live
    optimizer is not finite, since it would poison the run at once.

    Raises:
        StateMismatch: The snapshot does not fit the run, which is as it was.
    """
    whole = "restore" if snapshot.has_optimizer_state else "reset"
    if strategy == "zero_momentum":
        state.restore(snapshot, optimizer="keep")
        try:
            for optimizer in state.optimizers.values():
                surgery.zero_momentum(optimizer)
        except StateMismatch:
            strategy = "auto"
    if strategy == "auto":
        strategy = whole
    if strategy in ("restore", "reset"):
        state.restore(snapshot, optimizer=strategy)
    kept = snapshot.parts if strategy == "restore" else snapshot.parts - _MOVING_PARTS
    return Recovered(strategy, tuple(sorted(kept)))


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
