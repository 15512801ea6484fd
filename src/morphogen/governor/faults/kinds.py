"""The table of fault kinds: one row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from morphogen.governor.faults.injection import Injection

Family = Literal["non_finite", "spike", "divergence", "lobotomy", "silent"]
FAMILIES: tuple[Family, ...] = ("non_finite", "spike", "divergence", "lobotomy", "silent")
_HALF_MAX = 65504.0
_BITS = {
    torch.float64: (torch.int64, 62),
    torch.float32: (torch.int32, 30),
    torch.float16: (torch.int16, 14),
    torch.bfloat16: (torch.int16, 14),
}


@dataclass(frozen=True)
class FaultKind:
    """A kind of fault.

    Attributes:
        family: "non_finite", "spike", "divergence", "lobotomy" (it forgot what it knew) or "silent" (the loss shows nothing).
        description: One line, ``k`` being the strength.
        through: What it gets hold of: "inputs", "outputs", "gradients", "labels", "weights", "buffers", "moments" or
            "learning rates".
        effect: Puts it into one step.
        strength: Default of ``k``.
        steps: Default number of steps in a row.
    """

    family: Family
    description: str
    through: str
    effect: Callable[[Injection], None]
    strength: float = 1.0
    steps: int = 1


# -- inputs, outputs, gradients, labels: for the step alone ----------------------------------------------------------


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor * 0.0 + value  # unlike a new tensor, it keeps its place in the graph


def _through_half(tensor: Tensor, strength: float) -> Tensor:
    """Return ``tensor`` after float16 at a scale that puts its largest value at ``strength`` times the largest float16."""
    scale = strength * _HALF_MAX / tensor.detach().abs().max().clamp_min(torch.finfo(tensor.dtype).tiny)
    return (tensor * scale).half().to(tensor.dtype) / scale


def _deviation(tensor: Tensor) -> Tensor:
    return tensor.detach().std(correction=0)


def _one_gradient_nan(run: Injection) -> None:
    parameters = run.weights()
    run.on_gradients(_filled(math.nan), [parameters[run.integer(len(parameters))]])


def _one_gradient_value_inf(run: Injection) -> None:
    parameters = run.weights()
    parameter = parameters[run.integer(len(parameters))]
    where = run.integer(parameter.numel())

    def change(gradient: Tensor) -> Tensor:
        changed = gradient.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[where] = math.inf
        return changed

    run.on_gradients(change, [parameter])


def _gradient_noise(run: Injection) -> None:
    def change(gradient: Tensor) -> Tensor:
        return gradient + run.strength * gradient.square().mean().sqrt() * run.normal(gradient)

    run.on_gradients(change)


def _frozen_body(run: Injection) -> None:
    head = {id(parameter) for parameter in run.layers()[-1].parameters()}
    body = [parameter for parameter in run.weights() if id(parameter) not in head]
    run.on_gradients(torch.zeros_like, body)


def _shuffled_labels(run: Injection) -> None:
    def change(labels: Tensor) -> Tensor:
        order = torch.randperm(len(labels), generator=run.generator, device=run.generator.device)
        return labels[order.to(labels.device)]

    run.on_labels(change)


# -- weights, buffers: for good --------------------------------------------------------------------------------------


@torch.no_grad()
def _weight_noise(run: Injection) -> None:
    for parameter in run.weights():
        parameter.add_(run.normal(parameter) * (run.strength * parameter.square().mean().sqrt()))


@torch.no_grad()
def _weight_scale(run: Injection) -> None:
    for parameter in run.weights():
        parameter.mul_(run.strength)


@torch.no_grad()
def _layer_scale(run: Injection) -> None:
    layers = run.layers()
    _weight_of(layers[run.integer(len(layers))]).mul_(run.strength)


@torch.no_grad()
def _weight_nan(run: Injection) -> None:
    weight = _weight_of(run.layers()[-1])
    weight[_place(weight, run.integer(weight.numel()))] = math.nan


@torch.no_grad()
def _exponent_flip(run: Injection) -> None:
    """Flip the highest exponent bit: below 2 in size becomes huge, infinite or NaN, above 2 tiny."""
    weights = [_weight_of(layer) for layer in run.layers() if _weight_of(layer).dtype in _BITS]
    for _ in range(max(1, round(run.strength))):
        weight = weights[run.integer(len(weights))]
        integers, bit = _BITS[weight.dtype]
        bits = weight.detach().view(integers)
        bits[_place(weight, run.integer(weight.numel()))] ^= 1 << bit


@torch.no_grad()
def _head_scale(run: Injection) -> None:
    for parameter in run.layers()[-1].parameters():
        parameter.mul_(run.strength)


@torch.no_grad()
def _head_zero(run: Injection) -> None:
    for parameter in run.layers()[-1].parameters():
        parameter.zero_()


@torch.no_grad()
def _head_bias(run: Injection) -> None:
    biases = [layer.bias for layer in run.layers()[-1:] if isinstance(layer.bias, Tensor)]
    if not biases:
        raise ValueError("`kind` must fit the run: head_bias needs a last layer with a bias. Choose another kind.")
    biases[0][run.integer(len(biases[0]))] += run.strength


@torch.no_grad()
def _dead_units(run: Injection) -> None:
    hidden = run.layers()[:-1]
    if not hidden:
        raise ValueError("`kind` must fit the run: dead_units needs a hidden layer, and there is none. Choose another kind.")
    for layer in hidden:
        weight = _weight_of(layer)
        order = torch.randperm(len(weight), generator=run.generator, device=run.generator.device)
        dead = order[: round(run.strength * len(weight))].to(weight.device)
        for parameter in layer.parameters():
            parameter[dead] = 0.0


def _moved_statistics(run: Injection) -> None:
    """Move running statistics as one batch does whose activations are ``strength`` times as large as usual."""
    share = 0.1
    for variance in run.statistics("running_var"):
        variance.mul_(1 - share + share * run.strength**2)
    for mean in run.statistics("running_mean"):
        mean.mul_(1 - share + share * run.strength)


def _scaled_variances(run: Injection) -> None:
    for variance in run.statistics("running_var"):
        variance.mul_(run.strength)


def _nan_statistics(run: Injection) -> None:
    for name in ("running_mean", "running_var"):
        for buffer in run.statistics(name):
            buffer.fill_(math.nan)


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _place(tensor: Tensor, index: int) -> tuple[int, ...]:
    return tuple(int(place) for place in torch.unravel_index(torch.tensor(index), tensor.shape))


_F = FaultKind
KINDS: dict[str, FaultKind] = {
    # non-finite
    "nan_input": _F("non_finite", "one batch of inputs is all NaN", "inputs", lambda run: run.on_inputs(_filled(math.nan))),
    "inf_input": _F("non_finite", "one batch of inputs is all Inf", "inputs", lambda run: run.on_inputs(_filled(math.inf))),
    "nan_output": _F(
        "non_finite", "the outputs, and so the loss, are NaN", "outputs", lambda run: run.on_outputs(_filled(math.nan))
    ),
    "half_overflow": _F(
        "non_finite",
        "outputs go through float16, the largest at k times its range",
        "outputs",
        lambda run: run.on_outputs(lambda outputs: _through_half(outputs, run.strength)),
        2.0,
    ),
    "nan_gradient": _F("non_finite", "the gradient of one drawn parameter is NaN", "gradients", _one_gradient_nan),
    "inf_gradient": _F("non_finite", "one drawn value of a gradient is Inf", "gradients", _one_gradient_value_inf),
    "half_gradient": _F(
        "non_finite",
        "gradients go through float16, the largest of each at k times its range",
        "gradients",
        lambda run: run.on_gradients(lambda gradient: _through_half(gradient, run.strength)),
        2.0,
    ),
    "exponent_flip": _F("non_finite", "the highest exponent bit of k drawn weights flips", "weights", _exponent_flip),
    "nan_weight": _F("non_finite", "one drawn weight of the last layer is NaN", "weights", _weight_nan),
    # spike
    "bad_batch": _F(
        "spike",
        "one batch of inputs is k times as large",
        "inputs",
        lambda run: run.on_inputs(lambda inputs: inputs * run.strength),
        30.0,
    ),
    "noise_batch": _F(
        "spike",
        "one batch of inputs is noise of k times their deviation",
        "inputs",
        lambda run: run.on_inputs(lambda inputs: run.strength * _deviation(inputs) * run.normal(inputs)),
        10.0,
    ),
    "output_scale": _F(
        "spike",
        "the outputs of one step are k times as large",
        "outputs",
        lambda run: run.on_outputs(lambda outputs: outputs * run.strength),
        30.0,
    ),
    "weight_noise": _F("spike", "each weight gets noise of k times its tensor's own size", "weights", _weight_noise, 3.0),
    "layer_scale": _F("spike", "the weights of one drawn layer are multiplied by k", "weights", _layer_scale, 10.0),
    "gradient_scale": _F(
        "spike",
        "the gradients of one step are multiplied by k",
        "gradients",
        lambda run: run.on_gradients(lambda gradient: gradient * run.strength),
        1e4,
    ),
    "gradient_noise": _F("spike", "gradients get noise of k times their own size", "gradients", _gradient_noise, 100.0, 3),
    # divergence
    "lr_spike": _F(
        "divergence",
        "learning rates are k times as high for a few steps",
        "learning rates",
        Injection.scale_learning_rates,
        100.0,
        5,
    ),
    "lr_high": _F(
        "divergence",
        "learning rates are k times as high for some tens of steps",
        "learning rates",
        Injection.scale_learning_rates,
        20.0,
        50,
    ),
    "second_moment_zero": _F(
        "divergence", "second moments are zeroed, `step` is kept", "moments", lambda run: run.scale_moments(second=0.0)
    ),
    "second_moment_scale": _F(
        "divergence",
        "second moments are multiplied by k, `step` is kept",
        "moments",
        lambda run: run.scale_moments(second=run.strength),
        1e-6,
    ),
    "momentum_scale": _F(
        "divergence", "first moments are multiplied by k", "moments", lambda run: run.scale_moments(first=run.strength), 100.0
    ),
    "weight_growth": _F("divergence", "all weights are multiplied by k in each step", "weights", _weight_scale, 1.05, 40),
    "weight_drift": _F(
        "divergence", "in each step each weight gets noise of k times its tensor's size", "weights", _weight_noise, 0.1, 30
    ),
    "sign_flip": _F(
        "divergence",
        "gradients point the wrong way, k times as long",
        "gradients",
        lambda run: run.on_gradients(lambda gradient: -run.strength * gradient),
        1.0,
        30,
    ),
    # lobotomy
    "head_zero": _F("lobotomy", "weights and bias of the last layer are zero", "weights", _head_zero),
    "head_bias": _F(
        "lobotomy", "one drawn bias of the last layer grows by k: always the same answer", "weights", _head_bias, 30.0
    ),
    "dead_units": _F("lobotomy", "a share k of the units of each hidden layer is zeroed", "weights", _dead_units, 0.9),
    "head_decay": _F(
        "lobotomy", "the last layer is multiplied by k in each step, towards chance", "weights", _head_scale, 0.9, 40
    ),
    "weight_shrink": _F("lobotomy", "all weights are multiplied by k in each step", "weights", _weight_scale, 0.95, 40),
    "label_shuffle": _F("lobotomy", "labels are shuffled within each batch", "labels", _shuffled_labels, 1.0, 40),
    "label_constant": _F(
        "lobotomy",
        "all labels of a batch are its first one",
        "labels",
        lambda run: run.on_labels(lambda labels: labels[:1].expand_as(labels)),
        1.0,
        30,
    ),
    "blank_input": _F(
        "lobotomy", "all inputs are zero: a dead sensor", "inputs", lambda run: run.on_inputs(_filled(0.0)), 1.0, 40
    ),
    # silent
    "no_gradient": _F(
        "silent", "all gradients are zero", "gradients", lambda run: run.on_gradients(torch.zeros_like), 1.0, 100
    ),
    "frozen_body": _F("silent", "gradients of all but the last layer are zero", "gradients", _frozen_body, 1.0, 100),
    "buffers_poisoned": _F(
        "silent", "running statistics move as by one batch k times as large", "buffers", _moved_statistics, 1e4
    ),
    "buffers_drift": _F("silent", "running variances are multiplied by k in each step", "buffers", _scaled_variances, 1.5, 40),
    "buffers_shrunk": _F(
        "silent", "running variances are multiplied by k in each step", "buffers", _scaled_variances, 0.5, 100
    ),
    "buffers_nan": _F("silent", "running statistics are NaN", "buffers", _nan_statistics),
}
"""Every kind by name; ``ALIASES`` are short names for two of them."""

ALIASES = {"nan": "nan_input", "spike": "weight_noise"}
