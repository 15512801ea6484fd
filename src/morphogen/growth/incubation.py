"""Incubation: the seed learns while the host's output and gradients stay bit-identical to a run without it.

Legend: h is the host's feature, r the seed's residual, g the gradient of the loss at the host's output h.

Two incubators. *Shadow* (``shadow.py``) runs a second pass in which the seed acts and nothing else learns; the output there is
h + alpha_target * r, and the seed's gradient that of the loss. *Straight-through* does with the ordinary pass:

The seed is fed h detached, and the output is h + (-0.0), which is h bit for bit, signed zeros included and
whatever r holds; on the way back g passes to the host untouched. The seed is given not g alone, along which r would grow
without end since it never feels its own effect, but the gradient of

    <g, r> + |g| * phi(|r|),    phi(x) = x^2 / (2 * limit) up to x = 2 * limit, 2 * x beyond,    limit = ratio * |h|

of each sample, whose minimum lies at r = -limit * g / |g|: against the gradient, ``ratio`` times as long as the feature. The
gradient is never longer than 3 |g|, also where the feature is dead and the limit zero. Samples do not see each other, so that
parts of a batch, in turn or in several processes, add up to the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(h: Tensor, r: Tensor, ratio: float) -> Tensor:
    """Return ``h``, bit for bit, as a tensor whose gradient also trains what made ``r``.

    Args:
        h: Feature of the host.
        r: Residual of the seed, computed from ``h.detach()``; same shape and dtype as ``h``.
        ratio: Size |r| / |h| at which the residual settles, > 0.
    """
    silent: Any = _Silent.apply(r, h.detach(), ratio)
    return h + silent


class _Silent(torch.autograd.Function):
    """Forward: minus zero everywhere (x + -0.0 == x for every x, bit for bit). Backward: see the head of the file."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, h: Tensor, ratio: float) -> Tensor:
        """Keep ``r`` and max(limit, |r| / 2) for the way back."""
        ctx.save_for_backward(r, torch.maximum(_norm(h).mul_(ratio), _norm(r).mul_(0.5)).clamp_min_(1e-30))
        return torch.full((), -0.0, dtype=r.dtype, device=r.device).expand_as(r)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return g + |g| / max(limit, |r| / 2) * r."""
        r, size = ctx.saved_tensors
        pull = _norm(grad).div_(size)
        if pull.dtype is not r.dtype:
            pull = pull.clamp_max_(torch.finfo(r.dtype).max).to(r.dtype)
        return torch.addcmul(grad, r, pull), None, None


def _norm(tensor: Tensor) -> Tensor:
    """Return the length of each sample, shape (N, 1, ...), summed in at least single precision."""
    dtype = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True, dtype=dtype)


def finite_or_left_out(r: Tensor) -> Tensor:
    """Return ``r``, or zeros if an element of it is not finite; its gradient is then NaN, for the sensors to see.

    One broken seed would otherwise spoil the gradients of all that learn in the same pass.
    """
    found: Any = _FiniteOrLeftOut.apply(r)
    return found


class _FiniteOrLeftOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor) -> Tensor:
        """Decide on the device."""
        finite = r.isfinite().all()
        ctx.save_for_backward(finite)
        return torch.where(finite, r, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of ``r`` as it was used, else NaN."""
        (finite,) = ctx.saved_tensors
        return torch.where(finite, grad, torch.nan)
