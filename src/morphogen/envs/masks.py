"""Masks of N environments at once. Exact: a masked action cannot be executed, an unmasked one always can. Pure.

Legend: N environments, O ops, S places for slots, B places for blueprints, V alpha speeds, H choices of an action.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from morphogen.control import Op
from morphogen.envs.choices import (
    ALPHA_CURVES,
    ALPHA_SPEEDS_TICKS,
    ALPHA_TARGETS,
    HEADS,
    STYLES,
    TEMPOS_TICKS,
    Choices,
    Menu,
    action_config,
)
from morphogen.envs.frames import Frames
from morphogen.growth import Stage
from morphogen.growth.lifecycle import LIVE, NEXT_STAGE

BoolArray = NDArray[np.bool_]
_ADVANCING = tuple(NEXT_STAGE)
_HEADS = action_config().heads or ()


def possible_slots(frames: Frames) -> BoolArray:
    """Return on which slots each op is possible, mask_NOS; WAIT has the first, which it ignores."""
    mask_NOS = np.zeros((frames.num_envs, len(Op), frames.num_slots), dtype=bool)
    open_NS = frames.slot("gate_open") == 1.0
    mask_NOS[:, Op.WAIT, 0] = True
    mask_NOS[:, Op.GERMINATE] = frames.in_stage([Stage.DORMANT])
    mask_NOS[:, Op.ADVANCE] = frames.in_stage(_ADVANCING) & open_NS
    mask_NOS[:, Op.SET_ALPHA_TARGET] = frames.in_stage([Stage.BLENDING, Stage.HOLDING])
    mask_NOS[:, Op.PRUNE] = frames.in_stage(tuple(LIVE))
    mask_NOS[:, Op.FOSSILIZE] = frames.in_stage([Stage.HOLDING]) & open_NS
    return mask_NOS


def action_masks(frames: Frames, menu: Menu) -> dict[str, BoolArray]:
    """Return head -> which choices are possible, each ``[N, *sizes of the heads it hangs on, size]``.

    ``op`` [N, O]; ``slot`` [N, O, S], given the op; ``blueprint`` [N, S, B], given the slot; ``alpha_speed`` [N, O, V], given
    the op; all others [N, size].
    """
    num_envs, layout = frames.num_envs, menu.layout
    slot_NOS = possible_slots(frames)
    blueprint_NSB = np.zeros((num_envs, layout.num_slots, layout.num_blueprints), dtype=bool)
    blueprint_NSB[:, :, : len(menu.blueprints)] = True
    speed_NOV = np.ones((num_envs, len(Op), len(ALPHA_SPEEDS_TICKS)), dtype=bool)
    speed_NOV[:, Op.SET_ALPHA_TARGET, ALPHA_SPEEDS_TICKS.index(0)] = False
    return {
        "op": np.logical_or.reduce(slot_NOS, axis=2),
        "slot": slot_NOS,
        "blueprint": blueprint_NSB,
        "style": np.ones((num_envs, len(STYLES)), dtype=bool),
        "tempo": np.ones((num_envs, len(TEMPOS_TICKS)), dtype=bool),
        "alpha_target": np.ones((num_envs, len(ALPHA_TARGETS)), dtype=bool),
        "alpha_speed": speed_NOV,
        "alpha_curve": np.ones((num_envs, len(ALPHA_CURVES)), dtype=bool),
    }


def is_possible(choices_NH: NDArray[np.int64], frames: Frames, menu: Menu) -> BoolArray:
    """Return which of N actions, one for each environment, the masks allow, [N]; choices that do not matter may be any."""
    return _allowed(action_masks(frames, menu), choices_NH, np.arange(frames.num_envs))


def which_possible(choices_KH: NDArray[np.int64], masks: Mapping[str, BoolArray]) -> BoolArray:
    """Return which of K actions ``masks``, as :func:`action_masks` returns them, allow in each environment, [N, K]."""
    return _allowed(masks, choices_KH, slice(None))


def _allowed(masks: Mapping[str, BoolArray], choices_KH: NDArray[np.int64], rows: NDArray[np.int64] | slice) -> BoolArray:
    chosen = {head: choices_KH[:, place] for place, head in enumerate(HEADS)}
    possible = np.ones((), dtype=bool)
    for head in _HEADS:
        allowed = masks[head.name][(rows, *(chosen[name] for name in (*head.given, head.name)))]
        for name, needed in head.relevant_when.items():
            allowed = allowed | ~np.isin(chosen[name], needed)
        possible = possible & allowed
    return possible


def sample_choices(masks: Mapping[str, BoolArray], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return an action that ``masks`` allow for each environment, choices_NH: each head drawn uniformly, given those before.

    Args:
        masks: As :func:`action_masks` returns them, and ``info["action_mask"]`` has them.
        generator: Drawn from: eight times for each environment, one environment after the other.

    Example:
        >>> from morphogen.envs import GrowthVectorEnv
        >>> env = GrowthVectorEnv("digits", num_envs=2, total_steps=4, tick_steps=2)
        >>> observation, info = env.reset(seed=0)
        >>> actions = sample_choices(info["action_mask"], np.random.default_rng(0))
        >>> _ = env.step(actions)
        >>> env.close()
    """
    return np.array([_drawn({name: mask[row] for name, mask in masks.items()}, generator) for row in range(len(masks["op"]))])


def _drawn(masks: Mapping[str, BoolArray], generator: np.random.Generator) -> Choices:
    """Return choices_H under the masks of one environment."""
    chosen: dict[str, int] = {}
    for head in _HEADS:
        allowed = masks[head.name][tuple(chosen[name] for name in head.given)]
        chosen[head.name] = int(generator.choice(np.flatnonzero(allowed)))
    return np.array([chosen[head] for head in HEADS])
