"""Changes of a host's own parameters: put in place, taken back, and known as data.

A parameter that changes its shape stays the same object with other data: optimizers, groups, names and whoever else holds it
keep it, and only its moments have to follow (``morphogen.state.surgery_grafts``).

What a change names is a dotted name: ``mlp.0.weight`` is a parameter or buffer, ``mlp.0.out_features`` a size that a layer
keeps beside its parameters. A fact about the host is the shape of a tensor, a size, or None for a parameter that is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from morphogen.errors import StateMismatch
from morphogen.state.surgery_grafts import Graft
from morphogen.telemetry.events import Json

Fact = int | tuple[int, ...] | None
Value = int | Tensor | None

SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_features", "num_channels", "num_groups")
"""Sizes that layers keep as attributes."""


@dataclasses.dataclass(frozen=True)
class HostEdit:
    """What a merge makes of the host.

    Attributes:
        values: Dotted name -> new size, or new values of a tensor, of another shape where it grows. A Parameter where the host
            has none.
        grafts: How parameters that grow came by their new part.
    """

    values: Mapping[str, int | Tensor]
    grafts: tuple[Graft, ...] = ()


def put(host: nn.Module, values: Mapping[str, Value]) -> Callable[[], None]:
    """Give the host these values and return what takes that back to the bit; gradients of changed parameters are dropped.

    A tensor of the shape that is there is written into; another shape takes its place. A Parameter is registered where none
    is, and None takes one away.
    """
    with contextlib.ExitStack() as undo:
        for name, value in values.items():
            undo.callback(_put_one(*_owner_of(host, name), value))
        return undo.pop_all().close


def _put_one(module: nn.Module, key: str, value: Value) -> Callable[[], None]:
    old = getattr(module, key)
    if isinstance(old, Parameter) and isinstance(value, Tensor):
        return _put_data(old, value.detach())
    setattr(module, key, value)
    return lambda: setattr(module, key, old)


def _put_data(parameter: Parameter, data: Tensor) -> Callable[[], None]:
    gradient, parameter.grad = parameter.grad, None
    if parameter.shape == data.shape:
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(data)
    else:
        before = parameter.data
        _set_data(parameter, data)

    def take_back() -> None:
        if parameter.shape == before.shape:
            with torch.no_grad():
                parameter.copy_(before)
        else:
            _set_data(parameter, before)
        parameter.grad = gradient

    return take_back


def _set_data(parameter: Parameter, data: Tensor) -> None:
    """Autograd remembers a parameter's shape as long as a graph of it lives, such as the last loss; not across dtypes."""
    other = torch.float32 if data.dtype is torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


@dataclasses.dataclass
class HostChanges:
    """What has become of a host.

    Attributes:
        record: Where it differs from what its code builds.
        grafts: How parameters grew in the change under way; none at any other time.
    """

    record: HostRecord = dataclasses.field(default_factory=lambda: HostRecord())
    grafts: tuple[Graft, ...] = ()


@dataclasses.dataclass(frozen=True)
class HostRecord:
    """Where a host differs from what its own code builds.

    Attributes:
        changes: Dotted name -> (fact as built, fact now).
    """

    changes: Mapping[str, tuple[Fact, Fact]] = dataclasses.field(default_factory=dict[str, tuple[Fact, Fact]])

    def after(self, host: nn.Module, values: Mapping[str, Value]) -> HostRecord:
        """Return the record after ``values`` are put into ``host``, which is as this record says."""
        changes = dict(self.changes)
        for name, value in values.items():
            built, now = self.built(host, name), fact_of(value)
            changes.pop(name, None)
            if built != now:
                changes[name] = (built, now)
        return HostRecord(changes)

    def built(self, host: nn.Module, name: str) -> Fact:
        """Return the fact as the host's code builds it."""
        return self.changes[name][0] if name in self.changes else fact_of(getattr(*_owner_of(host, name)))

    def as_json(self) -> Json:
        """Return name -> {"built": ..., "now": ...}."""
        return {name: {"built": _plain(built), "now": _plain(now)} for name, (built, now) in self.changes.items()}

    @classmethod
    def read(cls, data: Json, host: nn.Module, present: HostRecord) -> HostRecord:
        """Return what :meth:`as_json` wrote, checked against a host of which ``present`` is true.

        Raises:
            StateMismatch: The host as built is another, with one line for each difference.
        """
        entries = cast("Mapping[str, Mapping[str, Any]]", data)
        changes = {name: (_fact(entry["built"]), _fact(entry["now"])) for name, entry in entries.items()}
        problems = [f"the topology changes `{name}`, which the host lacks" for name in changes if not _is_known(host, name)]
        problems += [
            f"`{name}` is built as {present.built(host, name)} here, and as {built} where the topology comes from"
            for name, (built, _) in changes.items()
            if _is_known(host, name) and present.built(host, name) != built
        ]
        if problems:
            raise StateMismatch("the topology grew from another host.", tuple(problems))
        return cls(changes)


