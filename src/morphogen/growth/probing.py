"""Probing a host: what flows at its growth points, found by one forward pass that leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth.operators import Seed
from morphogen.state import draw_from
from morphogen.state.generators import read_global_generators, write_global_generators

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def example_call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for a forward pass on ``example``: a tensor, a tuple of arguments or a dict of them."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def probe(host: nn.Module, paths: Mapping[str, str], example: Example) -> dict[str, Tensor]:
    """Return the output of each named submodule on ``example``: slot -> feature, detached.

    The pass runs in eval mode without gradients and draws from a generator of its own; buffers, train/eval modes and global
    generators are as before afterwards.

    Args:
        host: The module.
        paths: Slot -> name of a submodule.
        example: Input of one forward pass.

    Raises:
        SlotError: A submodule is called not once, or its output is not a floating-point tensor.
    """
    outputs: dict[str, list[object]] = {slot: [] for slot in paths}

    def recorder(slot: str) -> Any:
        def record(module: nn.Module, args: Any, output: object) -> None:
            outputs[slot].append(output)

        return record

    args, kwargs = example_call(example)
    with contextlib.ExitStack() as stack:
        for slot, path in paths.items():
            stack.callback(host.get_submodule(path).register_forward_hook(recorder(slot), prepend=True).remove)
        stack.enter_context(untouched(host))
        host(*args, **kwargs)
    return {slot: _single_tensor(slot, paths[slot], found) for slot, found in outputs.items()}


def _single_tensor(slot: str, path: str, found: list[object]) -> Tensor:
    if len(found) != 1:
        raise SlotError(
            f"slot {slot!r}: submodule `{path}` must be called once in a forward pass, was called {len(found)} times. "
            "Choose another growth point."
        )
    if not isinstance(found[0], Tensor):
        raise SlotError(
            f"slot {slot!r}: submodule `{path}` must return a tensor, returns {type(found[0]).__name__}. "
            "Choose a submodule inside it."
        )
    if not found[0].is_floating_point():
        raise SlotError(
            f"slot {slot!r}: submodule `{path}` must return floating-point numbers, returns {found[0].dtype}. "
            "Choose a growth point behind an embedding or a cast."
        )
    return found[0].detach()


def try_out(slot: str, seed: Seed, feature: Tensor) -> None:
    """Run a newborn seed on ``feature`` without a trace.

    Raises:
        SlotError: s(h) is no tensor of the shape of the feature, or the feature was written to.
    """
    before = feature.clone()
    with untouched(seed):
        found: object = seed.body(feature)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != tuple(feature.shape):
            raise SlotError(
                f"slot {slot!r} needs a blueprint whose s(h) is a tensor of shape {tuple(feature.shape)}, got {shape}. "
                "Mend the blueprint."
            )
        seed(feature)
    if not torch.equal(before, feature) and not bool(before.isnan().any()):
        raise SlotError(f"slot {slot!r}: a blueprint must not write to its input, this one does. Use no in-place layer on it.")


@contextlib.contextmanager
def untouched(module: nn.Module) -> Generator[None]:
    """Within the block ``module`` is in eval mode, without gradients, drawing from its own stream; then it is as before."""
    modes = [(part, part.training) for part in module.modules()]
    tables = [part._buffers for part in module.modules()]  # pyright: ignore[reportPrivateUsage]
    entries = [dict(table) for table in tables]  # forward may replace a buffer as well as write to it
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    chance = read_global_generators()
    module.eval()
    try:
        with torch.no_grad(), draw_from(torch.Generator().manual_seed(0)):
            yield
    finally:
        write_global_generators(chance)
        for part, training in modes:
            part.training = training
        for table, before in zip(tables, entries, strict=True):
            table.clear()
            table.update(before)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
