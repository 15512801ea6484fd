"""The registry of blueprints: one row for each, made by a decorator in the blueprint's own file."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from morphogen.growth.layouts import LAYOUTS, Layout


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Where a seed is to sit, for a blueprint that is made from the host's own layers.

    Attributes:
        submodule: The growth point; not to be changed.
        source: What went into it on the example, detached.
        feature: What it returned, detached.
        layout: Of the feature.
        generator: To draw from, on the CPU.
    """

    submodule: nn.Module
    source: Tensor
    feature: Tensor
    layout: Layout
    generator: torch.Generator


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """One row of the registry.

    Attributes:
        name: What ``germinate`` is given.
        layouts: Layouts it works on.
        module: The class.
        summary: First line of the class's docstring.
    """

    name: str
    layouts: tuple[Layout, ...]
    module: Any
    summary: str

    def build(self, width: int, layout: Layout, **options: Any) -> nn.Module:
        """Return a new module computing s(h) for features of ``width`` channels; s = 0 at birth.

        Raises:
            ValueError: The layout is not one of this blueprint's, an option is unknown, or a width is not enough to build it.
        """
        self._check_width_tells()
        self._check(layout, options)
        return self.module(width, layout, **options)

    def parameter_count(self, width: int, layout: Layout, **options: Any) -> int:
        """Return the number of parameters of :meth:`build` with the same arguments."""
        self._check_width_tells()
        self._check(layout, options)
        return self.module.parameter_count(width, layout, **options)

    @property
    def from_host(self) -> bool:
        """Whether it is built from the host's submodule (:meth:`build_on`) instead of from a width."""
        return hasattr(self.module, "from_host")

    def build_on(self, place: Surroundings, **options: Any) -> nn.Module:
        """Return a new module made from the host's submodule, on the CPU; s = 0 at birth.

        Raises:
            SlotError: The submodule is not of the kind that this blueprint needs; the message starts with "must".
            ValueError: The layout is not one of this blueprint's, or an option is wrong.
        """
        self._check(place.layout, options)
        return self.module.from_host(place, **options)

    def parameter_count_on(self, submodule: nn.Module, **options: Any) -> int:
        """Return the number of parameters of :meth:`build_on` at ``submodule``."""
        self._check(self.layouts[0], options)
        return self.module.parameter_count_on(submodule, **options)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options the blueprint takes."""
        if self.from_host:
            return tuple(field.name for field in dataclasses.fields(self.module.Options))
        return tuple(inspect.signature(self.module).parameters)[2:]

    def _check_width_tells(self) -> None:
        if self.from_host:
            raise ValueError(
                f"`blueprint` must be one that is built from a width, got {self.name!r}, which is built from the host's "
                "submodule. Call build_on or parameter_count_on."
            )

    def _check(self, layout: Layout, options: dict[str, Any]) -> None:
        if layout not in self.layouts:
            fitting = ", ".join(sorted(row.name for row in _ROWS.values() if layout in row.layouts))
            raise ValueError(
                f"`blueprint` must work on layout {layout}, got {self.name!r} for {', '.join(self.layouts)}. "
                f"Use one of: {fitting}."
            )
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise ValueError(
                f"`options` of {self.name!r} must be among {list(self.options)}, got {unknown}. Leave the others out."
            )


_ROWS: dict[str, Blueprint] = {}
_Class = TypeVar("_Class", bound=type[nn.Module])


def blueprint(name: str, layouts: tuple[Layout, ...]) -> Callable[[_Class], _Class]:
    """Register the decorated class as the blueprint ``name`` for ``layouts``.

    The class is built as ``cls(width, layout, **options)``, computes s(h) of the shape of h, is zero at birth with nothing
    after its zero layer, and has a static ``parameter_count(width, layout, **options)``. The conformance suite in
    ``morphogen.testing`` then covers it.

    A class with a classmethod ``from_host(place, **options)`` is made from the host's own layers instead: its options are the
    fields of its dataclass ``Options``, and its static ``parameter_count_on(submodule, **options)`` counts.

    Raises:
        ValueError: The name is taken or a layout unknown.
    """

    def register(cls: _Class) -> _Class:
        if name in _ROWS and _ROWS[name].module.__qualname__ != cls.__qualname__:
            raise ValueError(f"`name` must be new, got {name!r}, which is {_ROWS[name].module.__qualname__}. Rename one.")
        if not layouts or set(layouts) - set(LAYOUTS):
            raise ValueError(f"`layouts` must be some of {', '.join(LAYOUTS)}, got {layouts}. Name at least one.")
        summary = (inspect.getdoc(cls) or "").split("\n")[0]
        _ROWS[name] = Blueprint(name, layouts, cls, summary)
        return cls

    return register


def get(name: str) -> Blueprint:
    """Return the blueprint called ``name``; ValueError lists the names and the nearest one."""
    if name not in _ROWS:
        near = difflib.get_close_matches(name, _ROWS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`blueprint` must be one of {', '.join(sorted(_ROWS))}, got {name!r}.{hint}")
    return _ROWS[name]


def names(layout: Layout | None = None) -> tuple[str, ...]:
    """Return the names of the blueprints that can be built from any width, all or those that work on ``layout``, sorted.

    Others, such as "widen", depend on what the host has at the growth point; ask for them by name.
    """
    return tuple(sorted(row.name for row in _ROWS.values() if not row.from_host and (layout is None or layout in row.layouts)))
