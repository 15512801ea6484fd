"""Observations: frames as numbers in [-1, 1] or [0, 1], each group of them with a flag that says whether it is known. Pure.

Legend: N environments, S places for slots, G numbers of a run, R numbers of a slot, D numbers of an observation: those of the
run, then those of each slot, D = G + S * R.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from morphogen.envs.choices import Layout, Menu
from morphogen.envs.features import RUN_GROUPS, SLOT_GROUPS, Feature, Group, View
from morphogen.envs.frames import FloatArray, Frames
from morphogen.envs.rewards import Ledger

Bounds = tuple[FloatArray, FloatArray]


def observe(frames: Frames, ledger: Ledger, menu: Menu) -> NDArray[np.float32]:
    """Return the observations of N environments, [N, D].

    Every number is within the bounds of :func:`observation_space`, whatever the frames hold. A group of which anything is not
    known (NaN) is 0 throughout, its flag too; so is a slot that does not exist. No row depends on another.

    Args:
        frames: What is known of each run.
        ledger: What the reward remembers of it.
        menu: The places.
    """
    view = View(frames, ledger, menu.layout)
    with np.errstate(all="ignore"):
        run_NG = _numbers(RUN_GROUPS, view, (frames.num_envs,))
        slots_NSR = _numbers(SLOT_GROUPS, view, (frames.num_envs, frames.num_slots))
    slots_NSR *= slots_NSR[:, :, :1]  # "exists" comes first
    return np.concatenate([run_NG, slots_NSR.reshape(frames.num_envs, -1)], axis=1)


def observation_space(menu: Menu) -> Box:
    """Return the space of one observation: each number's own bounds."""
    low, high = (
        np.concatenate([run, np.tile(slot, menu.layout.num_slots)])
        for run, slot in zip(_all_bounds(RUN_GROUPS, menu.layout), _all_bounds(SLOT_GROUPS, menu.layout), strict=True)
    )
    return Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)


def feature_names(layout: Layout) -> tuple[str, ...]:
    """Return what each of the D numbers is called.

    Example:
        >>> feature_names(Layout(num_slots=1))[1], feature_names(Layout(num_slots=1))[-1]
        ('progress', 'slot 0: since_birth')
    """
    names = list(_names(RUN_GROUPS, layout))
    for place in range(layout.num_slots):
        names += [f"slot {place}: {name}" for name in _names(SLOT_GROUPS, layout)]
    return tuple(names)


def table() -> str:
    """Return every feature as a row of a Markdown table."""
    rows = ["| per | feature | numbers | range | meaning | unknown |", "|---|---|---|---|---|---|"]
    for per, groups in (("run", RUN_GROUPS), ("slot", SLOT_GROUPS)):
        for group in groups:
            rows.append(f"| {per} | `{group.flag}` | 1 | [0, 1] | {group.meaning} | |")
            rows += [_row(per, group, feature) for feature in group.features]
    return "\n".join(rows) + "\n"


# -- parts ------------------------------------------------------------------------------------------------------------


def _numbers(groups: Sequence[Group], view: View, shape: tuple[int, ...]) -> NDArray[np.float32]:
    blocks: list[FloatArray] = []
    for group in groups:
        values = np.concatenate([_parts(feature, view, shape) for feature in group.features], axis=-1)
        known = ~np.isnan(values).any(axis=-1, keepdims=True)
        low, high = _bounds(group, view.layout)
        blocks += [known.astype(float), np.where(known, np.clip(values, low, high), 0.0)]
    return np.concatenate(blocks, axis=-1).astype(np.float32)


def _parts(feature: Feature, view: View, shape: tuple[int, ...]) -> FloatArray:
    return feature.read(view).reshape(*shape, -1)


@functools.cache
def _bounds(group: Group, layout: Layout) -> Bounds:
    low = np.concatenate([np.full(len(feature.parts(layout)), feature.low) for feature in group.features])
    return low, np.ones_like(low)


def _all_bounds(groups: Sequence[Group], layout: Layout) -> Bounds:
    low = np.concatenate([np.append(0.0, _bounds(group, layout)[0]) for group in groups])
    return low, np.ones_like(low)


def _names(groups: Sequence[Group], layout: Layout) -> Sequence[str]:
    names: list[str] = []
    for group in groups:
        names.append(group.flag)
        names += [f"{feature.name} {part}".strip() for feature in group.features for part in feature.parts(layout)]
    return names


def _row(per: str, group: Group, feature: Feature) -> str:
    parts = feature.parts(Layout())
    several = parts != feature.parts(Layout(num_blueprints=1))
    numbers = "one for each blueprint" if several else f"{len(parts)}: {', '.join(parts)}" if len(parts) > 1 else "1"
    unknown = f"0, and `{group.flag}` is 0"
    return f"| {per} | `{feature.name}` | {numbers} | [{feature.low:g}, 1] | {feature.meaning} | {unknown} |"
