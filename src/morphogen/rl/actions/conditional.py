"""The arithmetic of categorical distributions, many at a time; choices are dimension 1, whatever the others are."""

from __future__ import annotations

import torch
from torch import Tensor

FORBIDDEN = -1e30  # finite, and so that no gradient times it overflows: 0 * log-probability is then 0, never NaN


def log_probs(logits: Tensor, allowed: Tensor | None, exploration: float) -> Tensor:
    """Return log((1 - exploration) softmax(logits) + exploration uniform), both over what is ``allowed``.

    Where not allowed the value is below -1e29, and the gradient to the logit exactly 0.
    """
    if allowed is not None:
        logits = torch.where(allowed, logits, FORBIDDEN)
    log_softmax = logits.log_softmax(1)
    if not exploration:
        return log_softmax
    num_allowed = logits.shape[1] if allowed is None else allowed.sum(1, keepdim=True)
    mixed = ((1 - exploration) * log_softmax.exp() + exploration / num_allowed).log()
    return mixed if allowed is None else torch.where(allowed, mixed, FORBIDDEN)


def divergence(old: Tensor, new: Tensor) -> Tensor:
    """Return KL(old || new) of log-probabilities, dimension 1 summed away."""
    return (old.exp() * (old - new)).sum(1)


def only_first(allowed: Tensor | None, like: Tensor) -> Tensor:
    """Return 1 for the first choice that is allowed (the very first if none is), else 0; shape and dtype of ``like``."""
    first = torch.zeros_like(like)
    if allowed is None:
        first[:, 0] = 1.0
        return first
    return first.scatter_(1, allowed.to(torch.uint8).argmax(1, keepdim=True), 1.0)
