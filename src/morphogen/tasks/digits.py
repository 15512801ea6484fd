"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits

from morphogen.tasks.data import Split, TaskData, stratified_split

NUM_CLASSES = 10
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
    pixels, classes = load_digits(return_X_y=True)
    images = np.asarray(pixels, dtype=np.float64).reshape(-1, 1, 8, 8)
    targets = np.asarray(classes, dtype=np.int64)
    parts = split_indices(targets)
    seen = images[parts[0]]
    inputs = ((images - seen.mean()) / seen.std()).astype(np.float32)
    splits = [Split(torch.from_numpy(inputs[part]), torch.from_numpy(targets[part])) for part in parts]
    return TaskData(*splits, num_classes=NUM_CLASSES)
