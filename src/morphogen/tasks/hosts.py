"""Small convolutional hosts made of ``torch.nn`` modules alone, so that an exported network needs torch and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def conv2d_host(widths: Sequence[int], num_classes: int, *, kernels: Sequence[int], in_channels: int = 1) -> nn.Sequential:
    """Return blocks of stride-2 3x3-style convolution, BatchNorm and ReLU, then global average pooling and a linear head.

    Args:
        widths: Channels of block1, block2, ...; also the names of the growth points.
        num_classes: Outputs.
        kernels: Odd kernel size of each block.
        in_channels: Channels of the images.
    """
    return _host(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d(1), widths, kernels, in_channels, num_classes)


def conv1d_host(widths: Sequence[int], num_classes: int, *, kernels: Sequence[int], in_channels: int = 1) -> nn.Sequential:
    """Return the same as :func:`conv2d_host` along one dimension."""
    return _host(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d(1), widths, kernels, in_channels, num_classes)


def _host(
    convolution: type[nn.Conv1d] | type[nn.Conv2d],
    norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d],
    pool: nn.Module,
    widths: Sequence[int],
    kernels: Sequence[int],
    in_channels: int,
    num_classes: int,
) -> nn.Sequential:
    if not widths or len(widths) != len(kernels):
        raise ValueError(f"`kernels` must hold one size for each of {len(widths)} widths, got {len(kernels)}. Match them.")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, (width, kernel) in enumerate(zip(widths, kernels, strict=True), start=1):
        block = OrderedDict(
            conv=convolution(channels, width, kernel, stride=2, padding=kernel // 2, bias=False),
            norm=norm(width),
            relu=nn.ReLU(),
        )
        layers[f"block{number}"] = nn.Sequential(block)
        channels = width
    layers["pool"] = pool
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
