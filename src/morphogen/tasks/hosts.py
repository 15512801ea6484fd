"""Built-in hosts: constructors of plain ``torch.nn`` modules, and a transformer.

Legend: N samples, T tokens, W width, V vocabulary, C channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

_INITIAL_LOGIT_DEVIATION = 0.2  # adds half its square, 0.02 nats, to the first loss


def ConvHost(
    widths: Sequence[int],
    num_classes: int,
    *,
    in_channels: int = 1,
    dimensions: int = 2,
    kernels: int | Sequence[int] = 3,
    stride: int = 1,
    num_pools: int = 0,
    head_scale: float = 0.2,
) -> nn.Sequential:
    """Return blocks of convolution without bias, BatchNorm and ReLU, then global average pooling and a linear head.

    Submodules, and so the names of growth points: ``block1``, ``block2``, ... (each with ``conv``, ``norm``, ``relu`` and,
    where it pools, ``pool``), ``pool``, ``flatten``, ``head``. Any size of image or length of signal will do that the pools
    leave something of.

    Args:
        widths: Channels of block1, block2, ...
        num_classes: Outputs.
        in_channels: Channels of the inputs.
        dimensions: 1 for signals (N, C, L), 2 for images (N, C, H, W).
        kernels: Odd kernel size of the blocks, one for all or one for each.
        stride: Of every convolution.
        num_pools: How many blocks, from the first, end in a max-pool that halves the resolution.
        head_scale: Factor on torch's initial weights of the head. Less than one brings the first loss to ln(num_classes)
            even behind max-pools, whose features are large.

    Raises:
        ValueError: A kernel is missing or even, or a number out of range.

    Example:
        >>> host = ConvHost((8, 16, 32), num_classes=10, in_channels=3, num_pools=3)
        >>> host(torch.zeros(2, 3, 32, 32)).shape, sum(parameter.numel() for parameter in host.parameters())
        (torch.Size([2, 10]), 6418)
    """
    sizes = (kernels,) * len(widths) if isinstance(kernels, int) else tuple(kernels)
    _check_conv(widths, sizes, dimensions, num_pools)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (before, width) in enumerate(zip((in_channels, *widths), widths, strict=False)):
        block = _conv_block(before, width, sizes[index], stride, dimensions)
        if index < num_pools:
            block["pool"] = nn.MaxPool1d(2) if dimensions == 1 else nn.MaxPool2d(2)
        parts[f"block{index + 1}"] = nn.Sequential(block)
    parts["pool"] = nn.AdaptiveAvgPool1d(1) if dimensions == 1 else nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["head"] = _head(widths[-1], num_classes, head_scale)
    return nn.Sequential(parts)


def conv2d_host(widths: Sequence[int], num_classes: int, *, kernels: Sequence[int], in_channels: int = 1) -> nn.Sequential:
    """Return a :func:`ConvHost` for images whose convolutions have stride 2, with torch's own initial head.

    Args:
        widths: Channels of block1, block2, ...
        num_classes: Outputs.
        kernels: Odd kernel size of each block.
        in_channels: Channels of the images.
    """
    return ConvHost(widths, num_classes, in_channels=in_channels, kernels=kernels, stride=2, head_scale=1.0)


def conv1d_host(widths: Sequence[int], num_classes: int, *, kernels: Sequence[int], in_channels: int = 1) -> nn.Sequential:
    """Return the same as :func:`conv2d_host` for signals."""
    return ConvHost(widths, num_classes, in_channels=in_channels, dimensions=1, kernels=kernels, stride=2, head_scale=1.0)


def MLPHost(in_features: int, widths: Sequence[int], num_classes: int, *, head_scale: float = 0.2) -> nn.Sequential:
    """Return blocks of a linear layer and ReLU on flattened inputs, then a linear head.

    Submodules: ``flatten``, ``block1``, ``block2``, ... (each with ``linear`` and ``relu``), ``head``.

    Args:
        in_features: Numbers in a sample.
        widths: Units of block1, block2, ...
        num_classes: Outputs.
        head_scale: As of :func:`ConvHost`.

    Raises:
        ValueError: There is no width.

    Example:
        >>> MLPHost(64, (32, 32), num_classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not widths:
        raise ValueError("`widths` must hold the units of at least one block, got none. Give for example (32,).")
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (before, width) in enumerate(zip((in_features, *widths), widths, strict=False), start=1):
        parts[f"block{number}"] = nn.Sequential(OrderedDict(linear=nn.Linear(before, width), relu=nn.ReLU()))
    parts["head"] = _head(widths[-1], num_classes, head_scale)
    return nn.Sequential(parts)


class TransformerHost(nn.Module):
    """A pre-norm decoder with causal attention, learned positions, and the embedding as its head.

    x_0 = E[tokens] + P; each block adds attention(norm(x)), then mlp(norm(x)); logits = E norm(x_L). Embeddings are drawn with
    deviation 0.2 / sqrt(width), so that the deviation of the first logits is 0.2 and the first loss ln(vocab_size) to within
    2 %; the last map of each residual is scaled by 1 / sqrt(2 num_layers), as in GPT-2.

    Submodules that make growth points: ``blocks.0``, ``blocks.1``, ...

    Args:
        vocab_size: Symbols V.
        width: Channels W of the residual stream, a multiple of ``num_heads``.
        num_layers: Blocks.
        num_heads: Attention heads of each block.
        context_length: Most tokens the host reads at once; fewer will do.
        expansion: Hidden units of a block's MLP, in widths.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``.

    Example:
        >>> host = TransformerHost(vocab_size=98, width=32, num_layers=2, num_heads=4, context_length=64)
        >>> host(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 98])
    """

    def __init__(
        self, vocab_size: int, width: int, *, num_layers: int, num_heads: int, context_length: int, expansion: int = 4
    ) -> None:
        """Build embedding, positions, blocks and the last normalisation."""
        super().__init__()
        if width % num_heads:
            raise ValueError(f"`width` must be a multiple of `num_heads`, got {width} and {num_heads}. Change one of them.")
        deviation = _INITIAL_LOGIT_DEVIATION / math.sqrt(width)
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context_length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads, expansion, num_layers) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():  # torch draws embeddings with deviation 1
            self.tokens.weight.mul_(deviation)
            self.positions.weight.mul_(deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after each, shape (N, T, V).

        Args:
            tokens: Shape (N, T), int64 or int32, T at most ``context_length``.
        """
        places_T = torch.arange(tokens.size(1), device=tokens.device)
        x_NTW = self.tokens(tokens) + self.positions(places_T)
        return linear(self.norm(self.blocks(x_NTW)), self.tokens.weight)


class TransformerBlock(nn.Module):
    """Causal self-attention and an MLP, each a residual behind a normalisation."""

    def __init__(self, width: int, num_heads: int, expansion: int, num_layers: int) -> None:
        """Build both residuals; the last map of each starts smaller the more layers there are."""
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, expansion * width)
        self.activation = nn.GELU()
        self.fall = nn.Linear(expansion * width, width)
        with torch.no_grad():
            for last in (self.mix, self.fall):
                last.weight.mul_(1 / math.sqrt(2 * num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the next x, shape (N, T, W)."""
        x = x + self.mix(self._attention(self.attention_norm(x)))
        return x + self.fall(self.activation(self.rise(self.mlp_norm(x))))

    def _attention(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3, N, heads, T, W / heads
        mixed = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


def _head(width: int, num_classes: int, scale: float) -> nn.Linear:
    head = nn.Linear(width, num_classes)
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    return head


def _check_conv(widths: Sequence[int], kernels: Sequence[int], dimensions: int, num_pools: int) -> None:
    if not widths or len(widths) != len(kernels):
        raise ValueError(f"`kernels` must hold one size for each of {len(widths)} widths, got {len(kernels)}. Match them.")
    even = [kernel for kernel in kernels if kernel % 2 == 0]
    if even:
        raise ValueError(f"`kernels` must be odd, got {even[0]}. An even kernel has no middle.")
    if dimensions not in (1, 2):
        raise ValueError(f"`dimensions` must be 1 for signals or 2 for images, got {dimensions}. Choose one.")
    if not 0 <= num_pools <= len(widths):
        raise ValueError(f"`num_pools` must lie in [0, {len(widths)}], the number of blocks, got {num_pools}. Correct it.")


def _conv_block(before: int, width: int, kernel: int, stride: int, dimensions: int) -> OrderedDict[str, nn.Module]:
    convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = convolution(before, width, kernel, stride=stride, padding=kernel // 2, bias=False)
    layers["norm"] = norm(width)
    layers["relu"] = nn.ReLU()
    return layers
