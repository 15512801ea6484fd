"""What is wrong with a run, in one line for each fault."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from morphogen.state import surgery
from morphogen.state.inventory import all_finite, module_tensors
from morphogen.state.parts import Parts, prefix


def diagnose(parts: Parts, names: Mapping[int, str]) -> list[str]:
    """Return the orphaned, duplicated, untracked, misshapen and non-finite parameters of a run, by name; none if sound.

    Args:
        parts: The run.
        names: ``id(parameter)`` -> name, of live parameters and of those that were live when the optimizer got them.
    """
    return diagnose_structure(parts, names) + _not_finite(parts, _held_names(parts, names))


def diagnose_structure(parts: Parts, names: Mapping[int, str]) -> list[str]:
    """Return what :func:`diagnose` does without looking at any value."""
    held = _held(parts)
    live = {id(parameter): name for name, parameter in parts.parameters().items()}
    problems: list[str] = []
    for key, parameters in held.items():
        name = names.get(key, f"of shape {tuple(parameters[0].shape)}")
        if key not in live:
            problems.append(f"orphaned: the optimizer steps `{name}`, which is no longer in the model")
        if len(parameters) > 1:
            problems.append(f"duplicated: `{name}` is stepped {len(parameters)} times")
    if parts.optimizers:  # an EMA among the extras may be trainable: nobody means to step it
        ours = {id(parameter) for module in parts.models.values() for parameter in module.parameters()}
        problems += [
            f"untracked: `{name}` is trainable but in no optimizer"
            for name, parameter in parts.parameters().items()
            if parameter.requires_grad and id(parameter) in ours and id(parameter) not in held
        ]
    known = _held_names(parts, names)
    for optimizer in parts.optimizers.values():
        problems += [f"misshapen: {line}" for line in surgery.misshapen(optimizer, known)]
    problems += [
        f"misshapen: the gradient of `{known[key]}` is {tuple(parameter.grad.shape)}, the parameter {tuple(parameter.shape)}"
        for key, (parameter, *_) in held.items()
        if parameter.grad is not None and parameter.grad.shape != parameter.shape
    ]
    return problems


def _held(parts: Parts) -> dict[int, list[Parameter]]:
    """Return id -> every occurrence of each parameter that an optimizer steps."""
    held: dict[int, list[Parameter]] = collections.defaultdict(list)
    for optimizer in parts.optimizers.values():
        for parameter in surgery.parameters_of(optimizer):
            held[id(parameter)].append(parameter)
    return held


def _held_names(parts: Parts, names: Mapping[int, str]) -> dict[int, str]:
    live = {id(parameter): name for name, parameter in parts.parameters().items()}
    return {key: live.get(key, names.get(key, "?")) for key in _held(parts)}


def _not_finite(parts: Parts, held: Mapping[int, str]) -> list[str]:
    tensors = {f"extras.{name}": tensor for name, tensor in parts.tensor_extras().items()}
    for part, module in parts.modules().items():
        tensors |= {f"{prefix(part)}{name}": tensor for name, tensor in module_tensors(module).tensors.items()}
    for optimizer in parts.optimizers.values():
        for name, values in surgery.read(optimizer, held).state.items():
            tensors |= {f"{key} of {name}": value for key, value in values.items() if isinstance(value, Tensor)}
    if all_finite(tensors.values()):
        return []
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in floating.items()}
    return [
        f"non-finite: `{name}` holds {count} of {floating[name].numel()} values that are NaN or Inf"
        for name, count in counts.items()
        if count
    ]
