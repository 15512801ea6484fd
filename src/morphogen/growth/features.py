"""Where a seed's feature lies in what a submodule returns, and how it is put back."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor

from morphogen.growth.layouts import Layout


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a slot is attached, and the feature there.

    Attributes:
        path: Name of the submodule.
        layout: Of the feature as a seed gets it.
        width: Channels of the feature.
        output: Which element of a returned tuple the feature is; None if the submodule returns the tensor itself.
        sequence_first: Whether the submodule's feature is (L, N, C); seeds get it as (N, L, C).
    """

    path: str
    layout: Layout
    width: int
    output: int | None = None
    sequence_first: bool = False

    def feature(self, returned: object) -> Tensor:
        """Return the feature in what the submodule returned, as seeds get it: no copy.

        Raises:
            TypeError: There is no tensor at that place.
        """
        found = returned
        if self.output is not None:
            found = cast("Any", returned)[self.output]
        if not isinstance(found, Tensor):
            raise TypeError(
                f"submodule `{self.path}` must return a tensor, returned {type(found).__name__}. Choose a submodule inside it."
            )
        return found.transpose(0, 1) if self.sequence_first else found

    def replaced(self, returned: object, feature: Tensor) -> Any:
        """Return what the submodule returned with ``feature`` in place of the one in it; ``returned`` stays as it is."""
        if self.sequence_first:
            feature = feature.transpose(0, 1)
        if self.output is None:
            return feature
        parts = list(cast("Any", returned))
        parts[self.output] = feature
        kind: Any = type(returned)
        return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
