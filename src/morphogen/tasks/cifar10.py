"""CIFAR-10: 60,000 colour images, 32x32, in ten classes; four hosts, from one that sees colours alone to a deep one.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from morphogen.errors import DataError
from morphogen.growth import GrowthPoint, Sowing
from morphogen.tasks import tables
from morphogen.tasks.base import Task
from morphogen.tasks.data import Split, TaskData, stratified_split
from morphogen.tasks.hosts import ConvHost
from morphogen.tasks.sources import Source

_ARCHIVE, _ARCHIVE_MD5 = "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
_DIRECTORY = "cifar-10-batches-bin"
_TEST_FILE = "test_batch.bin"
_IMAGE = (3, 32, 32)
_RECORD_BYTES = 1 + 3 * 32 * 32
_SPLIT_SEED = 20_270_104

SOURCE = Source(
    name="cifar10",
    layouts=(
        (_ARCHIVE,),
        (f"{_DIRECTORY}/data_batch_*.bin", f"{_DIRECTORY}/{_TEST_FILE}"),
        ("data_batch_*.bin", _TEST_FILE),
        *tables.layouts("train", "test"),
    ),
    how_to_get=(
        f"Put https://www.cs.toronto.edu/~kriz/{_ARCHIVE}, or a copy of the Hugging Face data set uoft-cs/cifar10, into "
        "$MORPHOGEN_DATA/cifar10."
    ),
)

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def load(path: Path | None = None) -> TaskData:
    """Images of shape (3, 32, 32), float32, each channel standardised with mean and deviation of all its training pixels.

    A tenth of the published training examples forms the decision split; the published test examples are the test split.

    Args:
        path: Directory of the published binary archive (its checksum is verified), of its files, or of a Hugging Face data
            set in parquet or arrow; None to look in $MORPHOGEN_DATA (or else the user's cache) and in the platform's
            directory of data sets.

    Returns:
        45,000 train, 5,000 decision and 10,000 test examples of 10 classes, on the CPU; the same at every call.

    Raises:
        DataError: The files are missing or damaged.
    """
    directory = SOURCE.require(path)
    if tables.files(directory, "train"):
        (images, labels), (test_images, test_labels) = (_from_tables(directory, split) for split in ("train", "test"))
    else:
        (images, labels), (test_images, test_labels) = _from_binary(directory)
    classes = int(labels.max()) + 1
    absent = np.setdiff1d(np.append(np.arange(classes), test_labels), labels)
    if len(absent):
        raise DataError(f"{directory}: must have training images of all classes, has none of {absent.tolist()}. Get it again.")
    parts = stratified_split(labels, (len(labels) - len(labels) // 10, len(labels) // 10), _SPLIT_SEED)
    mean, deviation = channel_scale(images[parts[0]])
    train, decision = (_split(images[part], labels[part], mean, deviation) for part in parts)
    return TaskData(train, decision, _split(test_images, test_labels, mean, deviation), num_classes=classes)


def channel_scale(images: Images) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel of (N, C, H, W), float32, shaped (C, 1, 1)."""
    counts = np.stack([np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(images.shape[1])])
    levels, total = np.arange(256.0), counts.sum(1)
    mean = counts @ levels / total
    deviation = np.sqrt(counts @ levels**2 / total - mean**2)
    return _per_channel(mean), _per_channel(deviation)


def _per_channel(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, 1, 1)


def _split(images: Images, labels: Labels, mean: Tensor, deviation: Tensor) -> Split:
    inputs = torch.from_numpy(images.astype(np.float32)).sub_(mean).div_(deviation)
    return Split(inputs, torch.from_numpy(labels))


def _from_binary(directory: Path) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    if (directory / _ARCHIVE).exists():
        files = _unpacked(directory / _ARCHIVE)
    else:
        inner = directory / _DIRECTORY if (directory / _DIRECTORY).is_dir() else directory
        files = {path: path.read_bytes() for path in sorted(inner.glob("*.bin"))}
    train = [_records(path, content) for path, content in files.items() if path.name != _TEST_FILE]
    test = [_records(path, content) for path, content in files.items() if path.name == _TEST_FILE]
    if not train or not test:
        raise DataError(f"{directory}: must hold data_batch_1.bin, ... and {_TEST_FILE}, and does not. Get it again.")
    images, labels = zip(*train, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), test[0]


def _unpacked(archive: Path) -> dict[Path, bytes]:
    """Return the records' files in the published archive, by name; nothing is written."""
    content = archive.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != _ARCHIVE_MD5:
        raise DataError(f"{archive}: must have the published MD5 {_ARCHIVE_MD5}, has {found}. Get the file again.")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive_file:
        files = {PurePosixPath(member.name): archive_file.extractfile(member) for member in archive_file if member.isfile()}
        return {archive / name.name: file.read() for name, file in sorted(files.items()) if file and name.suffix == ".bin"}


def _records(path: Path, content: bytes) -> tuple[Images, Labels]:
    """Return images and labels of one file: records of a label byte and the red, green and blue plane."""
    if not content or len(content) % _RECORD_BYTES:
        raise DataError(
            f"{path}: must hold whole records of {_RECORD_BYTES} bytes, has {len(content):,} bytes: it is cut off or damaged. "
            "Get the file again."
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD_BYTES)
    return records[:, 1:].reshape(-1, *_IMAGE), records[:, 0].astype(np.int64)


def _from_tables(directory: Path, split: str) -> tuple[Images, Labels]:
    images: list[Images] = []
    labels: list[int] = []
    for image, label in tables.rows(directory, split, ("img", "label")):
        images.append(tables.decode_image(directory, image["bytes"]).transpose(2, 0, 1))
        labels.append(label)
        if images[-1].shape != _IMAGE:
            raise DataError(f"{directory}: must hold images of shape {_IMAGE}, holds one of {images[-1].shape}. Get it again.")
    return np.stack(images), np.array(labels, dtype=np.int64)


_CONV = Sowing(blueprint="conv3x3", options={"expansion": 4}, blend_ticks=3)


def _task(name: str, summary: str, widths: tuple[int, ...], *, kernel: int = 3, num_pools: int | None = None) -> Task:
    points = tuple(f"block{number}" for number in range(1, len(widths) + 1))

    def make_host(data: TaskData) -> nn.Sequential:
        pools = len(widths) if num_pools is None else num_pools
        return ConvHost(widths, data.num_classes, in_channels=_IMAGE[0], kernels=kernel, num_pools=pools)

    return Task(
        name=name,
        summary=f"CIFAR-10, 32x32 colour images of ten classes; {summary}",
        load=load,
        make_host=make_host,
        points={point: GrowthPoint(point) for point in points},
        blueprints=(
            _CONV,
            Sowing(blueprint="mlp", options={"expansion": 4}, blend_ticks=3),
            Sowing(blueprint="squeeze_excite", blend_ticks=3),
            Sowing(blueprint="depthwise", blend_ticks=3),
        ),
        reference=dict.fromkeys(points, _CONV),
        batch_size=128,
        total_steps=7000,
        tick_steps=175,
        learning_rate=1e-2,
        weight_decay=1e-2,
        source=SOURCE,
    )


TASK = _task("cifar10", "a host of three convolutions", (8, 16, 32))
IMPAIRED = _task("cifar10_impaired", "a host of three 1x1 convolutions behind a single channel", (1, 2, 4), kernel=1)
DEEP = _task("cifar10_deep", "a host of five convolutions", (8, 16, 32, 64, 128))
MINIMAL = _task("cifar10_minimal", "a host that sees single pixels", (2, 4, 8), kernel=1, num_pools=0)
