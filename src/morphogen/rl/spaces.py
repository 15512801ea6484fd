"""Observations of any supported space as rows of float32.

Shape letters: N environments, D flat observation, W entries of one leaf of the space.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast, final

import numpy as np
from gymnasium import Space, spaces
from numpy.typing import NDArray

from morphogen.errors import EnvironmentFault

FloatArray: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]

MASK_KEY = "action_mask"  # of an observation, or of infos

_Path: TypeAlias = tuple[str | int, ...]
_Writer: TypeAlias = Callable[[FloatArray, NDArray[Any]], None]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One simple space within the observation, and the columns it fills."""

    path: _Path
    shape: tuple[int, ...]
    columns: slice
    write: _Writer
    normalizable: bool
    may_be_infinite: bool

    @property
    def name(self) -> str:
        return "observation" + "".join(f"[{key!r}]" for key in self.path)


@final
class ObservationEncoder:
    """Turns batches of observations into float32 rows of one width.

    A ``Box`` of any shape and dtype is flattened; a ``Discrete`` is one-hot, a ``MultiDiscrete`` one-hot entry by entry
    (both with their ``start``); a ``MultiBinary`` is 0 and 1; ``Dict`` and ``Tuple`` are laid side by side in the order of
    the space. The key "action_mask" of an outermost ``Dict`` is no observation but the mask of the actions, and is left out.
    Images keep their values 0 .. 255; channels come first in the row whatever their place in the space.

    Args:
        space: The observation space of a *single* environment.

    Attributes:
        width: D, the entries of a row.
        normalizable: Bool [D]; False for the entries of one-hot and binary values, which have their scale already.
        image_shape: (channels, height, width) where the observation is one image (a uint8 ``Box`` of rank 3, channels
            first or last), so that a row reshapes to it; else None.
        has_mask: Whether the observation holds the key "action_mask".

    Raises:
        TypeError: A space within ``space`` is not among those above.
        ValueError: Nothing is left to observe.

    Example:
        >>> encoder = ObservationEncoder(spaces.Dict(at=spaces.Discrete(3), speed=spaces.Box(-1, 1, (2,))))
        >>> encoder.encode({"at": np.array([2]), "speed": np.array([[0.5, -0.5]])})
        array([[ 0. ,  0. ,  1. ,  0.5, -0.5]], dtype=float32)
        >>> encoder.normalizable
        array([False, False, False,  True,  True])
    """

    def __init__(self, space: Space[Any]) -> None:
        self.has_mask = isinstance(space, spaces.Dict) and MASK_KEY in space.spaces
        simple = [(path, part) for path, part in _simple_spaces(space, ()) if path[:1] != (MASK_KEY,) or not self.has_mask]
        self.image_shape = _image_shape(simple[0][1]) if len(simple) == 1 else None
        self._leaves = tuple(_leaves(simple))
        self.width = self._leaves[-1].columns.stop if self._leaves else 0
        if self.width == 0:
            raise ValueError(f"`space` must hold at least one number to observe, got {space}. Observe something.")
        self.normalizable: BoolArray = np.concatenate(
            [np.full(leaf.columns.stop - leaf.columns.start, leaf.normalizable) for leaf in self._leaves]
        )
        self._check = any(leaf.may_be_infinite for leaf in self._leaves)
        self._only_flat = isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype == np.float32

    def encode(self, batch: Any) -> FloatArray:
        """Return a batch of observations, as vector environments give it, as new C-contiguous rows [N, D].

        Nothing of ``batch`` is aliased or changed.

        Raises:
            EnvironmentFault: Something in it is missing, of another shape, outside its space's choices, or not finite as
                float32; the message names the environment and the entry.
        """
        if self._only_flat:
            rows_ND = np.array(batch, dtype=np.float32, order="C")
            if rows_ND.ndim != 2 or rows_ND.shape[1] != self.width:
                raise EnvironmentFault(_shape_message(self._leaves[0], rows_ND.shape))
        else:
            arrays = [_get(batch, leaf) for leaf in self._leaves]
            rows_ND = np.empty((len(arrays[0]), self.width), dtype=np.float32)
            self._write(rows_ND, arrays, None)
        self._check_finite(rows_ND, None)
        return rows_ND

    def encode_rows(self, observations: Sequence[Any], envs: Sequence[int]) -> FloatArray:
        """Return observations of single environments as rows [n, D]; ``envs`` gives their indices for errors."""
        if self._only_flat:
            rows_ND = np.array(observations, dtype=np.float32)
            if rows_ND.shape[1:] != (self.width,):
                raise EnvironmentFault(_shape_message(self._leaves[0], rows_ND.shape))
            self._check_finite(rows_ND, envs)
            return rows_ND
        rows_ND = np.empty((len(observations), self.width), dtype=np.float32)
        for row, observation in enumerate(observations):
            arrays = [_get(observation, leaf, lead=()) for leaf in self._leaves]
            self._write(rows_ND[row : row + 1], [array[None] for array in arrays], envs[row : row + 1])
        self._check_finite(rows_ND, envs)
        return rows_ND

    def _write(self, rows_ND: FloatArray, arrays: list[NDArray[Any]], envs: Sequence[int] | None) -> None:
        for leaf, array in zip(self._leaves, arrays, strict=True):
            if len(array) != len(rows_ND):
                raise EnvironmentFault(_shape_message(leaf, array.shape))
            try:
                leaf.write(rows_ND[:, leaf.columns], array)
            except _OutOfRange as error:
                env = error.row if envs is None else envs[error.row]
                raise EnvironmentFault(f"environment {env}: `{leaf.name}` {error}. Repair the environment.", env) from None

    def _check_finite(self, rows_ND: FloatArray, envs: Sequence[int] | None) -> None:
        if not self._check:
            return
        finite_ND = np.isfinite(rows_ND)
        if np.count_nonzero(finite_ND) == rows_ND.size:  # cheaper than all()
            return
        row, column = (int(index) for index in np.argwhere(~finite_ND)[0])
        env = row if envs is None else envs[row]
        leaf = next(leaf for leaf in self._leaves if column < leaf.columns.stop)
        raise EnvironmentFault(
            f"environment {env}: entry {column - leaf.columns.start} of its {leaf.name} must be finite as float32, got "
            f"{rows_ND[row, column]}. Repair the environment, or clip what it returns.",
            env,
        )