class PlannedHost:
    """A host as a record says, ready to be put in place: what fits is kept, the same objects, all else is new and zero."""

    def __init__(self, host: nn.Module, present: HostRecord, wanted: HostRecord) -> None:
        """Build what is missing; the host is not changed."""
        self.record = wanted
        self._host = host
        self._objects = _objects(host)
        self._data = {name: tensor.data for name, tensor in self._objects.items()}
        self._new: dict[str, Value] = {}
        for name in present.changes.keys() | wanted.changes.keys():
            fact = wanted.changes[name][1] if name in wanted.changes else present.built(host, name)
            if fact_of(getattr(*_owner_of(host, name))) != fact:
                self._new[name] = self._fresh(name, fact)

    def overlay(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Return ``tensors``, the model's by name, as they will be; a parameter that changes is there as a stand-in."""
        after = dict(tensors)
        for name, value in self._new.items():
            after.pop(f"{prefix}{name}", None)
            if isinstance(value, Tensor):
                after[f"{prefix}{name}"] = value
        return after

    def commit(self, present: HostRecord) -> None:
        """Put the host as planned, from whatever ``present`` says it is by now."""
        for name in present.changes.keys() | self.record.changes.keys() | self._new.keys():
            module, key = _owner_of(self._host, name)
            planned = self._planned(name, present)
            if fact_of(getattr(module, key)) != fact_of(planned):
                _put_one(module, key, planned)

    def _planned(self, name: str, present: HostRecord) -> Value:
        if name in self._new:
            return self._new[name]
        if name in self._objects:
            kept = self._objects[name]
            return self._data[name] if kept.shape != self._data[name].shape else kept
        built = self.record.changes[name][1] if name in self.record.changes else present.changes[name][0]
        return built if isinstance(built, int) else None

    def _fresh(self, name: str, fact: Fact) -> Value:
        if not isinstance(fact, tuple):
            return fact
        module, _ = _owner_of(self._host, name)
        live = self._objects.get(name)
        like = live if live is not None else next(tensor for tensor in _objects(module).values())
        data = torch.zeros(fact, dtype=like.dtype, device=like.device)
        is_parameter = live is None or isinstance(live, Parameter)
        return Parameter(data, requires_grad=like.requires_grad) if is_parameter else data


def fact_of(value: object) -> Fact:
    """Return the fact that a value stands for."""
    return tuple(value.shape) if isinstance(value, Tensor) else cast("int | None", value)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the live table of a module's own buffers."""
    return module._buffers  # pyright: ignore[reportPrivateUsage]


def parameters_of(module: nn.Module) -> dict[str, Parameter | None]:
    """Return the live table of a module's own parameters; a name whose parameter was left out is there with None."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


def _owner_of(host: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return host.get_submodule(path), key


def _objects(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_known(host: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    module = dict(host.named_modules(remove_duplicate=False)).get(path)
    if module is None:
        return False
    is_size = key in SIZES and isinstance(getattr(module, key, None), int)
    return is_size or key in parameters_of(module) or key in buffers_of(module)


def _plain(fact: Fact) -> Json:
    return list(fact) if isinstance(fact, tuple) else fact


def _fact(data: object) -> Fact:
    return tuple(cast("list[int]", data)) if isinstance(data, list) else cast("int | None", data)
