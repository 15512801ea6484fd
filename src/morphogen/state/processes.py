"""Which processes work on one run together, where they exchange tensors, and how many cores there are for them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group_of(distributed: bool | dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return the process group that is meant: the one given, or for True that of all processes if there are several.

    None means this process alone.
    """
    if not isinstance(distributed, bool):
        return distributed
    several = distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Return where the group's backend wants its tensors."""
    if dist.get_backend(group) != dist.Backend.NCCL:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
