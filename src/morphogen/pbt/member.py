"""What a population is made of: anything that trains, and gives and takes parameters.

A member must have four methods. Those it may have besides say how much of a run it can move: with ``adopt``, every optimizer
strategy works and its chance is derived from the source's; with ``state_dict`` and ``load_state_dict`` a killed run goes on
bit-identically; with ``hyperparameters`` what is in force is read back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from morphogen.errors import MorphogenError
from morphogen.pbt.records import Hyperparameters
from morphogen.pbt.spaces import Value
from morphogen.pbt.strategies import Strategy


class HyperparameterMismatch(MorphogenError):
    """A member uses other values than it was told to."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What an interval of training came to.

    Attributes:
        score: What members are compared by.
        scores: Single results behind it, such as returns of episodes, latest last; "t_test" needs them.
        metrics: Whatever else is worth showing.
    """

    score: float
    scores: tuple[float, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])


class Member(Protocol):
    """One run of a population."""

    def train(self, until: int) -> float | Mapping[str, float] | Trained:
        """Train until ``until`` steps were done since the beginning of the lineage, and return the score.

        A mapping holds the score under the config's ``metric``.
        """
        ...

    def get_parameters(self, include_optimizer: bool = False) -> Mapping[str, Any]:
        """Return copies of all that another member needs to take over, progress included; with moments if asked for."""
        ...

    def set_parameters(self, values: Mapping[str, Any]) -> object:
        """Take over what another member's ``get_parameters`` returned; moments that are not in it start anew."""
        ...

    def apply_hyperparameters(self, values: Mapping[str, Value]) -> Mapping[str, Value] | None:
        """Use ``values`` from now on; a member that can returns those now in force, read from what uses them."""
        ...


@runtime_checkable
class Adopts(Protocol):
    """A member that takes over another one's run part by part."""

    def adopt(self, values: Mapping[str, Any], optimizer: Strategy, seed: int) -> object:
        """Take over ``values``, moments by the strategy, and draw from streams that start from ``seed``."""
        ...


@runtime_checkable
class ReadsBack(Protocol):
    """A member that says which hyperparameters are in force."""

    def hyperparameters(self) -> Mapping[str, Value]:
        """Return their values, read from what uses them."""
        ...


@runtime_checkable
class Whole(Protocol):
    """A member all of which can be saved."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return everything that evolves."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> object:
        """Go on from what ``state_dict`` returned."""
        ...


Factory = Callable[[int, Hyperparameters, int], Member]
"""(place in the population, hyperparameters, seed of its chance) -> a member that has not trained."""


def trained_of(result: object, metric: str) -> Trained:
    """Return what ``train`` gave back in one form.

    Raises:
        TypeError: It is neither a number nor a mapping nor ``Trained``.
        ValueError: The mapping has no ``metric``.
    """
    if isinstance(result, Trained):
        return result
    if isinstance(result, Mapping):
        metrics = {str(name): float(value) for name, value in cast("Mapping[Any, Any]", result).items()}
        if metric not in metrics:
            raise ValueError(f"`metric` must be one of {', '.join(metrics)}, which the member returned, got {metric!r}.")
        return Trained(metrics[metric], metrics=metrics)
    try:
        return Trained(float(cast("Any", result)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`train` must return a number, a mapping of them or Trained, got {type(result).__name__}. Return the score."
        ) from error


def take_over(member: Member, values: Mapping[str, Any], optimizer: Strategy, seed: int) -> None:
    """Let ``member`` take over ``values``; a member without ``adopt`` is given them, and keeps its chance."""
    if isinstance(member, Adopts):
        member.adopt(values, optimizer, seed)
    else:
        member.set_parameters(values)


def wants_optimizer(optimizer: Strategy) -> bool:
    """Return whether a strategy looks at the source's moments."""
    return optimizer != "reset"


def check_strategy(member: Member, optimizer: Strategy) -> None:
    """Check that ``member`` can do what the strategy asks for.

    Raises:
        ValueError: It can only reset or copy.
    """
    if optimizer not in ("reset", "copy") and not isinstance(member, Adopts):
        raise ValueError(
            f"`optimizer_exploit_strategy` must be reset or copy for members without `adopt`, got {optimizer!r}. Give "
            f"{type(member).__name__} the method, or wrap its TrainingState in a StateMember."
        )


def bind(member: Member, values: Hyperparameters, who: str) -> None:
    """Let ``member`` use ``values``, and see that it does.

    Raises:
        HyperparameterMismatch: What is in force, read back, is something else.
    """
    said = member.apply_hyperparameters(dict(values))
    live = member.hyperparameters() if isinstance(member, ReadsBack) else said
    if live is None:
        return
    wrong = [name for name, value in values.items() if name not in live or live[name] != value]
    if wrong:
        name = wrong[0]
        raise HyperparameterMismatch(
            f"{who}: `{name}` must be {values[name]!r} after it was applied, and {live.get(name, 'nothing')!r} is in force. "
            "Something else sets it, or apply_hyperparameters does not reach it."
        )


def whole(member: Member) -> Mapping[str, Any]:
    """Return all of ``member`` that evolves, as far as it can say."""
    return member.state_dict() if isinstance(member, Whole) else member.get_parameters(include_optimizer=True)


def make_whole(member: Member, state: Mapping[str, Any]) -> None:
    """Put ``member`` to what :func:`whole` returned."""
    if isinstance(member, Whole):
        member.load_state_dict(state)
    else:
        member.set_parameters(state)
