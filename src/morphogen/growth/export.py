"""Export: a growing model as a plain module that knows nothing of growth."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from morphogen.growth.operators import Seed
from morphogen.growth.slots import SeedSlot


def plain_module(host: nn.Module, slots: Mapping[str, SeedSlot]) -> nn.Module:
    """Return a copy of ``host`` in eval mode with the acting seeds built into it, and no hook of ours.

    Each grown submodule becomes a ``torch.fx.GraphModule`` made of the submodule and the seed's torch layers, so the result
    consists of the host's own classes and torch's. It trains, moves and saves like any other module.
    """
    with _unhooked(host, slots):
        plain = copy.deepcopy(host)
    for slot in slots.values():
        if slot.seed is None or slot.mix not in ("blend", "full"):
            continue
        grown = _grown(plain.get_submodule(slot.site.path), copy.deepcopy(slot.seed), slot.state.alpha)
        plain = _replaced(plain, slot.site.path, grown)
    return plain.eval()


@contextlib.contextmanager
def _unhooked(host: nn.Module, slots: Mapping[str, SeedSlot]) -> Iterator[None]:
    """Take our hooks off while the host is copied; other people's hooks stay and are copied."""
    removed: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for slot in slots.values():
        hooks: dict[int, Any] = host.get_submodule(slot.site.path)._forward_hooks
        removed.append((hooks, dict(hooks)))
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is slot]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in removed:
            hooks.clear()
            hooks.update(before)


def _replaced(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
    return root


class _Grown(nn.Module):
    """The submodule with its seed, in the form that is traced into plain operations."""

    def __init__(self, base: nn.Module, seed: Seed, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.seed = seed
        self._alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        residual = self.seed(h)
        return h + (residual if self._alpha == 1.0 else residual * self._alpha)


class _Tracer(fx.Tracer):
    """Traces through our modules down to torch's; the host's submodule is kept whole, whatever its class."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "base" or super().is_leaf_module(m, module_qualified_name)


def _grown(base: nn.Module, seed: Seed, alpha: float) -> nn.Module:
    module = _Grown(base, seed, alpha)
    return fx.GraphModule(module, _Tracer().trace(module), class_name="Grown")
