"""Memory that processes share. It has no name: it is gone when the last process that uses it is, however that one ends."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import multiprocessing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.envs.frames import RUN_NUMBERS, SLOT_NUMBERS, Frames
from morphogen.tasks.data import Split, TaskData

_ALIGNMENT_BYTES = 64  # as torch's own: kernels may round otherwise on memory that is aligned otherwise


@dataclasses.dataclass(frozen=True)
class SharedArray:
    """An array that can be given to a process when it is started.

    Attributes:
        memory: At least its bytes.
        shape: Its shape.
        dtype: The name of its dtype.
    """

    memory: Any
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: str) -> SharedArray:
        """Return one of zeros."""
        num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        return cls(multiprocessing.get_context("spawn").RawArray(ctypes.c_byte, num_bytes + _ALIGNMENT_BYTES), shape, dtype)

    def view(self) -> NDArray[Any]:
        """Return the array; it aliases the memory."""
        start = -ctypes.addressof(self.memory) % _ALIGNMENT_BYTES
        count = math.prod(self.shape)
        return np.frombuffer(self.memory, np.dtype(self.dtype), count, offset=start).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class SharedFrames:
    """Frames that can be given to a process when it is started."""

    runs: SharedArray
    slots: SharedArray

    @classmethod
    def empty(cls, num_envs: int, num_slots: int) -> SharedFrames:
        """Return frames in which nothing is known."""
        runs = SharedArray.empty((num_envs, len(RUN_NUMBERS)), "float64")
        slots = SharedArray.empty((num_envs, num_slots, len(SLOT_NUMBERS)), "float64")
        for array in (runs, slots):
            array.view()[:] = np.nan
        return cls(runs, slots)

    def view(self) -> Frames:
        """Return the frames; they alias the memory."""
        return Frames(self.runs.view(), self.slots.view())


@dataclasses.dataclass(frozen=True)
class SharedData:
    """The splits of a task that can be given to a process when it is started: inputs and targets of each."""

    splits: tuple[tuple[SharedArray, SharedArray], ...]
    num_classes: int

    @classmethod
    def of(cls, data: TaskData) -> SharedData:
        """Return a copy of ``data``."""
        splits = data.splits().values()
        return cls(tuple((_shared(split.inputs), _shared(split.targets)) for split in splits), data.num_classes)

    def view(self) -> TaskData:
        """Return the data; it aliases the memory."""
        splits = (Split(torch.from_numpy(inputs.view()), torch.from_numpy(targets.view())) for inputs, targets in self.splits)
        return TaskData(*splits, num_classes=self.num_classes)


def _shared(tensor: Tensor) -> SharedArray:
    values = tensor.numpy()
    array = SharedArray.empty(values.shape, values.dtype.name)
    array.view()[:] = values
    return array
