"""The parts of a run under their names: the one place that says what a part is called in a snapshot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Muon, Optimizer

from morphogen.state import schedules, surgery
from morphogen.state.extras import ExtraKind, is_stateful, kind_of
from morphogen.state.inventory import ModuleTensors, module_tensors
from morphogen.state.topology import DynamicModel

_T = TypeVar("_T")
Owners = dict[str, list[tuple[str, Parameter]]]
Sections = Mapping[str, Mapping[str, Tensor]]
"""Section of a snapshot -> name -> tensor."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Live parts by name; a single part has the empty name."""

    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    schedulers: dict[str, Any]
    scalers: dict[str, Any]
    extras: dict[str, object]
    kinds: dict[str, ExtraKind]

    @classmethod
    def of(cls, model: Any, optimizer: Any, scheduler: Any, scaler: Any, extras: Mapping[str, object] | None) -> Parts:
        """Normalise what ``TrainingState`` was given; TypeError names the argument that is something else."""
        given = dict(extras or {})
        return cls(
            {part: _without_wrappers(module) for part, module in _by_name("model", model, nn.Module).items()},
            _by_name("optimizer", optimizer, Optimizer),
            _stateful_by_name("scheduler", scheduler),
            _stateful_by_name("scaler", scaler),
            given,
            {name: kind_of(name, extra) for name, extra in given.items()},
        )

    def modules(self) -> dict[str, nn.Module]:
        """Models and module extras by the section of a snapshot that holds their tensors."""
        modules = {section("model", part): module for part, module in self.models.items()}
        for name in self.extras_of("module"):
            modules[f"extras.{name}"] = cast("nn.Module", self.extras[name])
        return modules

    def extras_of(self, *kinds: str) -> list[str]:
        """Names of the extras of these kinds."""
        return [name for name, kind in self.kinds.items() if kind in kinds]

    def tensor_extras(self) -> dict[str, Tensor]:
        """The extras that are single tensors."""
        return {name: cast("Tensor", self.extras[name]) for name in self.extras_of("tensor")}

    def schedulers_of(self, optimizer: Optimizer) -> list[Any]:
        """The schedulers that step ``optimizer``."""
        return [scheduler for scheduler in self.schedulers.values() if schedules.attached_to(scheduler, optimizer)]

    def found(self) -> dict[str, ModuleTensors]:
        """What is in each module, by section."""
        return {part: module_tensors(module) for part, module in self.modules().items()}

    def parameters(self, tensors: Sections | None = None) -> dict[str, Parameter]:
        """Every parameter an optimizer may hold by its name in snapshots.

        Args:
            tensors: The tensors of every module, where the caller has them already, or what they will be.
        """
        tables = tensors_of(self.found()) if tensors is None else tensors
        named = {
            f"{prefix(part)}{name}": tensor
            for part, table in tables.items()
            for name, tensor in table.items()
            if isinstance(tensor, Parameter)
        }
        extra = {f"extras.{name}": tensor for name, tensor in self.tensor_extras().items()}
        return named | {name: tensor for name, tensor in extra.items() if isinstance(tensor, Parameter)}

    def owners(self) -> dict[str, Owners]:
        """Return, for each optimizer, owner -> (name, parameter) pairs: what its membership has to be.

        A parameter that several models share belongs to the first of them.
        """
        result: dict[str, Owners] = {part: {} for part in self.optimizers}
        held = {id(p): part for part, optimizer in self.optimizers.items() for p in surgery.parameters_of(optimizer)}
        seen: set[int] = set()
        for part, module in self.modules().items():
            owned = _owners_in(part, module)
            homes = list(dict.fromkeys(held[id(p)] for pairs in owned.values() for _, p in pairs if id(p) in held))
            homes = homes or self._homes_of(part)
            for owner, pairs in owned.items():
                for name, parameter in pairs:
                    home = held.get(id(parameter), self._home_for(parameter, homes))
                    if home is not None and id(parameter) not in seen:
                        result[home].setdefault(owner, []).append((name, parameter))
                    seen.add(id(parameter))
        for name, extra in self.tensor_extras().items():
            if isinstance(extra, Parameter) and id(extra) in held:
                result[held[id(extra)]].setdefault("extras", []).append((f"extras.{name}", extra))
        return result

    def _homes_of(self, part: str) -> list[str]:
        """The optimizers of a model of which they hold nothing now: the one of its name, or all if it is the only model."""
        names = {section("model", name): name for name in self.models}
        if part in names and names[part] in self.optimizers:
            return [names[part]]
        return list(self.optimizers) if list(names) == [part] else []

    def _home_for(self, parameter: Parameter, homes: list[str]) -> str | None:
        """The optimizer that takes a parameter nobody holds: the first one beside its siblings that can."""
        fitting = (part for part in homes if parameter.ndim == 2 or not isinstance(self.optimizers[part], Muon))
        return next(fitting, None)


def tensors_of(found: Mapping[str, ModuleTensors]) -> Sections:
    """Return the tensors of every module by section."""
    return {part: module.tensors for part, module in found.items()}


def first_names(parameters: Mapping[str, Parameter]) -> dict[int, str]:
    """Return ``id(parameter)`` -> the first of its names; models may share a parameter."""
    names: dict[int, str] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), name)
    return names


def _owners_in(part: str, module: nn.Module) -> Owners:
    if isinstance(module, DynamicModel):
        owners = module.owners().items()
        return {f"{prefix(part)}{owner}": [(prefix(part) + name, p) for name, p in pairs] for owner, pairs in owners}
    return {part: [(prefix(part) + name, p) for name, p in module_tensors(module).parameters().items()]}


def section(kind: str, part: str) -> str:
    """Return the name of a snapshot's table: "model" for a single model, "model.actor" for one of several."""
    return f"{kind}.{part}" if part else kind


def prefix(part: str) -> str:
    """Return what goes before a parameter's name so that names of several modules do not collide."""
    return "" if part == "model" else f"{part.removeprefix('model.')}."


def _without_wrappers(module: nn.Module) -> nn.Module:
    """Return the growing model inside what ``torch.compile`` or data parallelism made of it; any other module as it is.

    A wrapper says nothing of growth, and has other names for the same parameters.
    """
    inner = module
    while [name for name, _ in inner.named_children()] in (["_orig_mod"], ["module"]):
        inner = next(inner.children())
    return inner if isinstance(inner, DynamicModel) else module


def _by_name(what: str, given: Any, expected: type[_T]) -> dict[str, _T]:
    parts = _as_dict(given)
    for part, value in parts.items():
        if not isinstance(value, expected) or "." in part:
            raise TypeError(
                f"`{what}` must be a {expected.__name__} or a dict of them by name (no dots), got "
                f"{type(value).__name__}{f' under {part!r}' if part else ''}. Pass the live object."
            )
    return parts


def _stateful_by_name(what: str, given: Any) -> dict[str, Any]:
    parts = _as_dict(given)
    for value in parts.values():
        if not is_stateful(value):
            raise TypeError(
                f"`{what}` must have `state_dict` and `load_state_dict`, got {type(value).__name__}. "
                "Pass the live object, or a dict of them by name."
            )
    return parts


def _as_dict(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    return dict(cast("Mapping[str, Any]", given)) if isinstance(given, Mapping) else {"": given}
