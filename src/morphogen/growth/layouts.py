"""Layouts: which axis of a feature holds its channels, and which are space or time."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from morphogen.errors import SlotError

Layout = Literal["NC", "NCL", "NLC", "NCHW"]
LAYOUTS: tuple[Layout, ...] = ("NC", "NCL", "NLC", "NCHW")

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm, nn.RNNBase)


def check_layout(feature: Tensor, layout: Layout) -> None:
    """Raise SlotError if ``feature`` has another number of axes than ``layout``."""
    if feature.ndim != len(layout):
        raise SlotError(
            f"layout {layout} has {len(layout)} axes, the feature is of shape {tuple(feature.shape)}. "
            "Give the point the layout of its output."
        )


def width_of(feature: Tensor, layout: Layout) -> int:
    """Return the number of channels of ``feature``."""
    return feature.shape[-1 if layout == "NLC" else 1]


def pooled(feature: Tensor, layout: Layout) -> Tensor:
    """Return the mean over space or time: shape (N, C)."""
    if layout == "NC":
        return feature
    if layout == "NLC":
        return feature.mean(1)
    return feature.flatten(2).mean(2)


def infer_layout(feature: Tensor, module: nn.Module) -> Layout:
    """Return the layout of ``feature``, the output of ``module``: by rank, and for rank 3 by the kinds of layers inside.

    Raises:
        SlotError: The rank is none of 2, 3, 4, or the layers do not tell.
    """
    if feature.ndim == 2:
        return "NC"
    if feature.ndim == 4:
        return "NCHW"
    kinds = [part for part in module.modules() if isinstance(part, _CHANNELS_FIRST + _CHANNELS_LAST)]
    first = any(isinstance(part, _CHANNELS_FIRST) for part in kinds)
    last = any(isinstance(part, _CHANNELS_LAST) for part in kinds)
    if feature.ndim == 3 and first != last:
        return "NCL" if first else "NLC"
    raise SlotError(
        f"layout must be told for an output of shape {tuple(feature.shape)}. "
        f"Give the point as GrowthPoint(path, layout=...) with one of {', '.join(LAYOUTS)}."
    )
