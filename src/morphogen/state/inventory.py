"""Every tensor of a module by name, and the copies between live tensors and buffers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from morphogen.errors import StateMismatch
from morphogen.state import trees
from morphogen.telemetry.events import Json

# What torch's own optimizers and gradient clipping are made of; no public name does the same in one call.
_foreach_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True)
class ModuleTensors:
    """Parameters and buffers of a module, each once.

    Attributes:
        tensors: Name -> tensor, parameters and *all* buffers, also non-persistent ones, which no ``state_dict`` holds.
        aliases: Further names of the same object (tied weights, shared modules) -> the name it has in ``tensors``: the
            first in alphabetical order, so that it does not depend on the order of registration.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]

    def parameters(self) -> dict[str, Parameter]:
        """The parameters among the tensors, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, Parameter)}


def module_tensors(module: nn.Module) -> ModuleTensors:
    """Return the tensors of ``module``, aliased, in the order of ``named_modules``.

    Raises:
        StateMismatch: A parameter has no data yet (lazy module, meta device), or shares memory with itself.
    """
    found: dict[int, Tensor] = {}
    names: dict[int, list[str]] = collections.defaultdict(list)
    for prefix, part in module.named_modules(remove_duplicate=False):
        parameters = part.named_parameters(prefix, recurse=False, remove_duplicate=False)
        buffers = part.named_buffers(prefix, recurse=False, remove_duplicate=False)
        for name, tensor in itertools.chain(parameters, buffers):
            found[id(tensor)] = tensor
            names[id(tensor)].append(name)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in found.items():
        name, *others = sorted(names[key])
        _refuse_unusable(name, tensor)
        tensors[name] = tensor
        aliases |= dict.fromkeys(others, name)
    return ModuleTensors(tensors, aliases)


def _refuse_unusable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        raise StateMismatch(
            f"`{name}` must hold data, got a tensor on the meta device or of a lazy module. "
            "Materialise the model (one forward pass, or `to_empty`) before making it part of a run."
        )
    if tensor.layout == torch.strided and 0 in tensor.stride():
        stretched = any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        if stretched:
            raise StateMismatch(
                f"`{name}` must own each of its {tensor.numel()} values to be written back, got a tensor made by "
                "`expand`. Give the module `tensor.contiguous()`."
            )


def module_flags(module: nn.Module, path: str, loose: trees.TensorTable) -> dict[str, Json]:
    """Return what ``state_dict`` forgets, frozen parameters and modules in eval mode, and every ``get_extra_state``.

    Tensors inside extra states are cloned into ``loose`` under names below ``path``.
    """
    evaluating: list[Json] = [name for name, part in module.named_modules(remove_duplicate=False) if not part.training]
    frozen: list[Json] = [
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    ]
    extra: dict[str, Json] = {
        name: trees.encode(part.get_extra_state(), loose, f"{path}.extra_state.{name}")
        for name, part in module.named_modules(remove_duplicate=False)
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }
    return {"frozen": frozen, "evaluating": evaluating, "extra_state": extra}


def write_module_flags(module: nn.Module, flags: Mapping[str, Any], loose: Mapping[str, Tensor]) -> None:
    """Set what :func:`module_flags` returned; a flag that is not in ``flags`` stays."""
    evaluating, frozen = (set(flags[kind]) if kind in flags else None for kind in ("evaluating", "frozen"))
    for name, part in module.named_modules(remove_duplicate=False):
        if evaluating is not None:
            part.training = name not in evaluating
        if name in flags.get("extra_state", ()):
            part.set_extra_state(trees.decode(flags["extra_state"][name], loose))
    if frozen is not None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)


def disagreements(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    """Return one line for each tensor that is missing, unexpected, or of another shape or dtype."""
    problems = [f"`{name}` is in the run and missing from the snapshot" for name in live if name not in saved]
    problems += [f"`{name}` is in the snapshot and missing from the run" for name in saved if name not in live]
    for name, tensor in live.items():
        other = saved.get(name)
        if other is not None and (other.shape != tensor.shape or other.dtype != tensor.dtype):
            ours, theirs = (f"{tuple(value.shape)} {value.dtype}" for value in (tensor, other))
            problems.append(f"`{name}` is {ours} in the run, {theirs} in the snapshot")
    return problems


def copy_all(pairs: Iterable[tuple[Tensor, Tensor]], non_blocking: bool = False) -> None:
    """Copy each (target, source) pair, in as few calls as devices and dtypes allow. Shapes must be equal.

    Runs outside autograd; targets made in inference mode are written in inference mode, all others outside it, so that
    their version counters move and a stale graph cannot silently give wrong gradients.
    """
    batches: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = collections.defaultdict(lambda: ([], []))
    for target, source in pairs:
        assert target.shape == source.shape, (target.shape, source.shape)
        key = (target.device, source.device, target.dtype, source.dtype, target.is_inference())
        batches[key][0].append(target)
        batches[key][1].append(source)
    for (*_, inference), (targets, sources) in batches.items():
        with torch.inference_mode(inference), torch.no_grad():
            _foreach_copy(targets, sources, non_blocking)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every floating tensor is finite: norms in one pass, and exactly only where a norm is suspicious."""
    by_device: dict[torch.device, list[Tensor]] = collections.defaultdict(list)
    for tensor in tensors:
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
            by_device[tensor.device].append(tensor.detach())
    for group in by_device.values():
        norms = torch.stack([norm.double() for norm in _foreach_norm(group)])
        if bool(torch.isfinite(norms).all()):
            continue
        if not all(bool(torch.isfinite(tensor).all()) for tensor in group):  # a norm of finite values may overflow
            return False
    return True
