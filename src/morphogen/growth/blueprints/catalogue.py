"""The table of all blueprints, for the documentation."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from morphogen.growth.blueprints import registry
from morphogen.growth.blueprints.registry import Blueprint

_WIDTH = 64


def table() -> str:
    """Return every registered blueprint as a row of a markdown table: name, layouts, options, size at width 64, summary.

    Example:
        >>> print(table().splitlines()[0])
        | blueprint | layouts | options | parameters at width 64 | computes |
    """
    head = f"| blueprint | layouts | options | parameters at width {_WIDTH} | computes |\n|---|---|---|---|---|"
    rows = registry._ROWS  # pyright: ignore[reportPrivateUsage]  # `names` leaves out those built from the host's layers
    return "\n".join([head, *(_row(rows[name]) for name in sorted(rows))]) + "\n"


def _row(row: Blueprint) -> str:
    summary = row.summary.replace("|", "\\|")
    return f"| `{row.name}` | {', '.join(row.layouts)} | {_options(row)} | {_sizes(row)} | {summary} |"


def _options(row: Blueprint) -> str:
    defaults: dict[str, Any] = {name: value.default for name, value in inspect.signature(row.module).parameters.items()}
    if row.from_host:
        defaults = {field.name: field.default for field in dataclasses.fields(row.module.Options)}
    return ", ".join(f"`{name}={defaults[name]!r}`" for name in row.options) or "none"


def _sizes(row: Blueprint) -> str:
    """Return the number of parameters, or one for each group of layouts if it depends on the layout."""
    if row.from_host:
        return "by the host's layers"
    layouts: dict[int, list[str]] = {}
    for layout in row.layouts:
        layouts.setdefault(row.parameter_count(_WIDTH, layout), []).append(layout)
    if len(layouts) == 1:
        return f"{next(iter(layouts)):,}"
    return ", ".join(f"{count:,} ({', '.join(group)})" for count, group in layouts.items())
