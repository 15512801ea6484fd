"""Parameters as bytes: what goes in comes out, and bytes that were damaged are told as such, whatever the damage."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from morphogen.errors import CheckpointError
from morphogen.pbt.snapshots import _CODES, SUFFIX, from_bytes, read_snapshot, to_bytes, to_chunks, write_snapshot
from morphogen.state import Snapshot, TrainingState, draw_from

ARRAYS = {
    "turned, big-endian": np.arange(6, dtype=">i4").reshape(3, 2).T,
    "empty": np.zeros((0, 2)),
    "of no dimension": np.array(True),
    "complex": np.array([1 + 2j]),
    "read-only": np.frombuffer(b"abcdefgh", dtype=np.int32),
}
TENSORS = {
    **{str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in _CODES},
    "turned": torch.arange(6).reshape(2, 3).t(),
    "empty": torch.empty(0, 3),
    "of no dimension": torch.tensor(3.5),
    "parameter": nn.Parameter(torch.ones(2)),
}
TREE: dict[str, Any] = {
    "arrays": ARRAYS,
    "tensors": TENSORS,
    "plain": (1, 2.5, None, float("inf"), "\u00e9", [True, {"a": 2}]),
    "twice": [TENSORS["turned"], TENSORS["turned"]],
}


def same(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def test_every_kind_of_value_comes_back_as_it_was() -> None:
    found = from_bytes(to_bytes(TREE))
    assert [name for name, tensor in TENSORS.items() if not same(found["tensors"][name], tensor)] == []
    for name, array in ARRAYS.items():
        again = found["arrays"][name]
        assert np.array_equal(again, array) and (again.dtype, again.shape) == (array.dtype, array.shape)
        assert again.flags.writeable
    assert found["plain"] == TREE["plain"] and same(found["twice"][1], TENSORS["turned"])
    assert to_bytes(found) == to_bytes(TREE)


def test_it_is_a_file_that_others_read() -> None:
    found = safetensors.torch.load(to_bytes({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int8)}))
    assert sorted((str(tensor.dtype), tensor.tolist()) for tensor in found.values()) == [
        ("torch.float32", [0.0, 1.0, 2.0]),
        ("torch.int8", [1, 1]),
    ]


def test_a_snapshot_of_a_run_comes_back_and_goes_into_another_run() -> None:
    def state(seed: int) -> TrainingState:
        with draw_from(torch.Generator().manual_seed(seed)):
            model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return TrainingState(model, optimizer, extras={"data": torch.Generator().manual_seed(seed)})

    one, other = state(1), state(2)
    snapshot = one.capture()
    found = from_bytes(to_bytes({"snapshot": snapshot, "nested": [{"n": 1}]}))
    assert isinstance(found["snapshot"], Snapshot) and found["snapshot"].meta == snapshot.meta
    assert found["snapshot"].checksum() == snapshot.checksum() and found["nested"] == [{"n": 1}]
    other.restore(found["snapshot"])
    assert other.capture().checksum() == snapshot.checksum()


def test_nothing_is_shared() -> None:
    tensor, array = torch.zeros(3), np.zeros(3)
    content = to_bytes({"tensor": tensor, "array": array})
    first, second = from_bytes(content), from_bytes(content)
    first["tensor"] += 1
    first["array"] += 1
    assert not tensor.any() and not array.any() and not second["tensor"].any() and not second["array"].any()
    assert content == to_bytes({"tensor": tensor, "array": array})


def test_pieces_alias_what_is_large() -> None:
    tensor = torch.zeros(1000)
    chunks = to_chunks({"tensor": tensor})
    assert b"".join(chunks) == to_bytes({"tensor": tensor})
    tensor[0] = 1.0
    assert b"".join(chunks) == to_bytes({"tensor": tensor})


@pytest.mark.parametrize("what", [object(), lambda: None, np.array([object()])], ids=["object", "function", "array"])
def test_what_is_no_data_is_refused(what: object) -> None:
    with pytest.raises(TypeError, match="values.x"):
        to_bytes({"x": what})


def test_bytes_that_were_cut_or_flipped_are_an_error_of_ours_or_other_values_and_run_nothing() -> None:
    content, chance, errors = to_bytes(TREE), random.Random(0), 0
    for number in range(1500):
        damaged = bytearray(content)
        if number % 3 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        try:
            from_bytes(bytes(damaged))
        except CheckpointError as error:
            errors += 1
            assert "the parcel: is damaged" in str(error)
    assert errors > 1000


def test_a_file_is_named_after_its_content_and_written_once(tmp_path: Path) -> None:
    digest, num_bytes = write_snapshot(TREE, str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.name == digest + SUFFIX and file.stat().st_size == num_bytes
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest and file.read_bytes() == to_bytes(TREE)
    before = file.stat()
    assert write_snapshot(TREE, str(tmp_path)) == (digest, num_bytes)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert to_bytes(read_snapshot(str(tmp_path), digest)) == to_bytes(TREE)


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "empty"])
def test_a_damaged_file_is_not_read(tmp_path: Path, damage: str) -> None:
    digest, _ = write_snapshot({"x": torch.ones(100)}, str(tmp_path))
    file = tmp_path / (digest + SUFFIX)
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    damaged = {"cut": content[:-7], "flipped": content, "empty": b""}
    file.unlink() if damage == "gone" else file.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="Use another snapshot"):
        read_snapshot(str(tmp_path), digest)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_snapshot(TREE, str(tmp_path / "missing"))
    assert [*tmp_path.iterdir()] == []
