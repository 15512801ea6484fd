"""What may change in a population that has begun."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping

from morphogen.telemetry.events import Json

CHANGEABLE = frozenset(
    {
        *("total_steps", "exploit_method", "truncation_ratio", "significance", "min_gap", "burn_in", "elite"),
        *("explore_method", "resample_probability", "explore_all"),
        *("ready_fraction", "straggler_deadline", "optimizer_exploit_strategy"),
    }
)
"""Settings of :class:`~morphogen.pbt.PBTConfig` on which nothing hangs that was done before."""


def differences(before: Mapping[str, Json], now: Mapping[str, Json], where: str = "") -> list[str]:
    """Return what differs between two configs as plain data, setting by setting.

    Example:
        >>> differences({"pbt": {"seed": 0}, "env": "A"}, {"pbt": {"seed": 1}, "env": "A"})
        ['pbt.seed: 0 -> 1']
    """
    found: list[str] = []
    for name in dict.fromkeys(itertools.chain(before, now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{where}{name}.")
        elif old != new and not (_is_nan(old) and _is_nan(new)):
            found.append(f"{where}{name}: {old!r} -> {new!r}")
    return found


def fixed_differences(before: Mapping[str, Json], now: Mapping[str, Json], intervals_done: int) -> list[str]:
    """Return those differences between two configs of a population with which it cannot go on.

    Args:
        before: The config it began with, as plain data.
        now: Another one.
        intervals_done: How many intervals somebody has behind it.

    Example:
        >>> fixed_differences({"seed": 0, "elite": 0}, {"seed": 1, "elite": 2}, 3)
        ['seed: 0 -> 1']
    """
    found = differences(_without(CHANGEABLE, before), _without(CHANGEABLE, now))
    old, new, interval = before.get("total_steps"), now.get("total_steps"), now.get("perturbation_interval")
    if isinstance(old, int) and isinstance(interval, int) and old != new and old % interval and intervals_done * interval > old:
        found.append(f"total_steps: {old} -> {new}, as the last interval was cut short")
    return found


def _without(names: Collection[str], config: Mapping[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in config.items() if name not in names}


def _is_nan(value: Json) -> bool:
    return isinstance(value, float) and math.isnan(value)
