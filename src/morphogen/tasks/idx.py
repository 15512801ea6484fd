"""Images and labels in the idx format of MNIST: four gzip files, as published or packed anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from morphogen.errors import DataError
from morphogen.tasks.data import Split, TaskData, stratified_split
from morphogen.tasks.sources import check_digest, read_gzip

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_UNSIGNED_BYTES = 8


def read_idx(path: Path, digests: Mapping[str, str]) -> npt.NDArray[np.uint8]:
    """Return the array in a gzipped idx file of bytes, in the shape its header says.

    Args:
        path: The file.
        digests: File name -> SHA-256 of the uncompressed content; empty to check the header alone.

    Raises:
        DataError: The file is missing, damaged, of another format, or not the published one.
    """
    content = read_gzip(path)
    header = 4 + 4 * content[3] if len(content) >= 4 else 4
    shape = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist()) if len(content) >= header else ()
    if content[:3] != bytes([0, 0, _UNSIGNED_BYTES]) or not shape or len(content) != header + int(np.prod(shape)):
        raise DataError(
            f"{path}: must be an idx file of bytes with the size its header says, has header {content[:header].hex()} and "
            f"{len(content):,} bytes. Get the file again."
        )
    if digests:
        check_digest(path, content, digests)
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def load_images(directory: Path, decision_size: int, split_seed: int, digests: Mapping[str, str]) -> TaskData:
    """Return images of shape (1, height, width), float32, standardised with mean and deviation of all training pixels.

    Args:
        directory: Holds :data:`FILES`.
        decision_size: How many of the published training examples form the decision split.
        split_seed: Chooses them, >= 0.
        digests: As of :func:`read_idx`.

    Returns:
        Train, decision and test; the test split is the published one. Always the same.

    Raises:
        DataError: A file is missing, damaged or not the published one, or images and labels do not fit.
    """
    arrays = [read_idx(directory / name, digests) for name in FILES]
    for images, labels, name in ((*arrays[:2], FILES[1]), (*arrays[2:], FILES[3])):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{directory / name}: must hold one label for each image, has shape {labels.shape} for images of shape "
                f"{images.shape}. Get the four files again."
            )
    images, labels, test_images, test_labels = arrays
    parts = stratified_split(labels.astype(np.int64), (len(labels) - decision_size, decision_size), split_seed)
    seen = images[parts[0]]
    scale = float(seen.mean()), float(seen.std())
    train, decision = (_split(images[part], labels[part], scale) for part in parts)
    return TaskData(train, decision, _split(test_images, test_labels, scale), num_classes=int(labels.max()) + 1)


def _split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], scale: tuple[float, float]) -> Split:
    mean, deviation = scale
    inputs = torch.from_numpy(images.astype(np.float32)).unsqueeze(1).sub_(mean).div_(deviation)
    return Split(inputs, torch.from_numpy(labels.astype(np.int64)))
