"""Growth points: which submodules of a host carry a slot, and what flows there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from morphogen.errors import SlotError
from morphogen.growth.features import Site
from morphogen.growth.layouts import LAYOUTS, Layout, check_layout, infer_layout, width_of
from morphogen.growth.probing import Example, probe
from morphogen.growth.slots import SeedSlot, hooks_of

HOST = "host"
"""Owner of the host's parameters; no slot may be called so."""


@dataclasses.dataclass(frozen=True)
class GrowthPoint:
    """A submodule by name, and its layout where the layers inside do not tell."""

    path: str
    layout: Layout | None = None

    def __post_init__(self) -> None:
        """Check the layout's name."""
        if self.layout is not None and self.layout not in LAYOUTS:
            raise ValueError(f"`layout` must be one of {', '.join(LAYOUTS)}, got {self.layout!r}. Or leave it out.")


def sites_of(host: nn.Module, points: Mapping[str, str | GrowthPoint], example: Example) -> dict[str, Site]:
    """Check the points' names, probe the host once, and return what is at each point."""
    if not points:
        raise ValueError("`points` must name at least one submodule, got none. See `dict(host.named_modules())`.")
    given = {name: GrowthPoint(point) if isinstance(point, str) else point for name, point in points.items()}
    known = dict(host.named_modules(remove_duplicate=False))
    _check_host(known)
    for name, point in given.items():
        if not name.isidentifier() or name == HOST:
            raise ValueError(f"a slot's name must be an identifier other than {HOST!r}, got {name!r}. Rename it.")
        if point.path not in known:
            near = difflib.get_close_matches(point.path, known, n=3)
            raise SlotError(
                f"slot {name!r}: the host has no submodule `{point.path}`. "
                f"{f'Did you mean {near}?' if near else 'See dict(host.named_modules()).'}"
            )
    features = probe(host, {name: point.path for name, point in given.items()}, example)
    sites: dict[str, Site] = {}
    for name, feature in features.items():
        point = given[name]
        layout = _layout_at(name, point.layout, feature, known[point.path])
        sites[name] = Site(point.path, layout, width_of(feature, layout))
    return sites


def _check_host(parts: Mapping[str, nn.Module]) -> None:
    """Refuse a host that cannot be probed without a trace, or that somebody else grows."""
    for path, part in parts.items():
        if any(isinstance(getattr(hook, "__self__", None), SeedSlot) for hook in hooks_of(part).values()):
            raise SlotError(
                f"the host must be its own, but `{path}` belongs to another GrowableModel. Build a new host, or grow the "
                "export of the other model."
            )
        if any(isinstance(parameter, UninitializedParameter) for parameter in part.parameters(recurse=False)):
            raise SlotError(f"the host must have its parameters, but `{path}` is lazy. Run it once on an example before.")


def _layout_at(slot: str, told: Layout | None, feature: Tensor, module: nn.Module) -> Layout:
    try:
        layout = told or infer_layout(feature, module)
        check_layout(feature, layout)
        return layout
    except SlotError as error:
        raise SlotError(f"slot {slot!r}: {error}") from None
