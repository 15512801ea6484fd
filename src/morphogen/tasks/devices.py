"""Devices, checked before anything is built."""

from __future__ import annotations

import torch

_TYPES = ("cpu", "cuda", "mps")


def resolve_device(device: torch.device | str) -> torch.device:
    """Return ``device`` as a ``torch.device`` that exists here and can train.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or a ``torch.device``.

    Raises:
        TypeError: It is neither a string nor a ``torch.device``.
        ValueError: The type is unknown, there is none here, or the index is out of range.
    """
    if not isinstance(device, torch.device | str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"`device` must be a torch.device or a string, got {type(device).__name__}. Pass for example 'cpu'.")
    kind, _, index = str(device).partition(":")
    if kind not in _TYPES or (index and not index.isdecimal()):
        raise ValueError(f"`device` must be one of {', '.join(_TYPES)} with an optional index, got {str(device)!r}. Use 'cpu'.")
    count = _count(kind)
    if count == 0:
        raise ValueError(f"`device` must be available, got {str(device)!r} and there is no {kind} device here. Use 'cpu'.")
    if index and int(index) >= count:
        raise ValueError(f"`device` must have an index below {count}, got {str(device)!r}. Use '{kind}:{count - 1}'.")
    return torch.device(str(device))


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    return int(torch.backends.mps.is_available()) if kind == "mps" else 1
