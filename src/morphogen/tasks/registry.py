"""The registry of tasks: one row for each. A task's module is imported when the task is asked for."""

from __future__ import annotations

import difflib
import importlib

from morphogen.tasks.base import Task

_HOMES = {
    "digits": ("morphogen.tasks.digits", "TASK"),
    "mnist1d": ("morphogen.tasks.mnist1d", "TASK"),
    "mnist": ("morphogen.tasks.mnist", "TASK"),
    "fashion_mnist": ("morphogen.tasks.fashion_mnist", "TASK"),
    "cifar10": ("morphogen.tasks.cifar10", "TASK"),
    "cifar10_impaired": ("morphogen.tasks.cifar10", "IMPAIRED"),
    "cifar10_deep": ("morphogen.tasks.cifar10", "DEEP"),
    "cifar10_minimal": ("morphogen.tasks.cifar10", "MINIMAL"),
    "text": ("morphogen.tasks.text", "TASK"),
    "text_byte": ("morphogen.tasks.text", "BYTE"),
    "tinystories": ("morphogen.tasks.tinystories", "TASK"),
}


def names() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return tuple(_HOMES)


def get(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ValueError: There is none; the message lists them and the nearest.
    """
    if name not in _HOMES:
        near = difflib.get_close_matches(name, _HOMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`task` must be one of {', '.join(_HOMES)}, got {name!r}.{hint}")
    module, attribute = _HOMES[name]
    task = getattr(importlib.import_module(module), attribute)
    assert isinstance(task, Task)
    return task
