"""Which precision the update's forward passes run in."""

from __future__ import annotations

import torch

from morphogen.rl.config import PPOConfig

MIN_WIDTH = 256
"""Below this, converting costs more than narrower arithmetic saves."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def autocast_dtype(config: PPOConfig, width: int, device: torch.device) -> torch.dtype | None:
    """Return what the update's forward passes compute in; None for fp32.

    Args:
        config: Its ``precision``.
        width: The network's widest layer.
        device: Where it is.
    """
    if config.precision != "auto":
        return _DTYPES[config.precision]
    return torch.bfloat16 if device.type == "cuda" and width >= MIN_WIDTH else None
