"""Nested state as strict JSON plus a table of tensors, and back: one codec for snapshots, checkpoints and topologies.

``state_dict()`` of schedulers, scalers and normalisers returns nests of dicts, lists, tuples, numbers, arrays and
tensors. :func:`encode` turns such a nest into data that ``json`` writes and reads back exactly, and moves the tensors
into a table. No object is ever built from a name found in the data, so decoding cannot run code.
"""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from morphogen.telemetry.events import Json

TensorTable: TypeAlias = dict[str, Tensor]
_Bulk: TypeAlias = "Tensor | np.ndarray[Any, Any] | np.generic | bytes"

_TAG = "$"  # a dict with this key is a tagged value; user dicts that hold it are themselves tagged


def encode(tree: object, tensors: TensorTable, path: str, *, clone: bool = True) -> Json:
    """Return ``tree`` as JSON data; each tensor or array in it is entered into ``tensors`` under a name below ``path``.

    Args:
        tree: None, bool, int, float, str, bytes, NumPy scalars, tensors, arrays, and dicts (keys: any of these but
            tensors), lists, tuples, deques and Counters of these.
        tensors: Table that receives the tensors.
        path: Where in the whole state this tree sits; used for tensor names and in errors.
        clone: False lets the table alias the tree, for a caller that reads it at once.

    Raises:
        TypeError: Something else is in the tree (a function, a custom object).
    """
    if tree is None or isinstance(tree, bool | str):
        return tree
    if isinstance(tree, Tensor | np.ndarray | np.generic | bytes):
        return _encode_bulk(cast("_Bulk", tree), tensors, path, clone)
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {_TAG: "float", "value": str(tree)}
    return _encode_container(tree, tensors, path, clone)


def _encode_bulk(value: _Bulk, tensors: TensorTable, path: str, clone: bool) -> Json:
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Tensor):
        return {_TAG: "tensor", "name": _enter(value.detach().clone() if clone else value.detach(), tensors, path)}
    if value.dtype.hasobject or value.dtype.names:
        raise TypeError(f"`{path}` must be an array of numbers, got one of {value.dtype}. Convert it to numbers.")
    if isinstance(value, np.generic):
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {_TAG: "numpy", "dtype": value.dtype.str, "value": data}
    raw = torch.from_numpy(_raw_bytes(value, clone)) if value.nbytes else torch.empty(0)
    name = _enter(raw, tensors, path)
    return {_TAG: "array", "name": name, "dtype": value.dtype.str, "shape": list(value.shape)}


def _raw_bytes(array: np.ndarray[Any, Any], clone: bool) -> np.ndarray[Any, Any]:
    """Return the bytes of ``array`` in the order of its indices, in memory that may be written to."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return raw.copy() if clone or not raw.flags.writeable else raw


def _enter(tensor: Tensor, tensors: TensorTable, path: str) -> str:
    """Put ``tensor`` into the table and return its name; keys with dots may spell a path that is taken."""
    name = path if path not in tensors else f"{path}#{len(tensors)}"
    tensors[name] = tensor
    return name


def _encode_container(tree: object, tensors: TensorTable, path: str, clone: bool) -> Json:
    if isinstance(tree, Mapping):
        mapping = cast("Mapping[Any, object]", tree)
        counts = isinstance(tree, collections.Counter)
        if not counts and _TAG not in mapping and all(isinstance(key, str) for key in mapping):
            return {key: encode(value, tensors, f"{path}.{key}", clone=clone) for key, value in mapping.items()}
        pairs: list[Json] = [
            [encode(key, tensors, f"{path}.key{index}"), encode(value, tensors, f"{path}.{index}", clone=clone)]
            for index, (key, value) in enumerate(mapping.items())
        ]
        return {_TAG: "counter" if counts else "dict", "items": pairs}
    if isinstance(tree, list | tuple | collections.deque):
        sequence = cast("list[Any]", tree)
        if set(map(type, sequence)) <= {int}:  # the state of a generator has 624 of them
            items: list[Json] = list(sequence)
        else:
            items = [encode(item, tensors, f"{path}.{index}", clone=clone) for index, item in enumerate(sequence)]
        if isinstance(tree, list):
            return items
        if isinstance(tree, collections.deque):
            return {_TAG: "deque", "items": items, "maxlen": tree.maxlen}
        return {_TAG: "tuple", "items": items}
    raise TypeError(
        f"`{path}` must be made of numbers, text, tensors, arrays, dicts and lists, got {type(tree).__name__}. "
        "Leave it out of the state, or give its owner a `state_dict` that returns plain data."
    )


def decode(data: Json, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that :func:`encode` was given; tensors come back as fresh clones, so nothing is aliased.

    Raises:
        ValueError: ``data`` is not what :func:`encode` writes, or names a tensor that ``tensors`` lacks.
    """
    if isinstance(data, list):
        return [decode(item, tensors) if type(item) in (dict, list) else item for item in data]
    if not isinstance(data, dict):
        return data
    if _TAG not in data:
        return {key: decode(value, tensors) for key, value in data.items()}
    return _decode_tagged(cast("dict[str, Any]", data), tensors)


def _decode_tagged(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> object:
    tag = data[_TAG]
    if tag in ("tensor", "array"):
        return _decode_tensor(data, tensors)
    if tag in _SCALARS:
        return _SCALARS[tag](data)
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](cast("list[Any]", decode(data["items"], tensors)), data)
    raise ValueError(f"state data has the unknown tag {tag!r}. It was written by another version of morphogen.")


def _decode_tensor(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> object:
    if data["name"] not in tensors:
        raise ValueError(f"state data names the tensor `{data['name']}`, which is missing from its table.")
    tensor = tensors[data["name"]]
    if data[_TAG] == "tensor":
        return tensor.detach().clone()
    raw = tensor.detach().cpu().contiguous().numpy().view(np.uint8)
    return raw.view(np.dtype(data["dtype"])).reshape(data["shape"]).copy()


_SCALARS: dict[str, Callable[[dict[str, Any]], object]] = {
    "float": lambda data: float(data["value"]),
    "bytes": lambda data: base64.b64decode(data["value"]),
    "numpy": lambda data: np.frombuffer(base64.b64decode(data["value"]), dtype=np.dtype(data["dtype"]))[0],
}
_COLLECTIONS: dict[str, Callable[[list[Any], dict[str, Any]], object]] = {
    "dict": lambda items, data: dict(items),
    "counter": lambda items, data: collections.Counter(dict(items)),
    "tuple": lambda items, data: tuple(items),
    "deque": lambda items, data: collections.deque(items, maxlen=data["maxlen"]),
}
