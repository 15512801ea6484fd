"""MNIST-1D: 5,000 signals of 40 points in 10 classes, generated here by the ``mnist1d`` package and cached.

Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", arXiv 2011.14439.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from morphogen.growth import GrowthPoint, Sowing
from morphogen.tasks.base import Task
from morphogen.tasks.data import Split, TaskData, cached_task_data, stratified_split
from morphogen.tasks.hosts import conv1d_host

_SIZES = (3200, 800)
_SPLIT_SEED = 20_270_102


def load() -> TaskData:
    """Signals of shape (1, 40), float32, standardised by the generator (all 200,000 values: mean 0, deviation 1).

    The published 1,000 test examples are the test split; the published 4,000 are cut into train and decision.

    Returns:
        3,200 train, 800 decision and 1,000 test examples of 10 classes, on the CPU; the same at every call. The state
        of every random generator is as before. The first call generates the data (about a second) and caches it.
    """
    return cached_task_data("mnist1d-v1", _generate)


def split_indices(targets: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Rows of the published 4,000 that form train (3,200) and decision (800); always the same."""
    return stratified_split(targets, _SIZES, _SPLIT_SEED)


def _generate() -> TaskData:
    # The package imports matplotlib and requests, which only the first use on a machine should pay for.
    source = importlib.import_module("mnist1d.data")
    with _global_generators_kept():
        made = source.make_dataset(source.get_dataset_args())
    signals, targets = made["x"], np.asarray(made["y"])
    train, decision = (_split(signals[rows], targets[rows]) for rows in split_indices(targets))
    return TaskData(train, decision, _split(made["x_test"], made["y_test"]), num_classes=int(targets.max()) + 1)


def _split(signals: npt.NDArray[np.float64], targets: npt.NDArray[np.int64]) -> Split:
    inputs = torch.from_numpy(signals.astype(np.float32)).unsqueeze(1)
    return Split(inputs, torch.from_numpy(targets.astype(np.int64)))


@contextmanager
def _global_generators_kept() -> Generator[None]:
    # The package seeds and draws from the process-wide generators. Left so, a caller's own draws would be other ones
    # on the machine that generates the data than on one that reads it from the cache.
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


_CONV = Sowing(blueprint="conv1d", options={"kernel_size": 3, "expansion": 3}, blend_ticks=3)
_POINTS = ("block1", "block2", "block3")

TASK = Task(
    name="mnist1d",
    summary="MNIST-1D, 40-sample signals of ten classes, generated here; a host of three narrow convolutions",
    load=load,
    make_host=lambda data: conv1d_host((8, 8, 8), data.num_classes, kernels=(5, 3, 3)),
    points={name: GrowthPoint(name) for name in _POINTS},
    blueprints=(
        _CONV,
        Sowing(blueprint="mlp", options={"expansion": 4}, blend_ticks=3),
        Sowing(blueprint="squeeze_excite", blend_ticks=3),
        Sowing(blueprint="depthwise", blend_ticks=3),
    ),
    reference=dict.fromkeys(_POINTS, _CONV),
    batch_size=64,
    total_steps=2000,
    tick_steps=50,
    learning_rate=2e-2,
    weight_decay=1e-2,
)
