"""Small layers that blueprints share, for every layout."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import Tensor, nn

from morphogen.growth.layouts import Layout

_Module = TypeVar("_Module", bound=nn.Module)


def zeroed(module: _Module) -> _Module:
    """Return ``module`` with weight and bias zero: for the last layer of a blueprint, so that s = 0 at birth."""
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)
    return module


def pointwise(layout: Layout, channels_in: int, channels_out: int, bias: bool = True) -> nn.Module:
    """Return the linear map over channels at each position: Linear, or a convolution of kernel size 1."""
    if layout in ("NC", "NLC"):
        return nn.Linear(channels_in, channels_out, bias=bias)
    convolution = nn.Conv1d if layout == "NCL" else nn.Conv2d
    return convolution(channels_in, channels_out, 1, bias=bias)


def input_norm(layout: Layout, width: int) -> nn.Module:
    """Return a normalisation without batch statistics: LayerNorm over channels, or GroupNorm where space follows.

    It has no weights of its own: the linear map behind it has them. Besides, torch 2.13 crashes the process in the backward
    pass of an affine GroupNorm on a channels_last feature that needs no gradient, as that of an incubating seed.
    """
    if layout in ("NC", "NLC"):
        return nn.LayerNorm(width, elementwise_affine=False)
    return nn.GroupNorm(num_groups(width), width, affine=False)


def channel_shape(layout: Layout, width: int) -> tuple[int, ...]:
    """Return the shape in which one value per channel broadcasts over a feature."""
    return (width,) if layout in ("NC", "NLC") else (width, *(1 for _ in layout[2:]))


class AxesSwapped(nn.Module):
    """The module with axes 1 and 2 of its input and output swapped: a layer for NCL works on NLC, and the reverse."""

    def __init__(self, inner: nn.Module) -> None:
        """Hold the module."""
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        """Return the module's output on the swapped input, swapped back."""
        return self.inner(h.transpose(1, 2)).transpose(1, 2)


def one_of(name: str, value: str, choices: Collection[str]) -> str:
    """Return ``value``; ValueError if the option ``name`` has no such choice."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Name one of them.")
    return value


def num_groups(width: int, min_channels: int = 4) -> int:
    """Return the largest number of groups <= 32 that divides ``width`` with at least ``min_channels`` channels each."""
    fitting = [groups for groups in range(1, 33) if width % groups == 0 and width // groups >= min_channels]
    return max(fitting, default=1)
