"""Torsos: what turns an observation into features, for several independent towers at once.

Actor and critics have towers of their own (or share one). Towers of one shape are computed together: their weights are stacked
along a first dimension and one batched matrix product serves all, which on a CPU costs little more than one of them alone.

Shapes: C towers, B rows, D inputs, H outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from morphogen.state import draw_from

Activation = Literal["tanh", "relu", "elu", "silu", "gelu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}
_MINUS_ONE = torch.tensor(-1.0)
_GAINS = {"tanh": 2**0.5, "relu": 2**0.5, "elu": 2**0.5, "silu": 2**0.5, "gelu": 2**0.5}


class StackedLinear(nn.Module):
    """As many linear layers of one shape as there are towers: ``y_CBH[c] = x_CBD[c] @ weight_CDH[c] + bias_C1H[c]``.

    Args:
        towers: C.
        in_features: D.
        out_features: H.
        gain: Each tower's weight starts orthogonal, times this (Saxe et al. 2014); biases start at zero.
        generator: Draws the weights.

    Example:
        >>> StackedLinear(2, 4, 8, 1.0, torch.Generator())(torch.zeros(2, 5, 4)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, towers: int, in_features: int, out_features: int, gain: float, generator: torch.Generator) -> None:
        """Draw the weights."""
        super().__init__()
        weight_CDH = torch.empty(towers, in_features, out_features)
        for tower_DH in weight_CDH:
            nn.init.orthogonal_(tower_DH, gain, generator=generator)
        self.weight = nn.Parameter(weight_CDH)
        self.bias = nn.Parameter(torch.zeros(towers, 1, out_features))

    def forward(self, x_CBD: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``scale * y_CBH``; scaling costs nothing."""
        return torch.baddbmm(self.bias, x_CBD, self.weight, beta=scale, alpha=scale)

    def tower(self, index: int, x_BD: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``scale * y_BH`` of one tower."""
        return torch.addmm(self.bias[index], x_BD, self.weight[index], beta=scale, alpha=scale)


def linear(in_features: int, out_features: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer whose weight starts orthogonal, times ``gain``, and whose bias starts at zero."""
    with draw_from(generator):  # it draws when it is built, whatever it is given afterwards
        layer = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Stacked layers with an activation after each; without layers it is the identity.

    Args:
        towers: C.
        in_features: D.
        hidden: Width of each layer.
        activation: What follows each layer.
        generator: Draws the weights.
    """

    def __init__(
        self, towers: int, in_features: int, hidden: Sequence[int], activation: Activation, generator: torch.Generator
    ) -> None:
        """Draw the weights, layer by layer."""
        super().__init__()
        widths = (in_features, *hidden)
        pairs = zip(widths, widths[1:], strict=False)
        self.layers = nn.ModuleList(
            StackedLinear(towers, before, after, _GAINS[activation], generator) for before, after in pairs
        )
        self.out_features = widths[-1]
        self._activation: Activation = activation

    def forward(self, x_CBD: Tensor) -> Tensor:
        """Return features [C, B, out_features]."""
        for layer in self.layers:
            x_CBD = _activated(layer, self._activation, x_CBD)
        return x_CBD

    def tower(self, index: int, x_BD: Tensor) -> Tensor:
        """Return the features [B, out_features] of one tower."""
        for layer in self.layers:
            x_BD = _activated(functools.partial(cast("StackedLinear", layer).tower, index), self._activation, x_BD)
        return x_BD


def _activated(layer: Callable[..., Tensor], activation: Activation, x: Tensor) -> Tensor:
    """Return activation(layer(x)); tanh(y) as 2 sigmoid(2 y) - 1, since torch's sigmoid is six times as fast on a CPU.

    In float32 the two differ by less than 2e-7. Narrower numbers would lose too much to the subtraction.
    """
    if activation != "tanh" or x.is_cuda or x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return ACTIVATIONS[activation](layer(x))
    return torch.add(_MINUS_ONE, layer(x, 2.0).sigmoid(), alpha=2.0)


class CNN(nn.Module):
    """Convolutions with ReLU for each tower, then an :class:`MLP` (Mnih et al. 2015, figure 1).

    Args:
        towers: C.
        image_shape: Channels, height, width; pixels are expected in [0, 255] and divided by 255.
        channels: Channels of each convolution; kernels 8, 4, 3 with strides 4, 2, 1 for images of 36 pixels and more, else
            kernels 3 with strides 1, 2, 2, ...
        hidden: Widths of the layers after the convolutions.
        activation: What follows each of those layers.
        generator: Draws the weights.
    """

    def __init__(
        self,
        towers: int,
        image_shape: tuple[int, int, int],
        channels: Sequence[int],
        hidden: Sequence[int],
        activation: Activation,
        *,
        generator: torch.Generator,
    ) -> None:
        """Draw the weights, tower by tower."""
        super().__init__()
        self._image_shape = image_shape
        self.towers = nn.ModuleList(_convolutions(image_shape, channels, generator) for _ in range(towers))
        with torch.no_grad():
            width = self.towers[0](torch.zeros(1, *image_shape)).shape[1]
        self.mlp = MLP(towers, width, hidden, activation, generator)
        self.out_features = self.mlp.out_features

    def forward(self, x_CBD: Tensor) -> Tensor:
        """Return features [C, B, out_features] of images that were flattened to D."""
        images_BCHW = x_CBD[0].unflatten(-1, self._image_shape) / 255.0
        return self.mlp(torch.stack([tower(images_BCHW) for tower in self.towers]))

    def tower(self, index: int, x_BD: Tensor) -> Tensor:
        """Return the features [B, out_features] of one tower."""
        images_BCHW = x_BD.unflatten(-1, self._image_shape) / 255.0
        return self.mlp.tower(index, self.towers[index](images_BCHW))


def _convolutions(image_shape: tuple[int, int, int], channels: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    large = min(image_shape[1:]) >= 36
    layers: list[nn.Module] = []
    before = image_shape[0]
    for index, width in enumerate(channels):
        kernel, stride = ((8, 4), (4, 2), (3, 1))[min(index, 2)] if large else (3, min(index + 1, 2))
        with draw_from(generator):  # it draws when it is built, whatever it is given afterwards
            layer = nn.Conv2d(before, width, kernel, stride, padding=0 if large else 1)
        nn.init.orthogonal_(layer.weight, 2**0.5, generator=generator)
        nn.init.zeros_(layer.bias) if layer.bias is not None else None
        layers += [layer, nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Flatten())
