"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

import importlib

import numpy as np
import numpy.typing as npt
import torch

from morphogen.growth import GrowthPoint, Sowing
from morphogen.tasks.base import Task
from morphogen.tasks.data import Split, TaskData, stratified_split
from morphogen.tasks.hosts import conv2d_host

_SIZES = (1000, 300, 497)
_SPLIT_SEED = 20_270_101


def split_indices(targets: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Rows of scikit-learn's data set that form train (1,000), decision (300) and test (497); always the same."""
    return stratified_split(targets, _SIZES, _SPLIT_SEED)


def load() -> TaskData:
    """Images of shape (1, 8, 8), float32, standardised with the mean and deviation of all training pixels.

    Returns:
        1,000 train, 300 decision and 497 test examples of 10 classes, on the CPU; the same at every call. No random
        generator is touched.
    """
    # scikit-learn takes a second to import, which only who wants its data should pay for.
    pixels, classes = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.float64).reshape(-1, 1, 8, 8)
    targets = np.asarray(classes, dtype=np.int64)
    parts = split_indices(targets)
    seen = images[parts[0]]
    inputs = ((images - seen.mean()) / seen.std()).astype(np.float32)
    splits = [Split(torch.from_numpy(inputs[part]), torch.from_numpy(targets[part])) for part in parts]
    return TaskData(*splits, num_classes=int(targets.max()) + 1)


_CONV = Sowing(blueprint="conv3x3", options={"expansion": 4}, blend_ticks=3)
_POINTS = ("block1", "block2")

TASK = Task(
    name="digits",
    summary="scikit-learn's 8x8 images of handwritten digits; a host of two narrow convolutions",
    load=load,
    make_host=lambda data: conv2d_host((3, 3), data.num_classes, kernels=(3, 3)),
    points={name: GrowthPoint(name) for name in _POINTS},
    blueprints=(
        _CONV,
        Sowing(blueprint="mlp", options={"expansion": 4}, blend_ticks=3),
        Sowing(blueprint="squeeze_excite", blend_ticks=3),
        Sowing(blueprint="depthwise", blend_ticks=3),
    ),
    reference=dict.fromkeys(_POINTS, _CONV),
    batch_size=64,
    total_steps=1200,
    tick_steps=25,
    learning_rate=4e-2,
    weight_decay=1e-2,
)
