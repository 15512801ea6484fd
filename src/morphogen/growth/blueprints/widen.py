"""Widen: more hidden units between two layers of the host.

Legend: x is the input of the host's submodule; W1, W2 are the weights of its two layers, W1', W2' those of the new units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.errors import SlotError
from morphogen.growth.blueprints.layers import one_of, zeroed
from morphogen.growth.blueprints.registry import Surroundings, blueprint
from morphogen.growth.pairs import (
    LAYOUTS_OF,
    Layer,
    Pair,
    channels_in,
    channels_out,
    find_pair,
    has_norm,
    layer_like,
    middle_like,
    slope_at_zero,
)
from morphogen.growth.probing import untouched

Init = Literal["zero_out", "net2net", "gradmax"]
_INITS = ("zero_out", "net2net", "gradmax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidenOptions:
    """Options of the blueprint "widen"; JSON data.

    Attributes:
        units: Hidden units added, >= 1.
        init: What the new units start from. "zero_out": random incoming weights, as the first layer initialises, and zero
            outgoing. "net2net" (arXiv 1511.05641): incoming weights, bias and normalisation of randomly chosen units, plus
            noise. Outgoing weights are zero here, as a seed must not act at birth; there they are split between a unit and its
            copies. "gradmax" (arXiv 2201.05125): zero incoming weights, and the outgoing ones that give the incoming ones the
            largest gradient, found by :func:`gradmax_directions`.
        noise: With "net2net", standard deviation of the noise over that of the host's incoming weights, > 0; 0.01 unless told.
        directions: With "gradmax", what :func:`gradmax_directions` returned.
        first: Name of the first layer, relative to the growth point; not for an ``nn.Sequential``, which tells by itself.
        second: Name of the second layer.
        norm: Name of the normalisation between them, if any.
        activation: Name of the activation between them, or of a function such as "gelu", if any.
    """

    units: int = 8
    init: Init = "zero_out"
    noise: float | None = None
    directions: Sequence[Any] | None = None
    first: str | None = None
    second: str | None = None
    norm: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        """Check what needs no host."""
        if isinstance(self.units, bool) or not isinstance(cast("object", self.units), int) or self.units < 1:
            raise ValueError(f"`units` must be a whole number >= 1, got {self.units!r}. Add at least one.")
        one_of("init", self.init, _INITS)
        if self.noise is not None and (self.init != "net2net" or not 0.0 < self.noise < math.inf):
            raise ValueError(f'`noise` must be > 0 and for init "net2net" alone, got {self.noise} with {self.init!r}. Drop it.')
        if self.init == "gradmax" and self.directions is None:
            raise ValueError(
                '`directions` must be given with init "gradmax". Call morphogen.growth.blueprints.widen.gradmax_directions('
                "submodule, loss, units=...) and pass what it returns."
            )
        if self.init != "gradmax" and self.directions is not None:
            raise ValueError(f'`directions` must be left out with init {self.init!r}. They are for "gradmax" alone.')

    def pair_in(self, submodule: nn.Module) -> Pair:
        """Return the two layers that these options mean; SlotError or ValueError as :func:`find_pair`."""
        return find_pair(submodule, self.first, self.second, self.norm, self.activation)


@blueprint("widen", layouts=("NC", "NCL", "NLC", "NCHW"))
class Widen(nn.Module):
    """s(x) = W2' act(norm'(W1' x + b1')): 8 hidden units more, unless told, between two layers of the host.

    The growth point is a submodule that computes second(act(norm(first(x)))), with two Linear, Conv1d or Conv2d; norm and
    activation may be missing, dropout may lie between. The seed reads the submodule's *input* and lives through the same stages
    as any other. A merged fossil is part of the host's own two layers.

    New units have no dropout until they are merged, as a seed must not draw random numbers. s = 0 at birth: the outgoing
    weights are zero, or with init "gradmax" the incoming ones.

    Example:
        >>> from morphogen.growth import GrowableModel
        >>> host = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 2))
        >>> model = GrowableModel(host, points={"hidden": "0"}, example_input=torch.zeros(2, 4))
        >>> _ = model.germinate("hidden", blueprint="widen", options={"units": 3})
        >>> model.num_parameters() - sum(p.numel() for p in host.parameters())
        27
    """

    reads_input = True
    Options = WidenOptions

    def __init__(self, inner: Layer, middle: Sequence[nn.Module], outer: Layer) -> None:
        """Take over the layers."""
        super().__init__()
        self.inner = inner
        self.middle = nn.Sequential(*middle)
        self.outer = outer

    def forward(self, x: Tensor) -> Tensor:
        """Return s(x)."""
        return self.outer(self.middle(self.inner(x)))

    @classmethod
    def from_host(cls, place: Surroundings, **options: Any) -> Widen:
        """Build new units for the pair of layers in a submodule.

        Raises:
            SlotError: The submodule holds no such pair, or returns something else than the pair computes.
            ValueError: An option is out of range, or does not go with the layers.
        """
        told = WidenOptions(**options)
        pair = told.pair_in(place.submodule)
        _check_computes(pair, place)
        seed = cls(
            layer_like(pair.first[1], channels_in(pair.first[1]), told.units, pair.first[1].bias is not None),
            middle_like(pair, told.units),
            zeroed(layer_like(pair.second[1], told.units, channels_out(pair.second[1]), False)),
        )
        with torch.no_grad():
            if told.init == "net2net":
                seed.copy_units(pair, 0.01 if told.noise is None else told.noise, place.generator)
            elif told.init == "gradmax":
                seed.take_directions(pair, told)
        return seed

    @staticmethod
    def parameter_count_on(submodule: nn.Module, **options: Any) -> int:
        """Return what new units cost: for each its incoming and outgoing weights, bias and normalisation."""
        told = WidenOptions(**options)
        pair = told.pair_in(submodule)
        first, second = pair.first[1], pair.second[1]
        norms = sum(p.numel() for part in middle_like(pair, told.units) for p in part.parameters())
        per_unit = first.weight[0].numel() + (first.bias is not None) + second.weight[:, 0].numel()
        return told.units * per_unit + norms

    def copy_units(self, pair: Pair, noise: float, generator: torch.Generator) -> None:
        """Start from copies of randomly chosen units of the host."""
        chosen = _some_units(pair.num_hidden, self.inner.weight.shape[0], generator)
        weight = pair.first[1].weight.detach().cpu().float()
        spread = torch.randn(self.inner.weight.shape, generator=generator) * (noise * weight.std(correction=0))
        self.inner.weight.copy_(weight[chosen] + spread)
        if self.inner.bias is not None and pair.first[1].bias is not None:
            self.inner.bias.copy_(pair.first[1].bias.detach().cpu()[chosen])
        norms = [part for _, part in pair.middle if _per_channel(part)]
        for mine, theirs in zip((part for part in self.middle if _per_channel(part)), norms, strict=True):
            for name, tensor in _per_channel(mine).items():
                tensor.copy_(_per_channel(theirs)[name].detach().cpu()[chosen])

    def take_directions(self, pair: Pair, told: WidenOptions) -> None:
        """Start from zero incoming weights and the given outgoing ones, as long as the host's are on average."""
        _check_gradmax(pair)
        directions = torch.tensor(told.directions, dtype=torch.float32)
        wanted = (told.units, self.outer.weight[:, 0].numel())
        if tuple(directions.shape) != wanted:
            raise ValueError(
                f"`directions` must be of shape {wanted}, got {tuple(directions.shape)}. Find them for this pair and units."
            )
        host = pair.second[1].weight.detach().cpu().float()
        length = host.transpose(0, 1).flatten(1).norm(dim=1).mean()
        kernel = self.outer.weight.shape[2:]
        self.outer.weight.copy_((length * directions).reshape(told.units, -1, *kernel).transpose(0, 1))
        zeroed(self.inner)


