"""Probing a host: what flows at its growth points, found by one forward pass that leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth.features import Place, Site, element, not_a_tensor
from morphogen.growth.operators import Seed
from morphogen.state import draw_from
from morphogen.state.generators import read_global_generators, write_global_generators
from morphogen.state.inventory import copy_all

Result = TypeVar("Result")
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def example_call(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) for a forward pass on ``example``: a tensor, a tuple of arguments or a dict of them."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def probe(host: nn.Module, points: Mapping[str, Place], example: Example) -> dict[str, Tensor]:
    """Return the feature at each point on ``example``: slot -> tensor, detached, as the host has it.

    The pass runs in eval mode without gradients and draws from a generator of its own; buffers, train/eval modes and global
    generators are as before afterwards.

    Args:
        host: The module.
        points: Slot -> a submodule, and which element of its output is meant.
        example: Input of one forward pass.

    Raises:
        SlotError: A submodule is called not once, or its output is not a floating-point tensor.
    """
    calls = observe(host, {point.path for point in points.values()}, example)
    return {slot: single_feature(slot, point, calls[point.path]) for slot, point in points.items()}


def observe(host: nn.Module, paths: Iterable[str], example: Example) -> dict[str, list[object]]:
    """Return what each named submodule returns on ``example``, one entry for each call of it; see :func:`probe`."""
    outputs: dict[str, list[object]] = {path: [] for path in paths}

    def recorder(path: str) -> Any:
        def record(module: nn.Module, args: Any, output: object) -> None:
            outputs[path].append(output)

        return record

    args, kwargs = example_call(example)
    with contextlib.ExitStack() as stack:
        for path in outputs:
            stack.callback(host.get_submodule(path).register_forward_hook(recorder(path), prepend=True).remove)
        stack.enter_context(untouched(host))
        host(*args, **kwargs)
    return outputs


def single_feature(slot: str, point: Place, calls: list[object]) -> Tensor:
    """Return the feature in the one output of a submodule, detached; see :func:`probe`."""
    if len(calls) != 1:
        raise SlotError(
            f"slot {slot!r}: submodule `{point.path}` must be called once in a forward pass, was called {len(calls)} times. "
            "Choose another growth point."
        )
    found = element(calls[0], point.output)
    if not isinstance(found, Tensor):
        raise SlotError(f"slot {slot!r}: {not_a_tensor(point, calls[0])}")
    if not found.is_floating_point():
        raise SlotError(
            f"slot {slot!r}: submodule `{point.path}` must return floating-point numbers, returns {found.dtype}. "
            "Choose a growth point behind an embedding or a cast."
        )
    return found.detach()


def probe_call(slot: str, host: nn.Module, site: Site, example: Example) -> tuple[Tensor, Tensor]:
    """Return what goes into the submodule at ``site`` on ``example`` and the feature that comes out; see :func:`probe`.

    Both are copies with axes as seeds get them: the host may go on to write to them.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    args, kwargs = example_call(example)

    def record(module: nn.Module, given: tuple[Any, ...], output: object) -> None:
        try:
            calls.append((site.source(given).detach().clone(), site.feature(output, slot).detach().clone()))
        except TypeError as error:
            raise SlotError(str(error) if str(error).startswith("slot") else f"slot {slot!r}: {error}") from None

    handle = host.get_submodule(site.path).register_forward_hook(record, prepend=True)
    try:
        with untouched(host):
            host(*args, **kwargs)
    finally:
        handle.remove()
    return calls[0]


def try_out(slot: str, seed: Seed, feature: Tensor, source: Tensor | None = None) -> None:
    """Run a newborn seed on ``feature`` without a trace; ``source`` is the submodule's input, for a seed that reads it.

    Raises:
        SlotError: s(h) is no tensor of the shape of the feature, or the feature was written to.
    """
    given = feature if source is None else source
    before = given.clone()
    with untouched(seed):
        found: object = seed.body(given)
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != tuple(feature.shape):
            raise SlotError(
                f"slot {slot!r} needs a blueprint whose s(h) is a tensor of shape {tuple(feature.shape)}, got {shape}. "
                "Mend the blueprint."
            )
        seed(feature, source)
    if not torch.equal(before, given) and not bool(before.isnan().any()):
        raise SlotError(f"slot {slot!r}: a blueprint must not write to its input, this one does. Use no in-place layer on it.")


@contextlib.contextmanager
def untouched(module: nn.Module) -> Generator[None]:
    """Within the block ``module`` is in eval mode, without gradients, drawing from its own stream; then it is as before.

    So are the modules whose forward hooks run with it, such as the seeds of a host.
    """
    with _kept(module), draw_from(torch.Generator().manual_seed(0)):
        yield


@contextlib.contextmanager
def undisturbed(module: nn.Module, stream: torch.Generator) -> Generator[Callable[[Callable[[], Result]], Result]]:
    """Yield a function that runs passes of ``module`` as :func:`untouched` does, which draw from ``stream``; any may run twice.

    To watch every operation for draws costs more than the operations of a small network do. So passes go unwatched first, and
    once more, watched, only if torch drew from a global generator meanwhile.
    """
    with _kept(module) as put_back:

        def run(passes: Callable[[], Result]) -> Result:
            before = _torch_generators()
            result = passes()
            if all(map(torch.equal, _torch_generators(), before)):
                return result
            put_back()
            with draw_from(stream):
                return passes()

        yield run


@contextlib.contextmanager
def _kept(module: nn.Module) -> Generator[Callable[[], None]]:
    """Keep modes, buffers and global generators, see :func:`untouched`; yield what puts the latter two back at once."""
    parts = _run_with(module)
    modes = [(part, part.training) for part in parts]
    tables = [table for part in parts if (table := part._buffers)]  # pyright: ignore[reportPrivateUsage]
    entries = [dict(table) for table in tables]  # forward may replace a buffer as well as write to it
    buffers = [(buffer, buffer.detach().clone()) for table in tables for buffer in table.values() if buffer is not None]
    chance = read_global_generators()

    def put_back() -> None:
        write_global_generators(chance)
        for table, before in zip(tables, entries, strict=True):
            table.clear()
            table.update(before)
        copy_all(buffers)

    for part, training in modes:
        if training:
            part.training = False
    try:
        # A compiled module runs uncompiled: nothing is compiled for the sake of one pass, and draw_from breaks graphs.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield put_back
    finally:
        put_back()
        for part, training in modes:
            if part.training is not training:
                part.training = training


def _torch_generators() -> list[Tensor]:
    """Return the states of torch's global generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _run_with(module: nn.Module) -> list[nn.Module]:
    """Return all parts of ``module``, and of the modules whose methods are hooks on them."""
    parts = dict.fromkeys(module.modules())
    for part in list(parts):
        for hook in part._forward_hooks.values():  # pyright: ignore[reportPrivateUsage]
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, nn.Module):
                parts.update(dict.fromkeys(owner.modules()))
    return list(parts)
