"""Probing a host: what flows at its growth points, found by one forward pass that leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.state import draw_from

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
        SlotError: A submodule is called not once, or its output is not a tensor.
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
    return found[0].detach()


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Within the block ``module`` is in eval mode, without gradients, drawing from its own stream; then it is as before."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    module.eval()
    try:
        with torch.no_grad(), draw_from(torch.Generator().manual_seed(0)):
            yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
