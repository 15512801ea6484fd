"""Learning-rate schedulers survive groups that come and go: their per-group lists follow the optimizer's groups.

Most torch schedulers index their own lists by group position and raise, or use a wrong base rate, when a group is added
or removed behind their back. :func:`plan_schedule` checks that a scheduler can follow and returns the change as a
function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.optim import lr_scheduler

from morphogen.errors import StateMismatch

Scheduler = lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau
"""What torch calls a scheduler; any object with ``state_dict`` and ``load_state_dict`` is accepted at run time."""

_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Per-group lists of learning rates: a newborn's entry keeps its ratio to the group it was modelled on."""
_COPIED = ("lr_lambdas", "lmbdas", "base_momentums", "max_momentums")
"""Per-group lists whose entry a newborn shares with the group it was modelled on."""
_ONE_RATE = ("eta_min", "default_min_lr")
"""Attributes that are one learning rate for all groups."""
_NOT_PER_GROUP = ("_schedulers", "_milestones", "_schedule_phases", "milestones")


@dataclasses.dataclass(frozen=True)
class GroupMove:
    """Where one group of the new layout comes from.

    Attributes:
        like: Position in the old layout: the group itself, or for a newborn the group it was modelled on (None: none).
        ratio: Learning rate of the newborn over that of ``like``; 1 for a kept group.
    """

    like: int | None
    ratio: float = 1.0


def plan_schedule(scheduler: object, moves: Sequence[GroupMove], old_count: int) -> Callable[[], None]:
    """Return a function that rewrites the per-group lists of ``scheduler`` (and of schedulers inside it) to ``moves``.

    Nothing is changed until the returned function is called.

    Raises:
        StateMismatch: The scheduler holds a list per group that is not known here, or cannot take a group without a
            model.
    """
    if list(moves) == [GroupMove(index) for index in range(old_count)]:
        return lambda: None
    changes = [
        (holder, name, [_moved(holder, name, values, move) for move in moves])
        for holder in (scheduler, *inside(scheduler))
        for name, values in _per_group_lists(holder, old_count).items()
    ]
    return lambda: _set_all(changes)


def plan_scaling(scheduler: object, factor: float, group_count: int) -> Callable[[], None]:
    """Return a function that multiplies every learning rate in ``scheduler`` and in schedulers inside it by ``factor``.

    Raises:
        StateMismatch: As :func:`plan_schedule` does.
    """
    plan_lists = plan_schedule(scheduler, [GroupMove(index, factor) for index in range(group_count)], group_count)
    changes = [
        (holder, name, getattr(holder, name) * factor)
        for holder in (scheduler, *inside(scheduler))
        for name in _ONE_RATE
        if getattr(holder, name, None) is not None
    ]

    def commit() -> None:
        plan_lists()
        _set_all(changes)

    return commit


def inside(scheduler: object) -> Iterator[object]:
    """Yield the schedulers that ``scheduler`` holds as attributes, alone or in lists, and those inside them."""
    for value in list(getattr(scheduler, "__dict__", {}).values()):
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, Scheduler):
                yield item
                yield from inside(item)


def kind_of(scheduler: object) -> str:
    """Return the name of the scheduler's class, with those of the schedulers inside it in parentheses.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> kind_of(lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer)]))
        'ChainedScheduler(ConstantLR)'
    """
    name, inner = type(scheduler).__name__, [type(held).__name__ for held in inside(scheduler)]
    return f"{name}({', '.join(inner)})" if inner else name


def remember(scheduler: object) -> Callable[[], None]:
    """Return a function that puts back every attribute of ``scheduler``, of schedulers inside it and of its functions."""
    schedulers = [scheduler, *inside(scheduler)]
    functions = [function for held in schedulers for name in _COPIED for function in getattr(held, name, ())]
    attributes = [vars(holder) for holder in (*schedulers, *functions) if hasattr(holder, "__dict__")]
    before = [(live, dict(live)) for live in attributes]

    def put_back() -> None:
        for live, saved in before:
            live.clear()
            live.update(saved)

    return put_back


def attached_to(scheduler: object, optimizer: object) -> bool:
    """Whether ``scheduler`` (or a scheduler inside it) steps ``optimizer``."""
    return any(getattr(holder, "optimizer", None) is optimizer for holder in (scheduler, *inside(scheduler)))


def _per_group_lists(scheduler: object, old_count: int) -> dict[str, list[Any]]:
    known = type(scheduler).__module__.startswith("torch.optim")
    lists: dict[str, list[Any]] = {}
    for name, values in getattr(scheduler, "__dict__", {}).items():
        if not isinstance(values, list) or not values or name in _NOT_PER_GROUP:
            continue
        if name in _RATES or name in _COPIED:
            lists[name] = values
        elif not known and len(values) == old_count:
            raise StateMismatch(
                f"{type(scheduler).__name__} must keep only known per-group lists ({', '.join(_RATES + _COPIED)}) when "
                f"groups come or go, got `{name}` of {len(values)} entries. Use a torch scheduler, or keep the groups."
            )
    return lists


def _moved(scheduler: object, name: str, values: Sequence[Any], move: GroupMove) -> Any:
    if move.like is None or move.like >= len(values):
        raise StateMismatch(
            f"{type(scheduler).__name__} must have an entry of `{name}` for each group to take a new one's from, got "
            f"{len(values)} entries. Keep at least one group, and add groups with sync_groups only."
        )
    value = values[move.like]
    return value * move.ratio if name in _RATES and move.ratio != 1.0 else value


def _set_all(changes: Sequence[tuple[object, str, object]]) -> None:
    for holder, name, value in changes:
        setattr(holder, name, value)