class _OutOfRange(Exception):
    """A value that its space does not hold, in ``row`` of the batch."""

    def __init__(self, row: int, message: str) -> None:
        self.row = row
        super().__init__(message)


def _simple_spaces(space: Space[Any], path: _Path) -> Iterator[tuple[_Path, Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _simple_spaces(part, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _simple_spaces(part, (*path, index))
    else:
        yield path, space


def _leaves(simple: Iterable[tuple[_Path, Space[Any]]]) -> Iterator[_Leaf]:
    start = 0
    for path, space in simple:
        leaf = _leaf(path, space, start)
        start = leaf.columns.stop
        yield leaf


def _leaf(path: _Path, space: Space[Any], start: int) -> _Leaf:
    if isinstance(space, spaces.Box):
        floats = np.issubdtype(space.dtype, np.floating)
        columns = slice(start, start + math.prod(space.shape))
        return _Leaf(path, space.shape, columns, _box_writer(space), normalizable=True, may_be_infinite=floats)
    if isinstance(space, spaces.MultiBinary):
        columns = slice(start, start + math.prod(space.shape))
        return _Leaf(path, space.shape, columns, _write_binary, normalizable=False, may_be_infinite=False)
    if isinstance(space, spaces.Discrete):
        shape, sizes, first = (), np.array([space.n]), np.array([space.start])
    elif isinstance(space, spaces.MultiDiscrete):
        shape, sizes, first = space.nvec.shape, space.nvec.ravel(), np.asarray(space.start).ravel()
    else:
        raise TypeError(
            f"`observation_space` must be made of Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple, got {space}. "
            "Wrap the environment so that it observes one of these."
        )
    columns = slice(start, start + int(sizes.sum()))
    return _Leaf(path, shape, columns, _one_hot_writer(sizes, first), normalizable=False, may_be_infinite=False)


def _box_writer(space: spaces.Box) -> _Writer:
    channels_last = _channels_last(space)
    wide = np.issubdtype(space.dtype, np.floating) and space.dtype.itemsize > 4

    def write(rows_NW: FloatArray, array: NDArray[Any]) -> None:
        flat = (array.transpose(0, 3, 1, 2) if channels_last else array).reshape(rows_NW.shape)
        if wide:
            with np.errstate(over="ignore"):  # what overflows float32 is found by the check of all rows
                rows_NW[:] = flat
        else:
            rows_NW[:] = flat

    return write


def _write_binary(rows_NW: FloatArray, array: NDArray[Any]) -> None:
    flat = array.reshape(rows_NW.shape)
    wrong = (flat != 0) & (flat != 1)
    if wrong.any():
        row, column = (int(index) for index in np.argwhere(wrong)[0])
        raise _OutOfRange(row, f"must be 0 or 1, got {flat[row, column]} at entry {column}")
    rows_NW[:] = flat


def _one_hot_writer(sizes: NDArray[Any], first: NDArray[Any]) -> _Writer:
    offsets = np.cumsum(sizes) - sizes

    def write(rows_NW: FloatArray, array: NDArray[Any]) -> None:
        values = array.reshape(len(rows_NW), -1).astype(np.int64)
        wrong = (values < first) | (values >= first + sizes)
        if wrong.any():
            row, entry = (int(index) for index in np.argwhere(wrong)[0])
            low, high = int(first[entry]), int(first[entry] + sizes[entry] - 1)
            raise _OutOfRange(row, f"must be in {low} .. {high} at entry {entry}, got {values[row, entry]}")
        rows_NW[:] = 0.0
        np.put_along_axis(rows_NW, values - first + offsets, 1.0, axis=1)

    return write


def _channels_last(space: spaces.Box) -> bool:
    """Whether the space is an image with its channels, the smallest dimension, at the end."""
    if space.dtype != np.uint8 or len(space.shape) != 3:
        return False
    return space.shape[2] == min(space.shape)


def _image_shape(space: Space[Any]) -> tuple[int, int, int] | None:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return None
    first, second, third = space.shape
    if _channels_last(space):
        return third, first, second
    return (first, second, third) if first == min(space.shape) else None


def _get(observation: Any, leaf: _Leaf, lead: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Return the leaf's array; ``lead`` is the shape before that of the space, None for any one dimension."""
    value = observation
    for key in leaf.path:
        if isinstance(value, Mapping) and key not in value:
            raise EnvironmentFault(
                f"`{leaf.name}` must be in each observation, got only {list(cast('Any', value))}. Repair it."
            )
        value = cast("Any", value)[key]
    array = np.asarray(value)
    split = (1 if array.ndim else 0) if lead is None else len(lead)
    if array.shape[split:] != leaf.shape or (lead is None and array.ndim == 0):
        raise EnvironmentFault(_shape_message(leaf, array.shape))
    return array


def _shape_message(leaf: _Leaf, shape: tuple[int, ...]) -> str:
    return (
        f"`{leaf.name}` must have the shape {leaf.shape} for each environment, got {shape} in all. "
        "Return what the observation space of the environment declares."
    )
