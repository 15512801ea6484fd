"""How a structure is put in place, and who is told."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast, final

from torch import Tensor

from morphogen.growth.events import StageChanged
from morphogen.growth.gates import SlotSensors
from morphogen.growth.host_changes import PlannedHost
from morphogen.growth.lifecycle import SlotState
from morphogen.growth.operators import Seed
from morphogen.state.inventory import module_tensors
from morphogen.telemetry.events import Emit, Event, discard

if TYPE_CHECKING:
    from morphogen.growth.model import GrowableModel

Follower = Callable[[], Callable[[], None] | None]
"""Told of a change of structure; what it returns, if anything, takes back what it did."""


@final
class PlannedStructure:
    """A checked structure; see :meth:`GrowableModel.plan_topology`."""

    def __init__(
        self,
        model: GrowableModel,
        clock: int,
        slots: Mapping[str, tuple[SlotState, SlotSensors, Seed | None]],
        host: PlannedHost,
    ) -> None:
        """Keep what is to be put in place."""
        self._model = model
        self._clock = clock
        self._slots = slots
        self._host = host

    def named_tensors(self) -> Mapping[str, Tensor]:
        """Return every parameter and buffer the model will have; a stand-in where a parameter of the host changes its shape."""
        before = self._swap()
        try:
            return self._host.overlay(module_tensors(self._model).tensors, "host.")
        finally:
            for name, (state, seed) in before.items():
                self._model.slot(name).put(state, seed)

    def commit(self) -> None:
        """Put the host's shapes, states, sensors and seeds in place and tell the followers."""
        self._host.commit(self._model.host_changes.record)
        self._model.host_changes.record = self._host.record
        self._swap()
        for name, (_, sensors, _) in self._slots.items():
            self._model.slot(name).sensors = sensors
        self._model.clock = self._clock
        self._model.followers.call()

    def _swap(self) -> dict[str, tuple[SlotState, Seed | None]]:
        before = {name: (self._model.slot(name).state, self._model.slot(name).seed) for name in self._slots}
        for name, (state, _, seed) in self._slots.items():
            self._model.slot(name).put(state, seed)
        return before


def same_seed(ours: SlotState, theirs: SlotState) -> bool:
    """Whether two states speak of one and the same germination."""
    identity = ("germination", "blueprint", "operator", "options")
    return ours.has_seed and all(getattr(ours, name) == getattr(theirs, name) for name in identity)


@final
class Followers:
    """Who is told of changes: callbacks, bound methods held weakly, and one listener to events.

    A deep copy has neither, as the copy belongs to another run.
    """

    def __init__(self, emit: Emit = discard) -> None:
        """Start without callbacks."""
        self._callbacks: list[Callable[[], Follower | None]] = []
        self._emit = emit

    def add(self, callback: Follower) -> None:
        """Call ``callback`` from now on."""
        if inspect.ismethod(callback):
            self._callbacks.append(weakref.WeakMethod(cast("Any", callback)))
        else:
            self._callbacks.append(lambda: callback)

    def call(self) -> None:
        """Call every callback that is still alive, in the order they were added.

        If one raises, what the earlier ones returned is called, last first, and the error goes on.
        """
        with contextlib.ExitStack() as undo:
            for reference in self._callbacks:
                callback = reference()
                take_back = callback() if callback is not None else None
                if take_back is not None:
                    undo.callback(take_back)
            undo.pop_all()

    def emit(self, event: Event) -> None:
        """Pass ``event`` to the listener."""
        self._emit(event)

    def report(self, slot: str, before: SlotState, after: SlotState) -> None:
        """Tell the listener of each transition that is new in ``after``."""
        known = {id(transition) for transition in before.history}
        for transition in after.history:
            if id(transition) not in known:
                blueprint = after.blueprint if transition.reason != "merged" else before.blueprint
                fields = {field.name: getattr(transition, field.name) for field in dataclasses.fields(transition)}
                self.emit(StageChanged(slot=slot, blueprint=blueprint, **fields))

    def __deepcopy__(self, memo: dict[int, object]) -> Followers:
        return Followers()

    def __reduce__(self) -> tuple[type[Followers], tuple[()]]:
        return (Followers, ())
