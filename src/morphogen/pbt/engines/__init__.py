"""Where members live: in this process, in worker processes, or on Ray.

To add an engine, write a class like those here and add a line to ``ENGINES``; ``morphogen.testing.engines`` then covers it.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from morphogen.pbt.config import PBTConfig
from morphogen.pbt.engines.base import Engine
from morphogen.pbt.member import Factory

ENGINES: Mapping[str, tuple[str, str]] = {
    "inline": ("morphogen.pbt.engines.inline", "InlineEngine"),
    "processes": ("morphogen.pbt.engines.processes", "ProcessesEngine"),
    "ray": ("morphogen.pbt.engines.ray", "RayEngine"),
}
"""Name -> module and class, imported when first asked for."""


def make(engine: str | Engine, factory: Factory, config: PBTConfig, options: Mapping[str, Any]) -> Engine:
    """Return an engine that makes members by ``factory``.

    Raises:
        ValueError: There is no such engine, it has no such option, or ``straggler_deadline`` would have no effect on it.
        MorphogenError: A package is missing; the message says which.
    """
    if isinstance(engine, str):
        if engine not in ENGINES:
            near = difflib.get_close_matches(engine, ENGINES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}.{hint}")
        module, name = ENGINES[engine]
        kind: Any = getattr(importlib.import_module(module), name)
        try:
            made: Engine = kind(factory, config.metric, **options)
        except TypeError as error:
            raise ValueError(f"`options` must be those of the engine {engine!r}, got {dict(options)}: {error}") from error
    else:
        made = engine
    if config.straggler_deadline is not None and not made.interruptible:
        made.close()
        raise ValueError(
            f'`straggler_deadline` must be left out with the engine "{made.name}": it cannot end a member that trains. '
            'Use the engine "processes".'
        )
    return made
