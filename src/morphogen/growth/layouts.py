"""Layouts: which axis of a feature holds its channels, and which are space or time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import Tensor, nn

from morphogen.errors import SlotError

Layout = Literal["NC", "NCL", "NLC", "NCHW"]
LAYOUTS: tuple[Layout, ...] = ("NC", "NCL", "NLC", "NCHW")
PointLayout = Literal["NC", "NCL", "NLC", "NCHW", "LNC"]
POINT_LAYOUTS: tuple[PointLayout, ...] = (*LAYOUTS, "LNC")
"""What a submodule may return: seeds work on LNC, where the sequence comes first, as on NLC."""

_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d, nn.MaxPool1d, nn.AvgPool1d)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm, nn.RNNBase)


def check_layout(feature: Tensor, layout: PointLayout) -> None:
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
        f"Give the point as GrowthPoint(path, layout=...) with one of {', '.join(POINT_LAYOUTS)}."
    )


def is_sequence_first(feature: Tensor, module: nn.Module, host: nn.Module, batch_sizes: Collection[int]) -> bool:
    """Return whether a feature of rank 3 with channels last, the output of ``module``, is (L, N, C) rather than (N, L, C).

    Only recurrent layers and attention know, by their ``batch_first``. Where one in the host has the sequence first, the axis
    that is as long as the batch tells, and where it does not, the layers inside ``module`` do.

    Args:
        feature: The feature.
        module: What returns it.
        host: The module it is part of.
        batch_sizes: Sizes of the batch that the host's recurrent layers and attention saw in the same pass.

    Raises:
        SlotError: Neither tells.
    """
    if all(part.batch_first for part in ordered_parts(host)):
        return False
    if len(batch_sizes) == 1:
        (size,) = batch_sizes
        if (feature.shape[0] == size) != (feature.shape[1] == size):
            return feature.shape[1] == size
    inside = {part.batch_first for part in ordered_parts(module)}
    if len(inside) == 1:
        return not inside.pop()
    raise SlotError(
        f"layout must be told for an output of shape {tuple(feature.shape)}, as layers of the host have the sequence first. "
        "Give GrowthPoint(path, layout=...) with LNC or NLC, or an example whose batch and sequence differ in length."
    )


def ordered_parts(module: nn.Module) -> list[nn.RNNBase | nn.MultiheadAttention]:
    """Return the layers of ``module`` that know whether the batch or the sequence comes first."""
    return [part for part in module.modules() if isinstance(part, nn.RNNBase | nn.MultiheadAttention)]
