"""Every tensor of a module by name, and the copies between live tensors and buffers."""

from __future__ import annotations

import collections
import dataclasses
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
    """Parameters and buffers of a module, each once, and where they were found.

    Attributes:
        tensors: Name -> tensor, parameters and *all* buffers, also non-persistent ones, which no ``state_dict`` holds.
        aliases: Further names of the same object (tied weights, shared modules) -> the name it has in ``tensors``: the
            first in alphabetical order, so that it does not depend on the order of registration.
        modules: The module and all below it, by each of their names.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    modules: dict[str, nn.Module]

    def parameters(self) -> dict[str, Parameter]:
        """The parameters among the tensors, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, Parameter)}


def module_tensors(module: nn.Module) -> ModuleTensors:
    """Return the tensors of ``module``, aliased, in the order of ``named_modules``.

    Raises:
        StateMismatch: A parameter has no data yet (lazy module, meta device), or shares memory with itself.
    """
    names: dict[int, str] = {}
    found: list[Tensor] = []
    aliases: dict[str, str] = {}
    modules = dict(module.named_modules(remove_duplicate=False))
    for prefix, part in modules.items():
        for table in (part._parameters, part._buffers):  # pyright: ignore[reportPrivateUsage]
            for key, tensor in table.items():  # several times faster than named_parameters() of each module
                if tensor is None:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                if id(tensor) not in names:
                    names[id(tensor)] = name
                    found.append(tensor)
                    continue
                first, other = sorted((names[id(tensor)], name))
                names[id(tensor)] = first
                aliases |= {alias: first for alias, known in aliases.items() if known == other} | {other: first}
    tensors = {names[id(tensor)]: tensor for tensor in found}
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided or 0 in tensor.stride():
            _refuse_unusable(name, tensor)
    return ModuleTensors(tensors, aliases, modules)


def _refuse_unusable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or nn.parameter.is_lazy(tensor):
        raise StateMismatch(
            f"`{name}` must hold data, got a tensor on the meta device or of a lazy module. "
            "Materialise the model (one forward pass, or `to_empty`) before making it part of a run."
        )
    if tensor.layout is not torch.strided:
        raise StateMismatch(f"`{name}` must be dense, got a tensor of layout {tensor.layout}. Store `tensor.to_dense()`.")
    if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise StateMismatch(
            f"`{name}` must own each of its {tensor.numel()} values to be written back, got a tensor made by "
            "`expand`. Give the module `tensor.contiguous()`."
        )


def module_flags(found: ModuleTensors, path: str, loose: trees.TensorTable) -> dict[str, Json]:
    """Return what ``state_dict`` forgets, frozen parameters and modules in eval mode, and every ``get_extra_state``.

    Tensors inside extra states are cloned into ``loose`` under names below ``path``.
    """
    evaluating: list[Json] = [*sorted(name for name, part in found.modules.items() if not part.training)]
    frozen: list[Json] = [*sorted(name for name, tensor in found.parameters().items() if not tensor.requires_grad)]
    extra: dict[str, Json] = {
        name: trees.encode(part.get_extra_state(), loose, f"{path}.extra_state.{name}")
        for name, part in found.modules.items()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }
    return {"frozen": frozen, "evaluating": evaluating, "extra_state": extra}


def write_module_flags(found: ModuleTensors, flags: Mapping[str, Any], loose: Mapping[str, Tensor]) -> None:
    """Set what :func:`module_flags` returned; a flag that is not in ``flags`` stays."""
    for name, data in flags.get("extra_state", {}).items():
        if name in found.modules:
            found.modules[name].set_extra_state(trees.decode(data, loose))
    if "evaluating" in flags:
        evaluating = set(flags["evaluating"])
        for name, part in found.modules.items():
            part.training = name not in evaluating
    if "frozen" in flags:
        frozen = set(flags["frozen"])
        for name, parameter in found.parameters().items():
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
    """Copy each (target, source) pair, in as few calls as devices and dtypes allow. Shapes must be equal: see to it.

    Runs outside autograd; targets made in inference mode are written in inference mode, all others outside it, so that
    their version counters move and a stale graph cannot silently give wrong gradients.
    """
    batches: dict[object, tuple[list[Tensor], list[Tensor]]] = collections.defaultdict(lambda: ([], []))
    plain_targets, plain_sources = batches[None]
    for target, source in pairs:
        if target.is_cpu and source.is_cpu and not target.is_inference():
            plain_targets.append(target)
            plain_sources.append(source)
            continue
        # One launch for many tensors needs them to be alike.
        key = (target.is_inference(), target.device, source.device, target.dtype, source.dtype)
        targets, sources = batches[key]
        targets.append(target)
        sources.append(source)
    for targets, sources in batches.values():
        if not targets:
            continue
        with torch.inference_mode(targets[0].is_inference()), torch.no_grad():
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
