"""Whether an optimizer's recorded state fits another optimizer: pure questions about records, asked before any change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from morphogen.state.records import OptimizerRecord

FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
"""State keys that average gradients linearly: momentum. Everything else is a second moment, a count or bookkeeping."""

_PARAMETER_SHAPED = FIRST_MOMENTS | {
    *("exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "acc_delta", "sum", "exp_inf"),
    *("prev", "step_size", "ax", "variance"),
}
_STRUCTURE = ("amsgrad", "centered", "capturable", "nesterov")


def misfits(kind: type[Optimizer], record: OptimizerRecord, parameters: Mapping[str, Parameter]) -> list[str]:
    """Return why ``record`` cannot be written into a ``kind`` of optimizer: one line for each problem, none if it fits."""
    problems: list[str] = []
    if record.kind != kind.__name__:
        problems.append(f"optimizer is {kind.__name__}, the snapshot's was {record.kind}")
    problems += [f"optimizer parameter `{name}` is not in the model" for name in record.names if name not in parameters]
    grouped = set(record.names)
    for name, state in record.state.items():
        if name not in grouped:
            problems.append(f"the snapshot has moments of `{name}`, which is in no group of its optimizer")
        elif name in parameters:
            problems += misshapen(kind, name, state, parameters[name])
    return problems


def misshapen(kind: type[Optimizer], name: str, state: Mapping[str, Any], parameter: Parameter) -> list[str]:
    """Return one line for each moment that has not the shape of its parameter; a fused step would corrupt memory."""
    if not kind.__module__.startswith("torch.optim"):
        return []  # another library's moments may have any shape
    return [
        f"moment `{key}` of `{name}` is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
        for key, value in state.items()
        if key in _PARAMETER_SHAPED and isinstance(value, Tensor) and value.shape != parameter.shape
    ]


def copy_misfits(
    kind: type[Optimizer], ours: OptimizerRecord, theirs: OptimizerRecord, parameters: Mapping[str, Parameter]
) -> list[str]:
    """Return why their moments cannot be given to our optimizer as they are; empty if they can."""
    problems = misfits(kind, theirs, parameters)
    held, offered = set(ours.names), set(theirs.names)
    problems += [f"the source has no moments for `{name}`" for name in ours.names if name not in offered]
    lost = [name for name in theirs.state if name in parameters and name not in held and parameters[name].requires_grad]
    problems += [f"the target's optimizer does not hold `{name}`" for name in lost]
    return problems + _structural_misfits(kind, ours, theirs)


def _structural_misfits(kind: type[Optimizer], ours: OptimizerRecord, theirs: OptimizerRecord) -> list[str]:
    """What decides which moments there are must agree."""
    problems: list[str] = []
    for option in _STRUCTURE:
        here, there = ({bool(group.options.get(option)) for group in record.groups} for record in (ours, theirs))
        if here != there:
            problems.append(f"option `{option}` is {sorted(here)} here and {sorted(there)} in the source")
    if issubclass(kind, LBFGS) and ours.names != theirs.names:
        problems.append("LBFGS holds one flat history of all parameters, and theirs are in another order")
    return problems


def usable_state(
    kind: type[Optimizer],
    ours: OptimizerRecord,
    theirs: OptimizerRecord,
    parameters: Mapping[str, Parameter],
    max_ratio: float = 10.0,
) -> dict[str, Mapping[str, Any]]:
    """Return the part of another run's state that is safe to take over: same kind, fitting, finite, at a like rate.

    Args:
        kind: The class of our optimizer.
        ours: Our optimizer.
        theirs: The other run's optimizer.
        parameters: Name -> parameter of our run.
        max_ratio: How far apart the two learning rates of a parameter may be, as a factor either way.
    """
    if theirs.kind != kind.__name__ or _structural_misfits(kind, ours, theirs):
        return {}
    ratios = rate_ratios(ours, theirs)
    return {
        name: values
        for name, values in theirs.state.items()
        if 1 / max_ratio <= ratios.get(name, 0.0) <= max_ratio
        and not misshapen(kind, name, values, parameters[name])
        and all(bool(torch.isfinite(tensor).all()) for tensor in _tensors_in(values))
    }


def rate_ratios(ours: OptimizerRecord, theirs: OptimizerRecord) -> dict[str, float]:
    """Return their learning rate / our learning rate for each parameter that both hold; 1 where a rate is zero."""
    own, other = (
        {name: float(group.options["lr"]) for group in record.groups for name in group.names} for record in (ours, theirs)
    )
    return {name: other[name] / own[name] if own[name] > 0.0 and other[name] > 0.0 else 1.0 for name in own if name in other}


def _tensors_in(values: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in values.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                yield item
