"""Shadow passes: the network as it would be with its incubating seeds, and a gradient for these alone."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Collection, Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth.slots import SeedSlot
from morphogen.state import RandomStreams
from morphogen.state.generators import read_global_generators, write_global_generators

_ENTERING = threading.Lock()


class ShadowPasses:
    """One model's shadow passes: at most one at a time, by one thread.

    Chance: a pass draws from the stream named by the clock and by the state in which it finds torch's global generators; while
    these stand still, also by the number of passes since then. So a continued run draws the same again.
    """

    def __init__(self, streams: RandomStreams) -> None:
        """Keep the root of the streams."""
        self._streams = streams
        self._owner: int | None = None
        self._found: tuple[int, str] = (-1, "")
        self._passes = 0

    def check_none(self) -> None:
        """Raise SlotError while a pass is under way."""
        if self._owner is not None:
            raise SlotError(
                "a shadow pass is under way: no other can begin, and the model cannot be changed. Leave its block first."
            )

    @contextlib.contextmanager
    def run(self, model: nn.Module, host: nn.Module, slots: Mapping[str, SeedSlot], clock: int) -> Generator[None]:
        """Within the block passes through ``model`` are shadow passes; see ``GrowableModel.shadow``."""
        shadowed = _incubating(slots)
        with _ENTERING:
            self.check_none()
            self._owner = threading.get_ident()
        try:
            with (
                _uncompiled(),
                self._chance(clock),
                self._alone_and_detached(host),
                _held_constant(model, [slot.seed for slot in shadowed if slot.seed is not None]),
                _taking_part(shadowed),
            ):
                yield
        finally:
            self._owner = None

    @contextlib.contextmanager
    def _alone_and_detached(self, host: nn.Module) -> Generator[None]:
        """Within the block ``host`` is fed its inputs detached, and raises SlotError if another thread runs it."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if threading.get_ident() != self._owner:
                raise SlotError("the model must be run by one thread while a shadow pass is under way. Wait, or run a copy.")
            return pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))

        handle = host.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _chance(self, clock: int) -> Generator[None]:
        """Within the block the global generators of torch are at the start of a stream of this pass; all are as before then."""
        before = read_global_generators()
        devices: list[Tensor] = before.get("cuda", [])
        digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in (before["torch"], *devices))).hexdigest()
        self._passes = self._passes + 1 if self._found == (clock, digest) else 0
        self._found = (clock, digest)
        streams = self._streams.child(clock, digest, self._passes)
        own = {**before, "torch": streams.torch("cpu").get_state()}
        if devices:
            own["cuda"] = [streams.torch("cuda", i, device=f"cuda:{i}").get_state() for i in range(len(devices))]
        try:
            write_global_generators(own)
            yield
        finally:
            write_global_generators(before)


@contextlib.contextmanager
def _uncompiled() -> Generator[None]:
    """Within the block compiled modules run as they were written."""
    try:
        stance = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise SlotError("a shadow pass must begin outside compiled code. Compile the model, not the training step.") from error
    with stance:
        yield


@contextlib.contextmanager
def _held_constant(model: nn.Module, but: Collection[nn.Module]) -> Generator[None]:
    """Within the block nothing of ``model`` takes a gradient or is written to by a forward pass, the parts ``but`` excepted.

    Parameters need no gradient there, and passes meet copies of the buffers: the buffers themselves are never written to, so
    that a graph recorded before the block can still be walked after it.
    """
    free = {id(part) for module in but for part in module.modules()}
    learning = {id(parameter) for module in but for parameter in module.parameters()}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in learning]
    tables = [part._buffers for part in model.modules() if id(part) not in free]  # pyright: ignore[reportPrivateUsage]
    kept = [(table, dict(table)) for table in tables if table]
    copies = {id(buffer): buffer.clone() for _, entries in kept for buffer in entries.values() if buffer is not None}
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        for table, entries in kept:
            table.update({name: copies[id(buffer)] for name, buffer in entries.items() if buffer is not None})
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
        for table, entries in kept:
            table.clear()
            table.update(entries)


@contextlib.contextmanager
def _taking_part(slots: Collection[SeedSlot]) -> Generator[None]:
    """Within the block the seeds of ``slots`` act."""
    try:
        for slot in slots:
            slot.in_shadow_pass = True
        yield
    finally:
        for slot in slots:
            slot.in_shadow_pass = False


def _incubating(slots: Mapping[str, SeedSlot]) -> list[SeedSlot]:
    """Return the slots whose seeds learn in shadow passes; raise if there is none, saying why."""
    found = [slot for slot in slots.values() if slot.mix == "shadow"]
    if found:
        return found
    if any(slot.mix == "incubate" for slot in slots.values()):
        raise ValueError(
            '`config.incubator` must be "shadow" for a shadow pass, got "straight_through". Ask `model.needs_shadow` before.'
        )
    raise SlotError(
        f"a slot must hold a seed in training for a shadow pass, none of {', '.join(slots)} does. "
        "Ask `model.needs_shadow` before."
    )
