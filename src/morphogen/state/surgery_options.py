"""Optimizer options that are tuned while a run lives, set in every group where they are in force."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from morphogen.state.surgery import scale_learning_rates


def base_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of the first group before any schedule."""
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def set_base_rate(optimizer: Optimizer, learning_rate: float, schedulers: Sequence[object] = ()) -> None:
    """Make ``learning_rate`` the base rate of the first group, exactly; others keep their ratio to it, schedules their place.

    Raises:
        ValueError: It is not positive and finite, or the rate now is 0, so that there is no ratio to keep.
    """
    if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
        for group in optimizer.param_groups:  # this one lowers the rate itself, and does not keep what it began with
            group.setdefault("initial_lr", float(group["lr"]))
    before = base_rate(optimizer)
    if learning_rate == before:
        return
    if before <= 0.0:
        raise ValueError(f"the base learning rate must be > 0 to be changed, is {before}. Start with a positive one.")
    key = ["initial_lr" if "initial_lr" in group else "lr" for group in optimizer.param_groups]
    same = [float(group[name]) == before for name, group in zip(key, optimizer.param_groups, strict=True)]
    scale_learning_rates(optimizer, learning_rate / before, schedulers)
    for name, is_same, group in zip(key, same, optimizer.param_groups, strict=True):
        if not is_same:
            continue
        if isinstance(group[name], Tensor):
            group[name].fill_(learning_rate)
        else:
            group[name] = learning_rate


def option(optimizer: Optimizer, name: str) -> float:
    """Return a number among the options of the first group.

    Raises:
        ValueError: There is no such number; the message lists them.
    """
    found = optimizer.param_groups[0].get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        numbers = [key for key, value in optimizer.param_groups[0].items() if type(value) in (int, float)]
        raise ValueError(f"`{name}` must be one of {', '.join(numbers)}, the numbers of {type(optimizer).__name__}.")
    return float(found)


def set_option(optimizer: Optimizer, name: str, value: float) -> None:
    """Set a number in every group in which it is what it is in the first one.

    Raises:
        ValueError: There is no such number.
    """
    before = option(optimizer, name)
    for group in optimizer.param_groups:
        if group.get(name) == before:
            group[name] = value
