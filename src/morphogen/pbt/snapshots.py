"""Parameters as bytes: one form for files, shared memory and the network. A file is named after its content.

Layout: that of safetensors, whose header holds everything that is not a tensor as JSON. Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from morphogen.errors import CheckpointError
from morphogen.state import Snapshot, trees

SUFFIX = ".safetensors"
_KEY, _SNAPSHOT = "morphogen", "snapshot of a run"
_CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_DAMAGED = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, OverflowError, SyntaxError)
"""What JSON, NumPy (its types are a small language) and torch raise of bytes that are not what they were."""
Chunk = bytes | memoryview


def to_bytes(values: Mapping[str, Any]) -> bytes:
    """Return ``values`` as bytes: a nest of plain data, tensors, arrays and :class:`~morphogen.state.Snapshot`.

    Raises:
        TypeError: There is something else in it.
    """
    return b"".join(to_chunks(values))


def from_bytes(content: bytes | bytearray, where: str = "the parcel") -> dict[str, Any]:
    """Return what :func:`to_bytes` was given; nothing aliases ``content``, unless it is a bytearray, which is then used up.

    Raises:
        CheckpointError: They are not such bytes.
    """
    own = content if isinstance(content, bytearray) else bytearray(content)
    try:
        start = 8 + int.from_bytes(own[:8], "little")
        header = json.loads(own[8:start])
        tree = json.loads(header.pop("__metadata__")[_KEY])
        tensors = {name: _tensor(own, start, entry) for name, entry in header.items()}
        return cast("dict[str, Any]", _revived(trees.decode(tree, tensors), tensors))
    except _DAMAGED as error:
        raise CheckpointError(f"{where}: is damaged: {error}. Use another snapshot.") from error


def write_snapshot(values: Mapping[str, Any], folder: str) -> tuple[str, int]:
    """Write ``values`` into ``folder``, in a file named after its SHA-256; returns that and its bytes.

    A file that is there already is not written again. There is never a half of one under its name.

    Raises:
        CheckpointError: The disk refused; ``folder`` is as it was.
    """
    return _write(to_chunks(values), folder)


def write_bytes(content: bytes, folder: str) -> tuple[str, int]:
    """Write what :func:`to_bytes` returned as :func:`write_snapshot` does; returns digest and bytes.

    Raises:
        CheckpointError: The disk refused; ``folder`` is as it was.
    """
    return _write([content], folder)


def _write(chunks: Sequence[Chunk], folder: str) -> tuple[str, int]:
    digesting, num_bytes = hashlib.sha256(), sum(len(chunk) for chunk in chunks)
    for chunk in chunks:
        digesting.update(chunk)
    digest = digesting.hexdigest()
    path = Path(folder) / (digest + SUFFIX)
    if path.exists():
        return digest, num_bytes
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}. Make room; what was there is whole.") from error
    return digest, num_bytes


def read_snapshot(folder: str, digest: str) -> dict[str, Any]:
    """Return what :func:`write_snapshot` wrote.

    Raises:
        CheckpointError: The file is missing, or its content is not what its name says.
    """
    path = Path(folder) / (digest + SUFFIX)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}. Use another snapshot.") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path}: its sha256 is not its name: damaged. Use another snapshot.")
    return from_bytes(content, str(path))


def to_chunks(values: Mapping[str, Any]) -> list[Chunk]:
    """Return what :func:`to_bytes` does in pieces, of which the large ones alias ``values``: it may be much."""
    tensors: dict[str, Tensor] = {}
    tree = trees.encode(_plain(values, tensors), tensors, "values", clone=False)
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(tree)}}
    data: list[Chunk] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda entry: -entry[1].element_size()):  # so that each is aligned
        flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))  # of one number the stride may be anything
        raw = flat.view(torch.uint8).numpy().data
        start, end = end, end + len(raw)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        data.append(raw)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *data]


def _tensor(content: bytearray, start: int, entry: Mapping[str, Any]) -> Tensor:
    """Return a tensor that aliases its place in ``content``."""
    shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
    first, end = entry["data_offsets"]
    if not 0 <= first <= end <= len(content) - start or end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor is not where the header says that it is")
    if first == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, offset=start + first, count=math.prod(shape)).reshape(shape)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` with each snapshot taken apart, its tensors entered as they are."""
    if isinstance(value, Snapshot):
        keys = [[f"{len(tensors)}", section, name] for section, name, _ in value.named_tensors()]
        tensors |= {"/".join(key): tensor for key, (_, _, tensor) in zip(keys, value.named_tensors(), strict=True)}
        return {_SNAPSHOT: {"keys": keys, "meta": json.dumps(value.meta)}}
    if isinstance(value, Mapping):
        return {key: _plain(item, tensors) for key, item in cast("Mapping[Any, Any]", value).items()}
    return value


def _revived(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return ``value`` with each snapshot put together again."""
    if not isinstance(value, dict):
        return value
    nest = cast("dict[Any, Any]", value)
    if _SNAPSHOT not in nest:
        return {key: _revived(item, tensors) for key, item in nest.items()}
    tables: dict[str, dict[str, Tensor]] = {}
    for number, section, name in nest[_SNAPSHOT]["keys"]:
        tables.setdefault(section, {})[name] = tensors[f"{number}/{section}/{name}"]
    return Snapshot(tables, tables.pop("loose", {}), json.loads(nest[_SNAPSHOT]["meta"]))
