"""Which group each parameter belongs in: the layout of an optimizer, derived from who owns which parameter.

Pure functions over group dicts; :mod:`morphogen.state.surgery` applies what they return.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from morphogen.state.schedules import GroupMove

Owned = Iterable[Parameter] | Iterable[tuple[str, Parameter]]
Group = dict[str, Any]

RATE_OPTIONS = ("initial_lr", "max_lr", "min_lr", "swa_lr")
"""Options of a group, beside ``lr``, that are learning rates; schedulers put them there."""
_NOT_OPTIONS = ("params", "param_names", "owner")


@dataclasses.dataclass(frozen=True)
class Ownership:
    """Who owns which parameter.

    Attributes:
        trainable: Owner -> its parameters that are not frozen, each once.
        owner_of: ``id(parameter)`` -> owner, frozen parameters included.
        names: ``id(parameter)`` -> name.
    """

    trainable: dict[str, list[Parameter]]
    owner_of: dict[int, str]
    names: dict[int, str]


@dataclasses.dataclass
class Placement:
    """A group of the layout to come: an existing group, or a newborn modelled on the group at ``like``."""

    owner: str
    group: Group | None
    like: int | None
    members: list[Parameter]
    options: dict[str, Any]


def ownership(owners: Mapping[str, Owned]) -> Ownership:
    """Return ``owners`` by parameter.

    Args:
        owners: Owner -> its parameters, or (name, parameter) pairs.

    Raises:
        ValueError: A parameter has two owners.
        TypeError: A parameter is no leaf.
    """
    result = Ownership({}, {}, {})
    for owner, owned in owners.items():
        members = result.trainable.setdefault(owner, [])
        for index, item in enumerate(owned):
            name, parameter = item if isinstance(item, tuple) else (f"{owner}.{index}", item)
            if not parameter.is_leaf:
                raise TypeError(f"`{name}` must be a leaf tensor, got a result of an operation. Wrap it in a Parameter.")
            other = result.owner_of.get(id(parameter), owner)
            if other != owner:
                raise ValueError(
                    f"parameter `{name}` must have one owner, got {other!r} and {owner!r}. "
                    "Give it to the one that lives longer."
                )
            if id(parameter) not in result.owner_of and parameter.requires_grad:
                members.append(parameter)
            result.owner_of[id(parameter)] = owner
            result.names.setdefault(id(parameter), name)
    return result


def place(groups: Sequence[Group], owned: Ownership, options: Mapping[str, Mapping[str, Any]]) -> list[Placement]:
    """Return the groups to come: kept ones in their order, then one for each owner that has none."""
    group_of = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    trainable = {id(parameter) for members in owned.trainable.values() for parameter in members}
    placements: list[Placement] = []
    first_of: dict[str, Placement] = {}
    for index, group in enumerate(groups):
        owner = _owner_of_group(group, owned)
        if owner is None:
            continue
        members = [p for p in group["params"] if owned.owner_of.get(id(p)) == owner and id(p) in trainable]
        placements.append(Placement(owner, group, index, members, {}))
        first_of.setdefault(owner, placements[-1])
    placed = {id(parameter) for placement in placements for parameter in placement.members}
    for owner, members in owned.trainable.items():
        missing = [parameter for parameter in members if id(parameter) not in placed]
        if owner not in first_of:
            like = next((group_of[id(parameter)] for parameter in missing if id(parameter) in group_of), 0)
            first_of[owner] = Placement(owner, None, like if groups else None, [], dict(options.get(owner, {})))
            placements.append(first_of[owner])
        first_of[owner].members += missing
    return placements


def _owner_of_group(group: Mapping[str, Any], owned: Ownership) -> str | None:
    if "owner" in group:
        return group["owner"] if group["owner"] in owned.trainable else None
    owners = (owned.owner_of[id(parameter)] for parameter in group["params"] if id(parameter) in owned.owner_of)
    return next(owners, None)


def newborn_options(placement: Placement, groups: Sequence[Group]) -> dict[str, Any]:
    """Return the options of a group to be made: its model's, the rates among them scaled to its own learning rate."""
    if placement.like is None:
        return dict(placement.options)
    model = groups[placement.like]
    options = {key: _unshared(value) for key, value in model.items() if key not in _NOT_OPTIONS}
    for key in RATE_OPTIONS:
        if key in options:
            options[key] = options[key] * _ratio(placement, model)
    return {**options, **placement.options}


def move_of(placement: Placement, groups: Sequence[Group]) -> GroupMove:
    """Return where a group of the new layout comes from, for the schedules."""
    if placement.group is not None or placement.like is None:
        return GroupMove(placement.like)
    return GroupMove(placement.like, _ratio(placement, groups[placement.like]))


def names_in(groups: Sequence[Group]) -> dict[int, str]:
    """Return the names in groups made with ``named_parameters()``; empty for any other."""
    return {
        id(parameter): name
        for group in groups
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }


def matching_groups(owners: Sequence[object], groups: Sequence[Group]) -> list[int | None]:
    """Return for each owner the position of its own group, else of the unowned one in its place, else None."""
    found: list[int | None] = [None] * len(owners)
    free = dict(enumerate(groups))
    for index, owner in enumerate(owners):
        for position, group in free.items():
            if owner is not None and group.get("owner") == owner:
                found[index] = position
                del free[position]
                break
    for index, owner in enumerate(owners):
        if found[index] is None and index in free and (owner is None or free[index].get("owner") is None):
            found[index] = index
            del free[index]
    return found


def _ratio(placement: Placement, model: Mapping[str, Any]) -> float:
    """A newborn's own rate over its model's present one, or over its initial one where a schedule has come to zero."""
    rate = float(model["lr"]) or float(model.get("initial_lr", 0.0))
    return float(placement.options["lr"]) / rate if "lr" in placement.options and rate > 0.0 else 1.0


def _unshared(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
