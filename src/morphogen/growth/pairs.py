"""A pair of layers with hidden units between them: first -> [norm] -> [activation] -> second, inside one submodule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth.layouts import Layout

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
LAYOUTS_OF: dict[type[nn.Module], tuple[Layout, ...]] = {nn.Linear: ("NC", "NLC"), nn.Conv1d: ("NCL",), nn.Conv2d: ("NCHW",)}

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU),
    *(nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink),
    *(nn.Tanhshrink, nn.Threshold, nn.Identity),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
}
"""Activations that a host may call as functions, by name."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two layers and what lies between them; each with its name relative to the submodule, None for a function.

    Attributes:
        first: Makes the hidden units.
        middle: Works on each hidden unit by itself.
        second: Reads the hidden units.
    """

    first: tuple[str, Layer]
    middle: tuple[tuple[str | None, nn.Module], ...]
    second: tuple[str, Layer]

    @property
    def num_hidden(self) -> int:
        """Number of hidden units."""
        return channels_out(self.first[1])

    @property
    def named(self) -> tuple[tuple[str, nn.Module], ...]:
        """The submodule's own parts among these, with their names."""
        return tuple((name, part) for name, part in (self.first, *self.middle, self.second) if name is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return second(middle(first(x)))."""
        for _, part in (self.first, *self.middle, self.second):
            x = part(x)
        return x


def find_pair(
    submodule: nn.Module,
    first: str | None = None,
    second: str | None = None,
    norm: str | None = None,
    activation: str | None = None,
) -> Pair:
    """Return the pair inside a submodule: an ``nn.Sequential`` of such layers tells by itself, any other is told by names.

    Args:
        submodule: Holds the pair and nothing else that acts on its output.
        first: Name of the first layer, relative to the submodule.
        second: Name of the second layer.
        norm: Name of the normalisation between them, if there is one.
        activation: Name of the activation between them, or of a function ("gelu", "relu", ...), if there is one.

    Raises:
        SlotError: There is no such pair; the message starts with "must".
        ValueError: ``second``, ``norm`` or ``activation`` is given without ``first``.
    """
    if first is None or second is None:
        if (first, second, norm, activation) != (None, None, None, None):
            raise ValueError("`first` and `second` must both be given where one of the layers is named. Name both.")
        return _checked(_sequence(submodule))
    named = dict(submodule.named_modules(remove_duplicate=False))
    parts: list[tuple[str | None, nn.Module]] = [(first, _part(named, first))]
    if norm is not None:
        parts.append((norm, _part(named, norm)))
    if activation is not None:
        is_function = activation not in named and activation in _FUNCTIONS
        parts.append((None, _FUNCTIONS[activation]()) if is_function else (activation, _part(named, activation)))
    return _checked([*parts, (second, _part(named, second))])


def _part(named: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in named:
        raise SlotError(
            f"must sit at a submodule with `{name}` in it, has {', '.join(list(named)[1:]) or 'nothing'}. Name its layers, or "
            f"for an activation one of the functions {', '.join(_FUNCTIONS)}."
        )
    return named[name]


def _sequence(submodule: nn.Module) -> list[tuple[str | None, nn.Module]]:
    if type(submodule) is not nn.Sequential:
        raise SlotError(
            f"must sit at an nn.Sequential of two layers, is at a {type(submodule).__name__}. Name the layers inside it: "
            "options first=, second= and activation=."
        )
    parts: list[tuple[str | None, nn.Module]] = []
    for name, child in submodule.named_children():
        inner = _sequence(child) if type(child) is nn.Sequential else [(None, child)]
        parts += [(name if below is None else f"{name}.{below}", part) for below, part in inner]
    return parts


def _checked(parts: list[tuple[str | None, nn.Module]]) -> Pair:
    if len(parts) < 2:
        raise SlotError("must sit at two layers with hidden units between them, has one. Choose another submodule.")
    (first_name, first), (second_name, second) = parts[0], parts[-1]
    if not (is_layer(first) and is_layer(second) and type(first) is type(second)):
        raise SlotError(
            f"must sit between two Linear, two Conv1d or two Conv2d, is between {type(first).__name__} and "
            f"{type(second).__name__}. Choose a submodule that starts and ends with such layers."
        )
    for layer in (first, second):
        if getattr(layer, "groups", 1) != 1:
            raise SlotError("must sit at layers with groups=1, as grouped convolutions divide the hidden units. Choose others.")
    for _, part in parts[1:-1]:
        if type(part) not in _ELEMENTWISE + _POOLS + _NORMS + _DROPOUTS:
            raise SlotError(
                f"must have only layers between that treat each hidden unit by itself, has {type(part).__name__}. Known are "
                "BatchNorm, GroupNorm, dropout, pooling and the activations of torch without parameters."
            )
    if channels_out(first) != channels_in(second):
        raise SlotError(
            f"must sit at layers that fit, the first has {channels_out(first)} units and the second reads "
            f"{channels_in(second)}. Choose two layers that follow each other."
        )
    assert first_name is not None and second_name is not None
    return Pair((first_name, first), tuple(parts[1:-1]), (second_name, second))


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether this is a plain Linear, Conv1d or Conv2d whose weight is a parameter of its own."""
    return type(module) in LAYERS and "weight" in dict(module.named_parameters(recurse=False))


def channels_in(layer: nn.Module) -> int:
    """Return the channels that a layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else _convolution(layer).in_channels


def channels_out(layer: nn.Module) -> int:
    """Return the channels that a layer makes."""
    return layer.out_features if isinstance(layer, nn.Linear) else _convolution(layer).out_channels


def layer_like(layer: Layer, num_in: int, num_out: int, bias: bool) -> Layer:
    """Return a new layer of the same kind between other numbers of channels."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(num_in, num_out, bias=bias)
    kept = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options: dict[str, Any] = {name: getattr(layer, name) for name in kept}
    return type(layer)(num_in, num_out, bias=bias, **options)


def middle_like(pair: Pair, units: int) -> list[nn.Module]:
    """Return what a pair has in its middle for ``units`` hidden units more, without dropout: it would draw random numbers.

    Raises:
        SlotError: A GroupNorm has groups of more channels than divide ``units``.
    """
    return [_middle_layer_like(part, units) for _, part in pair.middle if not isinstance(part, _DROPOUTS)]


def _middle_layer_like(part: nn.Module, units: int) -> nn.Module:
    if isinstance(part, nn.GroupNorm):
        per_group = part.num_channels // part.num_groups
        if units % per_group:
            raise SlotError(
                "must get whole groups of the GroupNorm between the layers: "
                f"`units` must be a multiple of {per_group}, got {units}."
            )
        return nn.GroupNorm(units // per_group, units, eps=part.eps, affine=part.affine)
    if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        return type(part)(
            units, eps=part.eps, momentum=part.momentum, affine=part.affine, track_running_stats=part.track_running_stats
        )
    kind: Any = type(part)
    return kind(**{name: getattr(part, name) for name in getattr(kind, "__constants__", ())})


def has_norm(pair: Pair) -> bool:
    """Whether the hidden units are normalised."""
    return any(isinstance(part, _NORMS) for _, part in pair.middle)


def slope_at_zero(pair: Pair) -> tuple[float, float]:
    """Return what the activations between make of zero, and their slope there as autograd has it."""
    zero = torch.zeros(1, requires_grad=True)
    value = zero
    with torch.enable_grad():
        for _, part in pair.middle:
            if isinstance(part, _ELEMENTWISE):
                value = _middle_layer_like(part, 1)(value * 1.0)  # a leaf must not be written to in place
        (slope,) = torch.autograd.grad(value.sum(), zero) if value is not zero else (torch.ones(1),)
    return float(value.detach()), float(slope)


def _convolution(layer: nn.Module) -> nn.Conv1d | nn.Conv2d:
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return layer
