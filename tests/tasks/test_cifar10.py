"""CIFAR-10's loader, on small files in the published formats."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphogen.errors import DataError
from morphogen.tasks import Task, TaskData, cifar10


def same(first: TaskData, second: TaskData) -> bool:
    pairs = zip(first.splits().values(), second.splits().values(), strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)


@pytest.fixture
def binary(tmp_path: Path, made: Any) -> Path:
    return made.cifar_files(tmp_path / "binary")


@pytest.fixture
def raw(binary: Path) -> np.ndarray:
    """All training records, in the order of the files."""
    content = b"".join((binary / f"data_batch_{number}.bin").read_bytes() for number in range(1, 6))
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)


def test_binary_files(binary: Path, raw: np.ndarray) -> None:
    found = cifar10.load(binary)
    assert [len(split) for split in found.splits().values()] == [180, 20, 24]
    assert found.num_classes == 4
    assert found.train.inputs.shape[1:] == (3, 32, 32)
    seen = torch.cat([found.train.targets, found.decision.targets]).bincount()
    assert seen.tolist() == np.bincount(raw[:, 0]).tolist()
    assert found.decision.targets.bincount().tolist() == [5] * 4


def test_channels_are_standardised_by_what_the_training_may_see(binary: Path) -> None:
    found = cifar10.load(binary)
    assert found.train.inputs.mean((0, 2, 3)).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert found.train.inputs.std((0, 2, 3), correction=0).tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    assert found.test.inputs.mean().abs() > 1e-4
    test = np.frombuffer((binary / "test_batch.bin").read_bytes(), dtype=np.uint8).reshape(-1, 3073)[:, 1:]
    for channel in range(3):  # red, green and blue plane stay in their order and their places
        plane = torch.from_numpy(test[:, 1024 * channel : 1024 * (channel + 1)].astype(np.float32))
        ours = found.test.inputs[:, channel].flatten(1)
        slope = (ours[0, 1] - ours[0, 0]) / (plane[0, 1] - plane[0, 0])
        torch.testing.assert_close(ours - ours[0, 0], (plane - plane[0, 0]) * slope, atol=1e-4, rtol=1e-4)


def test_scale_is_exact(generator: torch.Generator) -> None:
    images = torch.randint(256, (7, 3, 4, 5), generator=generator).numpy().astype(np.uint8)
    mean, deviation = cifar10.channel_scale(images)
    assert mean.flatten().tolist() == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert deviation.flatten().tolist() == pytest.approx(images.std((0, 2, 3)).tolist())


def test_the_archives_own_directory_will_do(binary: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    binary.rename(outer / "cifar-10-batches-bin")
    assert cifar10.SOURCE.require(outer) == outer
    assert len(cifar10.load(outer).train) == 180


def test_the_archive_is_read_whole_and_checked(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "packed"
    place.mkdir()
    archive = place / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(binary.iterdir()):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{path.name}")
            member.size = path.stat().st_size
            file.addfile(member, io.BytesIO(path.read_bytes()))
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz: must have the published MD5 c32a1d4ab5d0"):
        cifar10.load(place)
    monkeypatch.setattr(cifar10, "_ARCHIVE_MD5", cifar10.hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest())
    assert same(cifar10.load(place), cifar10.load(binary))


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_a_damaged_file_is_named(name: str, change: Callable[[bytes], bytes], binary: Path) -> None:
    (binary / name).write_bytes(change((binary / name).read_bytes()))
    with pytest.raises(DataError, match=f"{name}: must hold whole records of 3073 bytes"):
        cifar10.load(binary)


def test_classes_that_are_only_tested_are_refused(binary: Path, made: Any) -> None:
    (binary / "test_batch.bin").write_bytes(made.cifar_records(24, 1, classes=6))
    with pytest.raises(DataError, match=r"must have training images of all classes, has none of \[4, 5\]"):
        cifar10.load(binary)


@pytest.mark.parametrize("kind", ["parquet", "nested parquet", "arrow"])
def test_a_hugging_face_data_set_is_the_same_data(kind: str, binary: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    image = pytest.importorskip("PIL.Image")
    place = tmp_path / "hugging"
    for split, pattern in (("train", "data_batch_*.bin"), ("test", "test_batch.bin")):
        content = b"".join(path.read_bytes() for path in sorted(binary.glob(pattern)))
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3073)
        pictures = [image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)) for record in records]
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict({"img": pictures, "label": records[:, 0].tolist()}, features=features)
        if kind == "arrow":
            table.save_to_disk(place / split)
        else:
            inner = place / "plain_text" if kind.startswith("nested") else place
            inner.mkdir(parents=True, exist_ok=True)
            table.to_parquet(inner / f"{split}-00000-of-00001.parquet")
    assert same(cifar10.load(place), cifar10.load(binary))
    damaged = next(path for path in sorted(place.rglob("train*")) if path.is_file()) if kind != "arrow" else None
    damaged = damaged or next((place / "train").glob("*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(DataError, match=damaged.name):
        cifar10.load(place)


@pytest.mark.parametrize(
    ("name", "parameters", "points"),
    [("cifar10", 6418, 3), ("cifar10_impaired", 77, 3), ("cifar10_deep", 99_922, 5), ("cifar10_minimal", 164, 3)],
)
def test_hosts_have_the_reference_sizes(name: str, parameters: int, points: int, task_named: Callable[[str], Task]) -> None:
    task = task_named(name)
    ten_classes = TaskData(*task.load().splits().values(), num_classes=10)
    host = task.make_host(ten_classes)
    assert sum(parameter.numel() for parameter in host.parameters()) == parameters
    assert len(task.points) == points
    assert task.loss(host(ten_classes.test.inputs), ten_classes.test.targets).isfinite()
