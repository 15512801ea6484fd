"""Export: a growing model as a plain module that knows nothing of growth."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
from collections.abc import Generator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth.operators import Seed
from morphogen.growth.probing import Example, example_call, untouched
from morphogen.growth.slots import SeedSlot, hooks_of

_HOOK_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def plain_module(host: nn.Module, slots: Mapping[str, SeedSlot]) -> nn.Module:
    """Return a copy of ``host`` in eval mode with the acting seeds built into it, and no hook of ours.

    Each grown submodule becomes a ``torch.fx.GraphModule`` made of the submodule and the seed's torch layers, so the result
    consists of the host's own classes and torch's. It trains, moves and saves like any other module.
    """
    behind = {name: _hooks_behind(host, slot) for name, slot in slots.items()}
    with _unhooked(host, slots):
        plain = copy.deepcopy(host)
    acting = [slot for slot in slots.values() if slot.seed is not None and slot.mix in ("blend", "full")]
    for slot in sorted(acting, key=lambda slot: _depth(slot.site.path), reverse=True):  # a path leads through its parents
        base = plain.get_submodule(slot.site.path)
        grown = _grown(base, copy.deepcopy(cast("Seed", slot.seed)), float(slot.alpha))
        _move_hooks(base, grown, behind[slot.name])
        plain = _replaced(plain, base, grown)
    return plain.eval()


def check_same(host: nn.Module, plain: nn.Module, example: Example) -> None:
    """Run both modules on ``example``; SlotError if the plain one computes something else, or cannot run."""
    args, kwargs = example_call(example)
    with untouched(host):
        expected = pytree.tree_leaves(host(*args, **kwargs))
    try:
        with untouched(plain):
            found = pytree.tree_leaves(plain(*args, **kwargs))
    except (AttributeError, TypeError) as error:
        raise SlotError(
            f"the host must call its grown submodules and no more, to be exported: {error}. "
            "Move the growth point to a submodule whose attributes the host does not use."
        ) from error
    for ours, theirs in zip(expected, found, strict=True):
        if isinstance(ours, Tensor) and not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4, equal_nan=True):
            raise SlotError(
                "the exported module must compute what the model does, and does not: the host reaches a grown submodule "
                "other than through its registered name. Register it once, and call it by that name."
            )


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _is_ours(hook: object, slot: SeedSlot) -> bool:
    return getattr(hook, "__self__", None) is slot


def _hooks_behind(host: nn.Module, slot: SeedSlot) -> list[int]:
    """Return the keys of hooks that run after ours, and so see the grown feature."""
    hooks = hooks_of(host.get_submodule(slot.site.path))
    keys = list(hooks)
    ours = next(index for index, key in enumerate(keys) if _is_ours(hooks[key], slot))
    return keys[ours + 1 :]


def _move_hooks(base: nn.Module, grown: nn.Module, keys: list[int]) -> None:
    for name in _HOOK_TABLES:
        table: dict[int, Any] = getattr(base, name)
        getattr(grown, name).update({key: table.pop(key) for key in keys if key in table})


@contextlib.contextmanager
def _unhooked(host: nn.Module, slots: Mapping[str, SeedSlot]) -> Generator[None]:
    """Take our hooks off while the host is copied; other people's hooks stay and are copied."""
    removed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for slot in slots.values():
        hooks = hooks_of(host.get_submodule(slot.site.path))
        removed.append((hooks, dict(hooks)))
        for key in [key for key, hook in hooks.items() if _is_ours(hook, slot)]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in reversed(removed):
            hooks.clear()
            hooks.update(before)


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Return ``root`` with ``new`` in place of ``old`` under every name it is registered by."""
    if root is old:
        return new
    places = [path.rpartition(".") for path, part in root.named_modules(remove_duplicate=False) if part is old]
    for parent, _, name in places:
        setattr(root.get_submodule(parent), name, new)
    return root


class _Tail(nn.Module):
    """What a seed adds to a feature, in the form that is traced into plain operations."""

    def __init__(self, seed: Seed, alpha: float) -> None:
        super().__init__()
        self.seed = seed
        self._alpha = alpha

    def forward(self, h: Tensor) -> Tensor:
        residual = self.seed(h)
        return h + (residual if self._alpha == 1.0 else residual * self._alpha)


def _grown(base: nn.Module, seed: Seed, alpha: float) -> nn.Module:
    """Return the submodule with its seed; it takes the arguments that the submodule takes."""
    root = nn.Module()
    root.base = base
    added = _Tail(seed, alpha)
    tail = fx.Tracer().trace(added)
    for node in tail.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = _taken_over(root, added, str(node.target))
    graph = fx.Graph()
    feature = next(node for node in tail.nodes if node.op == "placeholder")
    graph.output(graph.graph_copy(tail, {feature: _call_base(graph, base)}))
    return fx.GraphModule(root, graph, class_name="Grown")


def _taken_over(root: nn.Module, owner: nn.Module, path: str) -> str:
    """Put what ``owner`` has at ``path`` directly into ``root``, as a short path is looked up faster; return its name there."""
    found: object = operator.attrgetter(path)(owner)
    name = path.replace("seed.body.", "seed_").replace("seed.gate.", "gate_").replace(".", "_")
    while getattr(root, name, found) is not found:
        name += "_"
    if isinstance(found, nn.Module | nn.Parameter):
        setattr(root, name, found)
    else:
        root.register_buffer(name, cast("Tensor", found))
    return name


def _call_base(graph: fx.Graph, base: nn.Module) -> fx.Node:
    parameters = inspect.signature(base.forward).parameters.values()
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
        return graph.call_function(functional_call, (graph.get_attr("base"), {}, args, kwargs))
    nodes = {parameter: graph.placeholder(parameter.name, default_value=parameter.default) for parameter in parameters}
    named: dict[str, Any] = {
        parameter.name: node for parameter, node in nodes.items() if parameter.kind is parameter.KEYWORD_ONLY
    }
    return graph.call_module("base", tuple(node for node in nodes.values() if node not in named.values()), named)