def gradmax_directions(
    submodule: nn.Module,
    loss: Callable[[], Tensor],
    *,
    units: int,
    first: str | None = None,
    second: str | None = None,
    activation: str | None = None,
) -> list[list[float]]:
    """Return the outgoing weights that give new hidden units the largest gradient: option ``directions`` of "widen".

    With zero incoming weights the gradient of W1' is act'(0) W2'^T M, where M is the sum over samples (and positions) of
    (gradient of the loss at the output of the second layer) (input of the first)^T. Among W2' with orthogonal columns of one
    length, the left singular vectors of M with the largest singular values make it largest (GradMax, arXiv 2201.05125,
    section 3.2). For convolutions the rows and columns of M are channels with their places in the kernels.

    Args:
        submodule: Where the seed is to sit.
        loss: Runs the model once on a batch, which calls the submodule once, and returns the loss. The submodule is in eval
            mode meanwhile; what happens to gradients and buffers of the rest is up to it.
        units: Hidden units to be added.
        first: As for "widen".
        second: As for "widen".
        activation: As for "widen".

    Returns:
        Unit vectors, ``units`` rows, by decreasing singular value; scaled when the seed is built.

    Raises:
        SlotError: There is no such pair.
        ValueError: The activation is not zero at zero or is flat there, such as ReLU, whose slope at zero autograd has as 0; a
            normalisation lies between; or M has fewer than ``units`` singular values above zero.

    Example:
        >>> pair = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> found = gradmax_directions(pair, lambda: pair(torch.eye(3)).square().sum(), units=1)
        >>> round(sum(value**2 for value in found[0]), 4)
        1.0
    """
    pair = find_pair(submodule, first, second, None, activation)
    _check_gradmax(pair)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def note_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach())

    def note_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what comes next may write to it

    hooks = (pair.first[1].register_forward_pre_hook(note_input), pair.second[1].register_forward_hook(note_output))
    try:
        with untouched(submodule), torch.enable_grad():
            found = loss()
    finally:
        for hook in hooks:
            hook.remove()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(f"`loss` must call the submodule once, did so {len(outputs)} times. Run one forward pass in it.")
    (gradient,) = torch.autograd.grad(found, outputs[0])
    moment = _cross_moment(pair, inputs[0], gradient)
    vectors, values, _ = torch.linalg.svd(moment.double(), full_matrices=False)
    rank = int((values > values[0] * 1e-6).sum()) if bool(values[0] > 0.0) else 0
    if rank < units:
        raise ValueError(f"`units` must be <= {rank}, the rank of the gradient on this batch, got {units}. Add fewer units.")
    return vectors[:, :units].T.tolist()


