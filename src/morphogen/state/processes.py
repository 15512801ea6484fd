"""Which processes work on one run together, and where they exchange tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist


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
