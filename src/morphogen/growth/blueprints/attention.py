"""Attention: every position looks at the others.

Legend: N samples, L positions, C channels, H heads of D channels each, so C = H D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.growth.blueprints.layers import input_norm, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout

_ROPE_BASE = 10_000.0


@blueprint("attention", layouts=("NLC",))
class Attention(nn.Module):
    """s(h) = W mix(q, k, v) + b, (q, k, v) = V normalise(h), mix = softmax(q k' / sqrt(D)) v per head, W = b = 0 at birth.

    There are ``num_heads`` heads, or as many as divide C up to 4. With ``causal`` a position sees itself and those before it.
    With ``rope`` queries and keys are turned by angles in proportion to their position (arXiv 2104.09864), else the seed
    knows of order only what h tells.

    Source: arXiv 1706.03762, section 3.2.
    """

    def __init__(
        self, width: int, layout: Layout, num_heads: int | None = None, causal: bool = False, rope: bool = False
    ) -> None:
        """Build norm, the maps to queries, keys and values in one, and the zero layer.

        ValueError if the heads do not divide the width, or have no two channels for ``rope`` to turn.
        """
        super().__init__()
        self.num_heads = _checked_heads(width, num_heads, rope)
        self.causal = causal
        self.rope = rope
        self.norm = input_norm(layout, width)
        self.inner = nn.Linear(width, 3 * width, bias=False)
        self.outer = zeroed(nn.Linear(width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        qkv_3NHLD = self.inner(self.norm(h)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        qk_2NHLD = qkv_3NHLD[:2]
        if self.rope:
            qk_2NHLD = self._turned(qk_2NHLD)
        mixed_NHLD = self.mix(qk_2NHLD[0], qk_2NHLD[1], qkv_3NHLD[2])
        return self.outer(mixed_NHLD.transpose(1, 2).flatten(2))

    def mix(self, q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
        """Return for each query the mean of the values, weighted by how well their keys fit it: shape NHLD."""
        return F.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD, is_causal=self.causal)

    def _turned(self, x_2NHLD: Tensor) -> Tensor:
        """Turn channel i and i + D // 2 in their plane by position * base^(-2 i / D); an odd last channel stays."""
        head_width = self.inner.in_features // self.num_heads
        half = head_width // 2
        rates = indices(x_2NHLD, half) * (-math.log(_ROPE_BASE) / half)
        angles_LD = indices(x_2NHLD, x_2NHLD.shape[3]).unsqueeze(1) * rates.exp()
        cos_LD, sin_LD = angles_LD.cos().to(x_2NHLD.dtype), angles_LD.sin().to(x_2NHLD.dtype)
        first, second = x_2NHLD[..., :half], x_2NHLD[..., half : 2 * half]
        turned = [first * cos_LD - second * sin_LD, first * sin_LD + second * cos_LD]
        rest = [x_2NHLD[..., 2 * half :]] if head_width % 2 else []
        return torch.cat(turned + rest, dim=-1)

    @staticmethod
    def parameter_count(
        width: int, layout: Layout, num_heads: int | None = None, causal: bool = False, rope: bool = False
    ) -> int:
        """Return 4 C^2 + C."""
        return 4 * width**2 + width


def indices(like: Tensor, count: int) -> Tensor:
    """Return 0 .. count - 1 as integers on the device of ``like``; unlike arange, in a form that torch.fx can trace."""
    return like.new_ones(count, dtype=torch.long).cumsum(0) - 1


def _checked_heads(width: int, num_heads: int | None, rope: bool) -> int:
    smallest = 2 if rope else 1
    if num_heads is None:
        num_heads = max((n for n in range(1, 5) if width % n == 0 and width // n >= smallest), default=1)
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"`num_heads` must divide the width {width}, got {num_heads}. Choose a divisor or leave it out.")
    if width // num_heads < smallest:
        raise ValueError(
            f"`num_heads` must leave each head 2 channels with rope, got {num_heads} at width {width}. Use fewer heads."
        )
    return num_heads
