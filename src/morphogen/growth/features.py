"""Where a seed's feature lies in what a submodule returns, and how it is put back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor

from morphogen.growth.layouts import Layout

Output = int | str
"""Which element of what a submodule returns: an index, or a key of a mapping."""


class Place(Protocol):
    """A submodule, and which element of what it returns is meant."""

    @property
    def path(self) -> str:
        """Name of the submodule."""
        ...

    @property
    def output(self) -> Output | None:
        """Index or key in what it returns; None if it returns the tensor itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a slot is attached, and the feature there.

    Attributes:
        path: Name of the submodule.
        layout: Of the feature as a seed gets it.
        width: Channels of the feature.
        output: Which element of a returned tuple or mapping the feature is; None if the submodule returns the tensor itself.
        sequence_first: Whether the submodule's feature is (L, N, C); seeds get it as (N, L, C).
    """

    path: str
    layout: Layout
    width: int
    output: Output | None = None
    sequence_first: bool = False

    def feature(self, returned: object, slot: str) -> Tensor:
        """Return the feature in what the submodule returned, as seeds get it: no copy.

        Raises:
            TypeError: There is no tensor at that place, or a nested one; the message names ``slot``.
        """
        found = element(returned, self.output)
        if not isinstance(found, Tensor):
            raise TypeError(f"slot {slot!r}: {not_a_tensor(self, returned)}")
        if found.is_nested:
            raise TypeError(
                f"slot {slot!r}: submodule `{self.path}` must return a tensor that is not nested, as seeds take no other. Set "
                "`use_nested_tensor = False` on the nn.TransformerEncoder around it, which nests what is padded in inference."
            )
        return self.turned(found)

    def turned(self, tensor: Tensor) -> Tensor:
        """Return a feature of the host's as seeds get it, or one of a seed's as the host has it: no copy."""
        return tensor.transpose(0, 1) if self.sequence_first else tensor

    def source(self, args: tuple[Any, ...]) -> Tensor:
        """Return what went into the submodule as its first argument, with its axes in the order of the feature's: no copy.

        Raises:
            TypeError: There is no tensor.
        """
        found = args[0] if args else None
        if not isinstance(found, Tensor):
            raise TypeError(
                f"submodule `{self.path}` must be given a tensor as its first positional argument, got {type(found).__name__}. "
                "Choose another growth point."
            )
        return self.turned(found)

    def replaced(self, returned: object, feature: Tensor) -> Any:
        """Return what the submodule returned with ``feature`` in place of the one in it; ``returned`` stays as it is."""
        feature = self.turned(feature)
        if self.output is None:
            return feature
        if isinstance(returned, Mapping):
            parts: Any = copy.copy(cast("Any", returned))
            parts[key_of(cast("Mapping[str, Any]", returned), self.output)] = feature
            return parts
        parts = list(cast("Any", returned))
        parts[self.output] = feature
        kind: Any = type(returned)
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def key_of(returned: Mapping[str, Any], output: Output) -> str:
    """Return the key of an element that is named by its key or by its index; a ModelOutput counts no entry that is None."""
    return output if isinstance(output, str) else list(returned)[output]


def element(returned: object, output: Output | None) -> object:
    """Return the element of what a submodule returned, or all of it for None; None if there is no such element."""
    if output is None:
        return returned
    if not isinstance(returned, Mapping | Sequence):
        return None
    try:
        if isinstance(returned, Mapping):
            return cast("Any", returned)[key_of(cast("Mapping[str, Any]", returned), output)]
        return cast("Any", returned)[output]
    except (IndexError, KeyError, TypeError):
        return None


def not_a_tensor(place: Place, returned: object) -> str:
    """Return what to say of a submodule that returned no tensor where one is expected, and what mends it."""
    kind = type(returned).__name__
    if place.output is not None:
        return (
            f"element {place.output!r} of what submodule `{place.path}` returns must be a tensor, it returned {kind}"
            f"{_contents(returned)}. Name another element, or leave `output` out where it returns a tensor."
        )
    index = first_tensor(returned)
    fix = "Choose a submodule inside it." if index is None else f"Give GrowthPoint({place.path!r}, output={index!r})."
    return f"submodule `{place.path}` must return a tensor, returned {kind}. {fix}"


def first_tensor(returned: object) -> int | None:
    """Return the index of the first element that is a tensor; None without one."""
    if isinstance(returned, Tensor | str) or not isinstance(returned, Mapping | Sequence):
        return None
    items: list[object] = list(returned.values() if isinstance(returned, Mapping) else cast("Sequence[object]", returned))
    return next((index for index, item in enumerate(items) if isinstance(item, Tensor)), None)


def _contents(returned: object) -> str:
    if isinstance(returned, Mapping):
        return f" with {', '.join(map(repr, cast('Mapping[str, Any]', returned)))}"
    return f" of {len(returned)}" if isinstance(returned, tuple | list) else ""
