"""The action masks of a vector environment, wherever it puts them.

Shape letters: N environments, M mask width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, cast, final

import numpy as np
from numpy.typing import NDArray

from morphogen.errors import EnvironmentFault
from morphogen.rl.spaces import MASK_KEY, BoolArray

MaskOf: TypeAlias = Callable[[Any, int], "BoolArray | None"]


@final
class MaskReader:
    """Finds the mask in what an environment gave and brings it into one layout.

    Whether there are masks is settled by the first reset; from then on each row that will be acted on must have one.

    Args:
        in_observation: Whether the observation space has the key "action_mask", which is used then; else ``infos`` are.
        mask_of: From (arrays of bool [N, ...] or a dict of such by head, N) to the mask [N, M]; None if no mask is taken.
            One that returns None leaves the masks of the environment unused on purpose.
        num_envs: N.
    """

    def __init__(self, in_observation: bool, mask_of: MaskOf | None, num_envs: int) -> None:
        self._mask_of = mask_of
        self._num_envs = num_envs
        self._in_observation = in_observation
        self.source: Literal["observation", "infos"] | None = None

    def settle(self, infos: Mapping[str, Any]) -> None:
        """Find out at a reset whether the environment gives masks.

        Raises:
            ValueError: It does, and the actions take none.
        """
        self.source = "observation" if self._in_observation else "infos" if MASK_KEY in infos else None
        if self.source is not None and self._mask_of is None:
            raise ValueError(
                f"`{MASK_KEY}` must not be in the {self.source} of an environment whose actions take no mask. Mask discrete "
                "actions only, or leave the key out."
            )

    def read(self, batch: Any, infos: Mapping[str, Any], needed_N: BoolArray | None = None) -> BoolArray | None:
        """Return the masks [N, M] as a new array, or None if the environment has none.

        Rows outside ``needed_N`` (None: all are needed) may be missing and come out all True: their action is ignored.

        Raises:
            EnvironmentFault: A needed row has no mask.
        """
        if self.source is None:
            if MASK_KEY in infos:
                raise EnvironmentFault(
                    f"`{MASK_KEY}` must be in the infos of reset if it is in those of step, got it in step alone. "
                    "Return it from both."
                )
            return None
        holder = batch if self.source == "observation" else infos
        value = _value(holder, self._num_envs, needed_N)
        assert self._mask_of is not None
        mask_NM = self._mask_of(value, self._num_envs)
        if mask_NM is None:
            return None
        mask_NM = np.array(mask_NM, dtype=bool)
        if needed_N is not None:
            mask_NM[~needed_N] = True
        return mask_NM


def _value(holder: Mapping[str, Any], num_envs: int, needed_N: BoolArray | None) -> Any:
    if MASK_KEY not in holder:
        _require(np.zeros(num_envs, dtype=bool), needed_N)
        raise EnvironmentFault(f"`{MASK_KEY}` must be given on every step, got none. Return it from step and reset.")
    present_N = holder.get(f"_{MASK_KEY}") if MASK_KEY in holder else None
    if present_N is not None:
        _require(np.asarray(present_N, dtype=bool), needed_N)
    value = holder[MASK_KEY]
    if isinstance(value, Mapping):
        heads = cast("Mapping[str, Any]", value)
        return {name: _array(heads[name], heads.get(f"_{name}")) for name in heads if not _is_presence(name, heads)}
    return _array(value, present_N, needed_N)


def _is_presence(name: str, heads: Mapping[str, Any]) -> bool:
    """Whether this entry is Gymnasium's note of who has another one."""
    return name.startswith("_") and name[1:] in heads


def _require(present_N: BoolArray, needed_N: BoolArray | None) -> None:
    missing = np.flatnonzero(~present_N if needed_N is None else needed_N & ~present_N)
    if len(missing):
        env = int(missing[0])
        raise EnvironmentFault(
            f"environment {env}: `{MASK_KEY}` must be given on every step, got none. Return it from step and reset.", env
        )


def _array(value: Any, present_N: Any = None, needed_N: BoolArray | None = None) -> BoolArray:
    """Return ``value`` [N, ...] as a new array of bool; rows that are absent are all True."""
    array = np.asarray(value)
    if array.dtype == object:
        present_N = np.array([item is not None for item in array])
        _require(present_N, needed_N)
        template = np.asarray(array[present_N][0])
        array = np.stack([np.ones_like(template) if item is None else np.asarray(item) for item in array])
    mask = _as_bool(array)
    if present_N is not None:
        mask[~np.asarray(present_N, dtype=bool)] = True
    return mask


def _as_bool(array: NDArray[Any]) -> BoolArray:
    mask = array.astype(bool)
    if array.dtype != bool:
        wrong = np.argwhere(array != mask)
        if len(wrong):
            env = int(wrong[0][0])
            raise EnvironmentFault(
                f"environment {env}: `{MASK_KEY}` must hold 0 and 1 alone, got {array[tuple(wrong[0])]}. Return booleans.", env
            )
    return mask
