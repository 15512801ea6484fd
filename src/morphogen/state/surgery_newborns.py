"""Optimizer surgery for owners that have just come: rates derived from another group's, and where their moments start.

Rates are multiplied where they are, so that a tensor learning rate is never read and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Adamax, Optimizer, RAdam

from morphogen.errors import StateMismatch

_CORRECT_BIAS_BY_STEP = (Adam, Adamax, RAdam)
"""Optimizers (and their subclasses, such as AdamW) whose only use of ``step`` is to correct moments that began at zero."""


def corrects_bias_by_step(optimizer: Optimizer) -> bool:
    """Whether the step count of a parameter decides how its young moments are scaled up, and nothing else."""
    return isinstance(optimizer, _CORRECT_BIAS_BY_STEP)


def has_moments(optimizer: Optimizer) -> bool:
    """Whether the optimizer remembers anything between steps; SGD does with momentum alone."""
    return not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] != 0.0 for group in optimizer.param_groups)


def note_initial_rates(optimizer: Optimizer) -> None:
    """Note in each group, as torch's schedulers do under ``"initial_lr"``, the rate it starts from, unless it is there."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:
            group["initial_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]


def present_rate(optimizer: Optimizer, owner: str) -> float | Tensor:
    """Return the learning rate of the owner's first group, else of the first of all; a tensor is *aliased*, not read."""
    return _group_of(optimizer, owner)["lr"]


def peak_rate(optimizer: Optimizer, owner: str) -> float | Tensor:
    """Return the highest rate of the schedule of the owner's group (as :func:`present_rate`), as far as the group tells.

    That is what OneCycleLR keeps under ``"max_lr"``, else ``"initial_lr"``, else the present rate.
    """
    group = _group_of(optimizer, owner)
    return group.get("max_lr", group.get("initial_lr", group["lr"]))


def follow_rate(optimizer: Optimizer, owner: str, leader: str, factor: float) -> None:
    """Set the rate of the groups of ``owner`` to ``factor`` times the present one of ``leader`` (:func:`present_rate`)."""
    rate = present_rate(optimizer, leader) * factor
    for group in _groups_of(optimizer, owner):
        _set_rate(group, rate)


def follow_initial_rate(optimizer: Optimizer, owner: str, factor: float) -> None:
    """Set the rate of the groups of ``owner`` to ``factor`` times the one each started from, its ``"initial_lr"``.

    Raises:
        StateMismatch: A group does not know it, or the owner has no group.
    """
    for group in _groups_of(optimizer, owner):
        if "initial_lr" not in group:
            raise StateMismatch(f'the group of `{owner}` must have an "initial_lr", got none. Give it with its options.')
        _set_rate(group, group["initial_lr"] * factor)


def follow_initial_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of every group to ``factor`` times the one it started from, its ``"initial_lr"``."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            _set_rate(group, rate)
        else:
            group["lr"] = rate


def start_at_step_of(optimizer: Optimizer, parameters: Iterable[Parameter], like: Iterable[Parameter]) -> int:
    """Give ``parameters`` zero moments and the step count of the first of ``like`` that has one.

    The bias of moments that began at zero then goes uncorrected, so that the first steps of Adam are too long: up to
    ``(1 - beta1) / sqrt(1 - beta2)`` learning rates, 3.16 at the defaults.

    Args:
        optimizer: One that :func:`corrects_bias_by_step`; the parameters may join its groups afterwards.
        parameters: Those that are given state; what they had is replaced.
        like: Where the step count, and which moments there are, is read.

    Returns:
        How many parameters were given state; 0 if none of ``like`` has any yet.
    """
    template = next((optimizer.state[parameter] for parameter in like if optimizer.state.get(parameter)), None)
    if template is None:
        return 0
    started = 0
    for parameter in parameters:
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else torch.zeros_like(parameter, requires_grad=False)
            for key, value in template.items()
        }
        started += 1
    return started


def _groups_of(optimizer: Optimizer, owner: str) -> list[dict[str, Any]]:
    groups = [group for group in optimizer.param_groups if group.get("owner") == owner]
    if not groups:
        owners = sorted({str(group.get("owner")) for group in optimizer.param_groups})
        raise StateMismatch(f"`owner` must be one of {owners}, got {owner!r}. Call sync_groups first.")
    return groups


def _group_of(optimizer: Optimizer, owner: str) -> dict[str, Any]:
    groups = optimizer.param_groups
    return next((group for group in groups if group.get("owner") == owner), groups[0])


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
