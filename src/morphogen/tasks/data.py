"""Fixed train, decision and test splits of a task, and a checksummed cache for generated ones."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes, save as tensors_to_bytes
from torch import Tensor

_SPLITS = ("train", "decision", "test")


_TOKEN_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


@dataclass(frozen=True)
class Split:
    """Examples, one per row: features with a class each, or tokens with the token to follow each.

    Attributes:
        inputs: Floating-point features, shape (num_examples, ...), or tokens, shape (num_examples, num_tokens), in int64 or
            one of the narrower int32, int16 and uint8; may be a view of a memory-mapped file.
        targets: Class indices from 0, int64, shape (num_examples,); for tokens, tokens of the shape and dtype of ``inputs``.
            On the device of ``inputs``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If the shapes or devices do not fit each other, or there is no example.

    Example:
        >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
        >>> inputs, targets = Split(tokens[:, :-1], tokens[:, 1:]).rows(torch.tensor([1]))
        >>> inputs, targets
        (tensor([[4, 5]]), tensor([[5, 6]]))
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        self._check_dtypes()
        expected = self.inputs.shape[: 1 if self.inputs.is_floating_point() else None]
        if self.inputs.ndim == 0 or self.targets.shape != expected:
            raise ValueError(
                f"`targets` must hold one class per row of `inputs`, or a token for each token, got shape "
                f"{tuple(self.targets.shape)} for inputs of shape {tuple(self.inputs.shape)}. "
                "Give both the same first dimension."
            )
        if len(self.targets) == 0:
            raise ValueError("`inputs` must hold at least one example, got none. Give a split that is not empty.")
        if self.inputs.device != self.targets.device:
            raise ValueError(
                f"`targets` must be on the device of `inputs`, got {self.targets.device} and {self.inputs.device}. "
                "Move one of them."
            )

    def _check_dtypes(self) -> None:
        if not self.inputs.is_floating_point() and self.inputs.dtype not in _TOKEN_DTYPES:
            raise TypeError(f"`inputs` must be floating point or tokens, got {self.inputs.dtype}. Convert them to float32.")
        expected = torch.int64 if self.inputs.is_floating_point() else self.inputs.dtype
        if self.targets.dtype != expected:
            raise TypeError(f"`targets` must be {str(expected)[6:]}, got {self.targets.dtype}. Convert them.")

    def rows(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some rows, tokens widened to int64: what a network and a loss take.

        Args:
            chosen: Row numbers, int64, on the split's device, or a slice.
        """
        if isinstance(chosen, slice):
            inputs, targets = self.inputs[chosen], self.targets[chosen]
        else:  # a quarter of the time of indexing
            inputs, targets = self.inputs.index_select(0, chosen), self.targets.index_select(0, chosen)
        return (inputs if inputs.is_floating_point() else inputs.long()), targets.long()

    def part(self, rows: slice) -> Split:
        """Return some of the rows as a split that shares their memory."""
        return Split(self.inputs[rows], self.targets[rows])

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> Split:
        """Same examples on ``device``; tensors already there are shared, not copied."""
        return Split(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class TaskData:
    """The three splits of a task: one to learn from, one to decide by, one that only the final evaluation sees.

    Attributes:
        train: What the network is trained on.
        decision: What growth decisions and tuning may look at.
        test: What only the reported result may look at.
        num_classes: Targets lie in [0, ``num_classes``): classes, or symbols of the vocabulary.

    Raises:
        ValueError: If the splits differ in feature shape or dtype, or a target is out of range.
    """

    train: Split
    decision: Split
    test: Split
    num_classes: int

    def __post_init__(self) -> None:
        expected = (self.train.inputs.shape[1:], self.train.inputs.dtype)
        for name, split in self.splits().items():
            found = (split.inputs.shape[1:], split.inputs.dtype)
            if found != expected:
                raise ValueError(
                    f"`{name}` must have features like `train`, {tuple(expected[0])} {expected[1]}, got "
                    f"{tuple(found[0])} {found[1]}. Prepare every split alike."
                )
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"`{name}.targets` must lie in [0, {self.num_classes}), got {low} to {high}. "
                    "Correct the targets or `num_classes`."
                )

    def splits(self) -> dict[str, Split]:
        """The three splits by name, in the order train, decision, test."""
        return {"train": self.train, "decision": self.decision, "test": self.test}

    def to(self, device: torch.device | str) -> TaskData:
        """Same data on ``device``; tensors already there are shared, not copied."""
        return TaskData(self.train.to(device), self.decision.to(device), self.test.to(device), self.num_classes)


def stratified_split(targets: npt.NDArray[np.int64], sizes: Sequence[int], seed: int) -> list[npt.NDArray[np.int64]]:
    """Cut all examples into parts in which every class has its share, to within one example.

    The same arguments give the same parts in every version of NumPy and on every machine.

    Args:
        targets: Class of each example, shape (num_examples,).
        sizes: Number of examples in each part; they add up to ``len(targets)``.
        seed: Chooses the parts, >= 0.

    Returns:
        The indices in each part, ascending.

    Raises:
        ValueError: If ``sizes`` do not add up.

    Example:
        >>> [part.tolist() for part in stratified_split(np.array([0, 1, 0, 1, 0, 1]), (4, 2), seed=0)]
        [[0, 1, 2, 3], [4, 5]]
    """
    if sum(sizes) != len(targets) or min(sizes) < 0:
        raise ValueError(
            f"`sizes` must be at least 0 and add up to {len(targets)}, the number of targets, got {tuple(sizes)}. "
            "Give every example a part."
        )
    # Raw words, because NumPy promises those for ever; what Generator.permutation makes of them may change.
    keys = np.random.PCG64(seed).random_raw(len(targets))
    depth = np.empty(len(targets))
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        depth[members[np.argsort(keys[members], kind="stable")]] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((keys, depth))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def cache_directory() -> Path:
    """Where generated data is kept: $MORPHOGEN_DATA, else "morphogen" in the user's cache directory.

    Raises:
        RuntimeError: If neither is known, because the user has no home directory.
    """
    chosen = os.environ.get("MORPHOGEN_DATA")
    if chosen:
        return Path(chosen).expanduser()
    return _user_cache_directory(sys.platform, os.environ) / "morphogen"


def cached_task_data(name: str, generate: Callable[[], TaskData]) -> TaskData:
    """Data read from the cache, else generated and written there.

    A file that is damaged or does not match its checksum is generated again, with a warning. Where the cache cannot be
    used at all, that is said once and the data is generated on every call.

    Args:
        name: File name without ending. Put a version into it: a file is used for as long as its name fits.
        generate: Makes the data; it must always give the same.

    Returns:
        The data, on the CPU.
    """
    try:
        path = cache_directory() / f"{name}.safetensors"
    except RuntimeError as problem:
        _warn_uncached("the user's cache", str(problem))
        return generate()
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except OSError as problem:
        _warn_uncached(str(path.parent), str(problem))
        return generate()
    except (ValueError, TypeError, KeyError, SafetensorError) as problem:
        warnings.warn(f"Cached data {path} is damaged ({problem}); it is generated again.", stacklevel=2)
    data = generate()
    try:
        _write(path, data)
    except OSError as problem:
        _warn_uncached(str(path.parent), str(problem))
    return data


def _user_cache_directory(platform: str, environment: Mapping[str, str]) -> Path:
    """The platform's directory for a user's caches."""
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if platform == "darwin":
        return Path.home() / "Library" / "Caches"
    base = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return Path(base) if os.path.isabs(base) else Path.home() / ".cache"


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read(path: Path) -> TaskData:
    """Verified data; FileNotFoundError if there is none, ValueError, TypeError, KeyError or SafetensorError if bad."""
    content = path.read_bytes()
    try:
        expected = _checksum_path(path).read_text(encoding="ascii").split()[:1]
    except FileNotFoundError:
        raise ValueError("its checksum is missing") from None
    if expected != [hashlib.sha256(content).hexdigest()]:
        raise ValueError("its checksum does not match")
    tensors = tensors_from_bytes(content)
    splits = [Split(tensors[f"{split}.inputs"], tensors[f"{split}.targets"]) for split in _SPLITS]
    return TaskData(*splits, num_classes=int(tensors["num_classes"]))


def _write(path: Path, data: TaskData) -> None:
    """Store data with its checksum (in the format of ``sha256sum``); OSError if that is not possible."""
    tensors = {"num_classes": torch.tensor(data.num_classes)}
    for name, split in data.splits().items():
        tensors[f"{name}.inputs"] = split.inputs.contiguous()
        tensors[f"{name}.targets"] = split.targets.contiguous()
    content = tensors_to_bytes(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Checksum first: who reads in between finds no data yet, not data without a checksum.
    _replace(_checksum_path(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode("ascii"))
    _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    """Write a file such that any reader sees the old one or the new one, whole."""
    # Not tempfile: its files are for their owner alone, and the directory may be shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache  # Once for each directory.
def _warn_uncached(directory: str, problem: str) -> None:
    warnings.warn(
        f"Data cannot be cached in {directory} ({problem}); it is generated each time. "
        "Set MORPHOGEN_DATA to a directory you can write to.",
        stacklevel=3,
    )
