"""What a model that changes its structure offers to the run that owns it. State knows no more of growth than this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

from morphogen.state.surgery_grafts import Graft
from morphogen.telemetry.events import Json


class TopologyChange(Protocol):
    """A structure that is built and checked, but not yet in place."""

    def named_tensors(self) -> Mapping[str, Tensor]:
        """Every parameter and buffer the model will have, by its name after the change."""
        ...

    def commit(self) -> None:
        """Put the structure in place; cannot fail."""
        ...


@runtime_checkable
class DynamicModel(Protocol):
    """A module whose parts come and go.

    ``topology`` is plain JSON data from which ``plan_topology`` can rebuild the structure in a fresh model. ``owners``
    says who owns which parameter. Callbacks given to ``on_topology_change`` run inside each operation that changes the
    structure. If one raises, the operation is undone; what an earlier one returned, if anything, is called to take back
    what it did.
    """

    def topology(self) -> Json:
        """The present structure."""
        ...

    def plan_topology(self, topology: Json) -> TopologyChange:
        """Build the parts that ``topology`` names; parts that are the same germination are kept as they are."""
        ...

    def owners(self) -> Mapping[str, list[tuple[str, Parameter]]]:
        """Owner -> its (name, parameter) pairs; names as in ``named_parameters``."""
        ...

    def on_topology_change(self, callback: Callable[[], Callable[[], None] | None]) -> None:
        """Call ``callback`` after each change of structure, held weakly if it is a bound method."""
        ...


@runtime_checkable
class Grafting(Protocol):
    """A dynamic model whose parameters may grow: they stay the same objects, and others become their new parts."""

    def grafts(self) -> Sequence[Graft]:
        """How parameters grew in the change under way; none at any other time."""
        ...


@runtime_checkable
class Isolating(Protocol):
    """A dynamic model some of whose parts do not act on the outputs yet, so that they can be taken out at any time."""

    def isolated(self) -> Mapping[str, list[tuple[str, Parameter]]]:
        """Owner -> (name, parameter) pairs, as in ``owners``, of the parts that do not act."""
        ...

    def quarantine(self, owner: str, reason: str) -> None:
        """Take the isolated part of ``owner`` out; nothing else of the model changes."""
        ...
