"""FlexAttention: attention whose kernel skips the blocks of positions that the mask hides.

Legend: N samples, L positions, H heads of D channels each.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from morphogen.growth.blueprints.attention import Attention, indices
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout

_DEVICES = ("cuda", "xpu")  # with a backward pass: torch 2.13 has none on cpu and mps
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MIN_HEAD_WIDTH = 16
_MAX_MASKS = 64


@blueprint("flex_attention", layouts=("NLC",))
class FlexAttention(Attention):
    """s(h) = W mix(q, k, v) + b as in ``attention``, by torch's FlexAttention where it has a kernel; W = b = 0 at birth.

    With ``window`` a position sees those less than so many positions away alone, itself included. Masks of blocks are built
    once for each kind, length and device and kept outside compiled graphs; the 64 used last stay.

    FlexAttention has kernels with a backward pass on CUDA and XPU devices with Triton, in single and half precision, for
    heads of 16 channels or more. Elsewhere, and after export, ``scaled_dot_product_attention`` computes the same, in training
    and eval mode alike, and a ``UserWarning`` says so once per process.

    Source: arXiv 2412.05496.
    """

    def __init__(
        self,
        width: int,
        layout: Layout,
        num_heads: int | None = None,
        causal: bool = False,
        rope: bool = False,
        *,
        window: int | None = None,
    ) -> None:
        """Build as ``attention``; ValueError if the window is not positive."""
        if window is not None and window < 1:
            raise ValueError(f"`window` must be at least 1, got {window}. A position must see itself.")
        super().__init__(width, layout, num_heads, causal, rope)
        self.window = window

    def mix(self, q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
        """Return for each query the mean of the values it sees: shape NHLD."""
        if not isinstance(q_NHLD, fx.Proxy) and has_kernel(q_NHLD):
            return self._mix_blocks(q_NHLD, k_NHLD, v_NHLD)
        if self.window is None:
            return super().mix(q_NHLD, k_NHLD, v_NHLD)
        positions = indices(q_NHLD, q_NHLD.shape[2])
        distance_LL = positions.unsqueeze(1) - positions
        seen_LL = _seen(distance_LL, self.causal, self.window)
        return F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, attn_mask=seen_LL)

    def _mix_blocks(self, q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
        masked = self.causal or self.window is not None
        mask = _uncompiled_mask(self.causal, self.window, q_NHLD.shape[2], q_NHLD.device) if masked else None
        attend = flex_attention if torch.compiler.is_compiling() else _compiled()
        return attend(q_NHLD, k_NHLD, v_NHLD, block_mask=mask)

    @staticmethod
    def parameter_count(
        width: int,
        layout: Layout,
        num_heads: int | None = None,
        causal: bool = False,
        rope: bool = False,
        *,
        window: int | None = None,
    ) -> int:
        """Return 4 C^2 + C."""
        return Attention.parameter_count(width, layout)


def has_kernel(q_NHLD: Tensor) -> bool:
    """Return whether FlexAttention can train on such queries; if not, a notice is given, once per process."""
    fits = q_NHLD.dtype in _DTYPES and q_NHLD.shape[-1] >= _MIN_HEAD_WIDTH
    found = fits and q_NHLD.device.type in _DEVICES and _has_triton() and not torch.compiler.is_exporting()
    if not found and not torch.compiler.is_compiling():
        _give_notice()
    return found


@functools.lru_cache(maxsize=_MAX_MASKS)
def block_mask(causal: bool, window: int | None, length: int, device: torch.device) -> BlockMask:
    """Return which blocks of ``length`` x ``length`` positions are seen; the same object as long as it is in the cache."""

    def seen(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _seen(query - key, causal, window)

    with torch.inference_mode(False):  # or training could not use what a prediction has left in the cache
        return create_block_mask(seen, None, None, length, length, device=str(device))


_uncompiled_mask: Any = torch.compiler.disable(block_mask)


def _seen(distance: Tensor, causal: bool, window: int | None) -> Tensor:
    """Return where a key that lies ``distance`` before its query (behind it if negative) is seen."""
    if window is None:
        return distance >= 0
    near = distance < window
    return near & (distance >= 0) if causal else near & (distance > -window)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _give_notice() -> None:
    warnings.warn(
        "`flex_attention` runs as scaled_dot_product_attention here: FlexAttention trains on cuda and xpu devices with "
        "Triton, in single or half precision, with heads of 16 channels or more. The results are the same.",
        stacklevel=2,
    )
