"""Taking over another run: what travels, what stays, what starts anew, for every part of a TrainingState."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from morphogen.pbt.strategies import Strategy
from morphogen.state import Snapshot, TrainingState


@dataclasses.dataclass(frozen=True)
class Part:
    """One row of :data:`PARTS`."""

    what: str
    fate: str


PARTS = (
    Part("weights, buffers, structure, which are frozen", "inherited"),
    Part("optimizer moments and steps", "by the strategy"),
    Part("parameter groups, learning rates, schedule", "kept; hyperparameters are applied afterwards"),
    Part("gradient scaler, normalisers, averages, controllers", "inherited"),
    Part("random streams, global generators", "derived from (source's seed, member, event)"),
    Part("environments, data cursors that belong to the run", "started anew from the derived seed, where they can; else kept"),
    Part("gradients, recurrent state", "cleared"),
)
"""What becomes of each part of a run when it takes over another one."""


def hand_over(state: TrainingState, snapshot: Snapshot, optimizer: Strategy, seed: int | None) -> None:
    """Let the run of ``state`` take over another one, all or nothing.

    Args:
        state: The run that changes.
        snapshot: Of the other one; not changed.
        optimizer: What becomes of moments.
        seed: Of its streams from now on; None: they go on exactly as the other run's.

    Raises:
        StateMismatch: The runs do not fit; nothing was changed.
        ValueError: The strategy names moments that the optimizers do not have.
    """
    if isinstance(optimizer, str):
        state.adopt(snapshot, optimizer)
    else:
        state.adopt(with_moments(snapshot, optimizer), "copy")
    if seed is None:
        state.follow_streams(snapshot)
    else:
        state.reseed(seed)


def with_moments(snapshot: Snapshot, keys: tuple[str, ...]) -> Snapshot:
    """Return ``snapshot`` with every moment zero but those called one of ``keys``; it aliases the others.

    Raises:
        ValueError: No optimizer has a moment called so.
    """
    tables: dict[str, Mapping[str, Tensor]] = {}
    found: set[str] = set()
    for part, data in snapshot.meta.get("optimizer", {}).items():
        section = f"optimizer.{part}" if part else "optimizer"
        table = snapshot.table(section)
        named = {f"{name}.{key}": key for name, values in data["state"].items() for key in values}
        found |= {*named.values()}
        tables[section] = {
            name: tensor if named.get(name) in keys else torch.zeros_like(tensor) for name, tensor in table.items()
        }
    missing = [key for key in keys if key not in found]
    if missing and found:
        raise ValueError(
            f"`optimizer_exploit_strategy` must name moments the optimizer has, {', '.join(sorted(found))}, got {missing[0]!r}."
        )
    return _replaced(snapshot, tables)


def _replaced(snapshot: Snapshot, tables: Mapping[str, Mapping[str, Any]]) -> Snapshot:
    every: dict[str, dict[str, Tensor]] = {}
    for section, name, tensor in snapshot.named_tensors():
        if section != "loose":
            every.setdefault(section, {})[name] = tables.get(section, {}).get(name, tensor)
    return Snapshot(every, dict(snapshot.loose), snapshot.meta)
