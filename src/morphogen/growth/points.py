"""Growth points: which submodules of a host carry a slot, and what flows there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from morphogen.errors import SlotError
from morphogen.growth.features import Output, Site, element
from morphogen.growth.layouts import (
    POINT_LAYOUTS,
    Layout,
    PointLayout,
    check_layout,
    infer_layout,
    is_sequence_first,
    ordered_parts,
    width_of,
)
from morphogen.growth.probing import Example, observe, single_feature
from morphogen.growth.slots import SeedSlot, hooks_of

HOST = "host"
"""Owner of the host's parameters; no slot may be called so."""


@dataclasses.dataclass(frozen=True)
class GrowthPoint:
    """A submodule by name, and what of its output is the feature where that does not tell itself.

    Attributes:
        path: Name of the submodule, as in ``host.named_modules()``.
        layout: Layout of the feature, "NC", "NCL", "NLC", "NCHW", or "LNC" where the sequence comes first; by default what
            the layers inside the submodule tell.
        output: Where the submodule returns a tuple, list, named tuple or a mapping such as a Hugging Face ``ModelOutput``:
            the index (of a mapping also the key) of the feature in it. The other elements stay as they are.

    Raises:
        ValueError: ``layout`` is unknown, or ``output`` negative.

    Example:
        >>> import torch
        >>> class Classifier(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.lstm, self.head = nn.LSTM(4, 8), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.head(self.lstm(x)[0][-1])
        >>> from morphogen.growth import GrowableModel
        >>> model = GrowableModel(Classifier(), {"memory": GrowthPoint("lstm", output=0)}, torch.zeros(5, 2, 4))
        >>> model.slot("memory").site.sequence_first
        True
    """

    path: str
    layout: PointLayout | None = None
    output: Output | None = None

    def __post_init__(self) -> None:
        """Check layout and output."""
        if self.layout is not None and self.layout not in POINT_LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(POINT_LAYOUTS)}, got {self.layout!r}. Or leave it out.")
        if isinstance(self.output, int) and (self.output < 0 or isinstance(self.output, bool)):
            raise ValueError(f"`output` must be an index from 0 on or a key, got {self.output!r}. Count from the front.")


def sites_of(host: nn.Module, points: Mapping[str, str | GrowthPoint], example: Example) -> dict[str, Site]:
    """Check the points' names, probe the host once, and return what is at each point."""
    if not points:
        raise ValueError("`points` must name at least one submodule, got none. See `dict(host.named_modules())`.")
    given = {name: GrowthPoint(point) if isinstance(point, str) else point for name, point in points.items()}
    known = dict(host.named_modules(remove_duplicate=False))
    check_ungrown(known)
    for name, point in given.items():
        if not may_be_called(name):
            raise ValueError(
                f"a slot's name must be an identifier other than {HOST!r} and no attribute of nn.ModuleDict, got {name!r}. "
                "Rename it."
            )
        if point.path not in known:
            near = difflib.get_close_matches(point.path, known, n=3)
            raise SlotError(
                f"slot {name!r}: the host has no submodule `{point.path}`. "
                f"{f'Did you mean {near}?' if near else 'See dict(host.named_modules()).'}"
            )
    calls = observe(host, {point.path for point in given.values()}.union(tellers(host)), example)
    batch_sizes = batch_sizes_of(host, calls)
    sites: dict[str, Site] = {}
    for name, point in given.items():
        feature = single_feature(name, point, calls[point.path])
        try:
            sites[name] = site_at(point, feature, host, batch_sizes)
        except SlotError as error:
            raise SlotError(f"slot {name!r}: {error}") from None
    return sites


def may_be_called(name: str) -> bool:
    """Return whether a slot may have this name: slots are kept in a ModuleDict, which refuses the names of its attributes."""
    return name.isidentifier() and name != HOST and not hasattr(nn.ModuleDict(), name)


def site_at(point: GrowthPoint, feature: Tensor, host: nn.Module, batch_sizes: Collection[int]) -> Site:
    """Return what is at ``point``; SlotError if its layout cannot be told, or is not that of ``feature``."""
    sequence_first = point.layout == "LNC"
    if point.layout is None:
        module = host.get_submodule(point.path)
        layout = infer_layout(feature, module)
        sequence_first = layout == "NLC" and is_sequence_first(feature, module, host, batch_sizes)
    else:
        layout: Layout = "NLC" if point.layout == "LNC" else point.layout
        check_layout(feature, point.layout)
    return Site(point.path, layout, width_of(feature, layout), point.output, sequence_first)


def tellers(host: nn.Module) -> list[str]:
    """Return the paths of the layers that know their batch axis, if one of them has the sequence first."""
    parts = ordered_parts(host)
    if all(part.batch_first for part in parts):
        return []
    return [path for path, part in host.named_modules() if part in parts]


def batch_sizes_of(host: nn.Module, calls: Mapping[str, list[object]]) -> set[int]:
    """Return the sizes of the batch that the layers found by :func:`tellers` saw."""
    sizes: set[int] = set()
    for path in tellers(host):
        batch_axis = 0 if host.get_submodule(path).batch_first else 1
        found = [element(returned, 0) for returned in calls[path]]
        sizes |= {tensor.shape[batch_axis] for tensor in found if isinstance(tensor, Tensor) and tensor.ndim == 3}
    return sizes


def check_ungrown(parts: Mapping[str, nn.Module]) -> None:
    """Refuse a host that cannot be probed without a trace, or that somebody else grows."""
    for path, part in parts.items():
        if any(isinstance(getattr(hook, "__self__", None), SeedSlot) for hook in hooks_of(part).values()):
            raise SlotError(
                f"the host must be its own, but `{path}` belongs to another GrowableModel. Build a new host, or grow the "
                "export of the other model."
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in part.parameters(recurse=False)):
            raise SlotError(f"the host must have its parameters, but `{path}` is lazy. Run it once on an example before.")