def _cross_moment(pair: Pair, x: Tensor, gradient: Tensor) -> Tensor:
    """Return M, shape (channels out * kernel of the second, channels in * kernel of the first).

    It is the gradient of a second layer that reads, instead of hidden units, every tap of the first layer's kernel.
    """
    first, second = pair.first[1], pair.second[1]
    taps = first.weight[0].numel()
    eye = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(taps, *first.weight.shape[1:])
    with torch.enable_grad():
        weight = torch.zeros(second.weight.shape[0], taps, *second.weight.shape[2:], dtype=x.dtype, device=x.device)
        weight.requires_grad_()
        result = _apply(second, _apply(first, x, eye), weight)
        (moment,) = torch.autograd.grad(result, weight, gradient)
    return moment.movedim(1, -1).flatten(0, -2)


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Return what the layer computes with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return layer._conv_forward(x, weight, None)  # pyright: ignore[reportPrivateUsage]


def _check_gradmax(pair: Pair) -> None:
    value, slope = slope_at_zero(pair)
    if has_norm(pair):
        raise ValueError('init "gradmax" must have no normalisation between the layers: it blows up zero. Use "zero_out".')
    if value != 0.0 or slope == 0.0:
        raise ValueError(
            f'init "gradmax" must have an activation that is 0 at 0 with a slope, got {value:g} and slope {slope:g}: units '
            'with zero incoming weights would act at birth, or never learn. Use "zero_out".'
        )


def _check_computes(pair: Pair, place: Surroundings) -> None:
    if place.layout not in LAYOUTS_OF[type(pair.first[1])]:
        raise SlotError(f"must sit at layers for {place.layout}, is at {type(pair.first[1]).__name__}. Tell the layout.")
    with untouched(place.submodule):
        try:
            found = pair(place.source)
        except RuntimeError as error:
            raise SlotError(f"must sit at layers that can run on the submodule's input, which failed: {error}.") from error
    same = found.shape == place.feature.shape and torch.allclose(found, place.feature, rtol=1e-3, atol=1e-5, equal_nan=True)
    if not same:
        raise SlotError(
            "must sit at a pair of layers that computes what the submodule returns; second(act(norm(first(x)))) does not. Name "
            "the layers, or choose the submodule that holds these layers alone."
        )


def _some_units(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return indices drawn without repetition, as long as there are enough."""
    rounds = -(-wanted // available)
    return torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])[:wanted]


def _per_channel(part: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a normalisation that have one value per channel."""
    if not isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
        return {}
    named = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.ndim == 1}
