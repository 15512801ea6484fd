"""Masks of factored actions, in NumPy: from any accepted form to one flat layout, and the check that nothing is stuck.

Shapes: N environments, M mask width (the layout of all tables of logits, one after the other), True where allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from morphogen.rl.actions.heads import Head


def flatten_mask(value: object, num_envs: int, heads: Sequence[Head]) -> NDArray[np.bool_]:
    """Return ``value`` as a bool array ``[num_envs, M]``.

    Args:
        value: A mapping head -> array ``[num_envs, *sizes of the heads it is given, size]`` (a head that is missing has
            everything allowed), or one array ``[num_envs, M]``: all tables flat, one after the other. Bool, or integers 0
            and 1.
        num_envs: N.
        heads: The heads of the action, in order.

    Returns:
        An array that may share memory with ``value`` where that is a bool array of the right shape already.

    Raises:
        ValueError: A shape, dtype or name is not as above; names the head and the shapes.
    """
    width = heads[-1].outputs.stop
    if not isinstance(value, Mapping):
        return _as_mask(value, (num_envs, width), "the action mask", _layout(heads))
    masks = cast("Mapping[str, object]", value)
    names = [head.name for head in heads]
    if not masks.keys() <= set(names):
        unknown = ", ".join(sorted(masks.keys() - set(names)))
        raise ValueError(f"the action mask must name heads among {', '.join(names)}, got {unknown}. Rename or remove it.")
    flat = np.ones((num_envs, width), np.bool_)
    for head in heads:
        if head.name in masks:
            hint = _axes(head, heads)
            table = _as_mask(masks[head.name], (num_envs, *head.shape), f"the action mask of head `{head.name}`", hint)
            flat[:, head.outputs] = table.reshape(num_envs, -1)
    return flat


def _as_mask(value: object, shape: tuple[int, ...], what: str, hint: str) -> NDArray[np.bool_]:
    mask: NDArray[Any] = np.asarray(value)
    if mask.shape != shape:
        raise ValueError(f"{what} must have shape {list(shape)} ({hint}), got {list(mask.shape)}. Reshape it.")
    if mask.dtype == np.bool_:
        return mask
    if mask.dtype.kind not in "iu" or ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"{what} must hold bools, or integers 0 and 1, got {mask.dtype}. Convert it with `mask.astype(bool)`.")
    return mask.astype(np.bool_)


def _layout(heads: Sequence[Head]) -> str:
    return "environments, " + " + ".join("x".join(map(str, head.shape)) for head in heads)


def _axes(head: Head, heads: Sequence[Head]) -> str:
    return ", ".join(["environments", *(heads[place].name for place in head.given), head.name])


def check_mask(mask_NM: NDArray[np.bool_], heads: Sequence[Head]) -> None:
    """Raise ValueError where a head that can become relevant has nothing allowed.

    Rows of choices that cannot be reached (since an earlier mask forbids them) and of irrelevant heads may be empty.

    Raises:
        ValueError: Names the environment, the head and the choices before it.
    """
    num_envs = mask_NM.shape[0]
    possible: list[NDArray[np.bool_]] = []  # of each head, [*context, size, N]: what it may take, relevant or not
    for head in heads:
        rows = mask_NM.T[head.columns.ravel() if head.is_shared else head.outputs]
        table = rows.reshape(-1, head.size, num_envs)
        stuck: NDArray[np.bool_] = np.logical_not(table.any(1))
        if head.relevant is not None:
            stuck &= head.relevant[:, None]
        if head.context and stuck.any():
            tables = [possible[place] for place in head.ancestors]
            stuck &= np.einsum(head.chances, *tables).reshape(-1, num_envs)
        if stuck.any():
            raise ValueError(_where(stuck, head, heads))
        possible.append(_possible(table, head).reshape(*head.context_shape, head.size, num_envs))


def _possible(table: NDArray[np.bool_], head: Head) -> NDArray[np.bool_]:
    """Return what a head can take: what is allowed, and its first allowed choice (else 0) where it is irrelevant."""
    if head.relevant is None:
        return table
    only_first = np.arange(head.size)[:, None] == table.argmax(1)[:, None, :]
    return np.where(head.relevant[:, None, None], table, only_first)


def _where(stuck: NDArray[np.bool_], head: Head, heads: Sequence[Head]) -> str:
    """Return the sentence for the first environment that is stuck at ``head``."""
    env, row = (int(index[0]) for index in stuck.T.nonzero())
    choices = np.unravel_index(row, head.context_shape) if head.context else ()
    after = ", ".join(f"{heads[place].name} {int(choice)}" for place, choice in zip(head.context, choices, strict=True))
    return (
        f"the action mask of environment {env} must allow at least one choice of head `{head.name}`"
        f"{f' after {after}' if after else ''}, got all False. Allow one, or forbid the choices that lead there."
    )
