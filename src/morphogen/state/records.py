"""An optimizer's contents as data: by parameter name, large tensors apart, everything else JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from morphogen.errors import StateMismatch
from morphogen.state import trees
from morphogen.telemetry.events import Json


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """One parameter group: names of its parameters, and its options (everything but the parameters)."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerRecord:
    """What an optimizer holds, by parameter name. Values may alias the optimizer's own; whoever keeps it copies them."""

    kind: str
    groups: tuple[GroupRecord, ...]
    state: Mapping[str, Mapping[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of all parameters, group by group."""
        return [name for group in self.groups for name in group.names]


def encode_optimizer(record: OptimizerRecord, loose: trees.TensorTable, path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``record`` as JSON data, and its state tensors, *aliased*, under ``<parameter>.<key>``."""
    groups: list[Json] = [
        {"names": list(group.names), "options": trees.encode(group.options, loose, f"{path}.group{index}")}
        for index, group in enumerate(record.groups)
    ]
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for name, values in record.state.items():
        keys: dict[str, Json] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
                keys[key] = None
            else:
                keys[key] = [trees.encode(value, loose, f"{path}.{name}.{key}")]
        state[name] = keys
    return {"kind": record.kind, "groups": groups, "state": state}, tensors


def decode_optimizer(data: Mapping[str, Any], tensors: Mapping[str, Tensor], loose: Mapping[str, Tensor]) -> OptimizerRecord:
    """Return the record; its state tensors alias ``tensors``. StateMismatch if one is missing."""
    groups = tuple(GroupRecord(tuple(group["names"]), trees.decode(group["options"], loose)) for group in data["groups"])
    try:
        state = {
            name: {
                key: tensors[f"{name}.{key}"] if value is None else trees.decode(value[0], loose)
                for key, value in values.items()
            }
            for name, values in data["state"].items()
        }
    except KeyError as error:
        raise StateMismatch(f"the snapshot is not whole: the moment {error} is missing from it.") from error
    return OptimizerRecord(data["kind"], groups, state)
