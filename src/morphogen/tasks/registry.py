"""The registry of tasks: one file and one row for each. A task's data package is imported when the task is asked for."""

from __future__ import annotations

import difflib
import importlib

from morphogen.tasks.base import Task

_HOMES = {
    "digits": "morphogen.tasks.digits",
    "mnist1d": "morphogen.tasks.mnist1d",
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
    task = importlib.import_module(_HOMES[name]).TASK
    assert isinstance(task, Task)
    return task
