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
    blocks = _blocks(nn.Conv2d, nn.BatchNorm2d, (in_channels, *widths), kernels)
    return _headed(blocks, nn.AdaptiveAvgPool2d(1), widths[-1], num_classes)


def conv1d_host(widths: Sequence[int], num_classes: int, *, kernels: Sequence[int], in_channels: int = 1) -> nn.Sequential:
    """Return the same as :func:`conv2d_host` along one dimension."""
    blocks = _blocks(nn.Conv1d, nn.BatchNorm1d, (in_channels, *widths), kernels)
    return _headed(blocks, nn.AdaptiveAvgPool1d(1), widths[-1], num_classes)


def _blocks(
    convolution: type[nn.Conv1d] | type[nn.Conv2d],
    norm: type[nn.BatchNorm1d] | type[nn.BatchNorm2d],
    channels: Sequence[int],
    kernels: Sequence[int],
) -> OrderedDict[str, nn.Module]:
    """Return block1, block2, ... from ``channels[0]`` to ``channels[-1]``."""
    if not kernels or len(channels) != len(kernels) + 1:
        raise ValueError(
            f"`kernels` must hold one size for each of {len(channels) - 1} widths, got {len(kernels)}. Match them."
        )
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for number, kernel in enumerate(kernels, start=1):
        before, width = channels[number - 1 : number + 1]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = convolution(before, width, kernel, stride=2, padding=kernel // 2, bias=False)
        layers["norm"] = norm(width)
        layers["relu"] = nn.ReLU()
        blocks[f"block{number}"] = nn.Sequential(layers)
    return blocks


def _headed(blocks: OrderedDict[str, nn.Module], pool: nn.Module, width: int, num_classes: int) -> nn.Sequential:
    """Return the blocks with pooling and a linear head behind them."""
    blocks.update(pool=pool, flatten=nn.Flatten(), head=nn.Linear(width, num_classes))
    return nn.Sequential(blocks)
