"""A penalty on the KL divergence from the policy of the rollout, whose coefficient is fixed or follows a target.

The loss is ``... + coefficient * kl``. The pure :func:`next_state` says how the coefficient moves after an update that
measured ``kl``; :class:`KLPenalty` holds its state, which is part of a policy's parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias, final

from pydantic import Field, model_validator

from morphogen.config import Config
from morphogen.errors import StateMismatch

Kind: TypeAlias = Literal["fixed", "adaptive", "pid"]

_USED: dict[str, frozenset[str]] = {
    "fixed": frozenset(),
    "adaptive": frozenset({"target", "tolerance", "factor", "min_coefficient", "max_coefficient"}),
    "pid": frozenset({"target", "proportional", "integral", "derivative", "min_coefficient", "max_coefficient"}),
}


class KLPenaltyConfig(Config):
    """How large the penalty is, and how it follows the divergence that updates cause.

    A setting that its ``kind`` does not use must keep its default: changing it would have no effect.

    Attributes:
        kind: "fixed": always ``coefficient``. "adaptive": multiplied or divided by ``factor`` when the divergence leaves its
            band. "pid": a controller on the error ``kl - target``.
        coefficient: Penalty per nat at the start, >= 0; for "adaptive" > 0.
        target: Divergence in nats that an update should cause, > 0; needed by "adaptive" and "pid".
        tolerance: The band of "adaptive" is ``[target / tolerance, target * tolerance]``; > 1.
        factor: Step of "adaptive", > 1.
        proportional: Gain of "pid" on the error, in coefficient per nat, >= 0.
        integral: Gain of "pid" on the sum of errors, in coefficient per nat and update, >= 0.
        derivative: Gain of "pid" on the change of the error from one update to the next, >= 0.
        min_coefficient: Smallest coefficient that "adaptive" and "pid" may set, >= 0.
        max_coefficient: Largest coefficient that they may set.

    Example:
        >>> KLPenaltyConfig(kind="adaptive", coefficient=1.0, target=0.01).factor
        2.0
    """

    kind: Kind = "adaptive"
    coefficient: float = Field(default=1.0, ge=0)
    target: float | None = Field(default=None, gt=0)
    tolerance: float = Field(default=1.5, gt=1)
    factor: float = Field(default=2.0, gt=1)
    proportional: float = Field(default=0.0, ge=0)
    integral: float = Field(default=0.0, ge=0)
    derivative: float = Field(default=0.0, ge=0)
    min_coefficient: float = Field(default=1e-4, ge=0)
    max_coefficient: float = Field(default=100.0, gt=0)

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        always = {"kind", "coefficient"}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in always | _USED[self.kind] and value != field.default:
                raise ValueError(f'`{name}` must be left out for kind="{self.kind}", got {value}: it would have no effect.')
        if self.kind != "fixed":
            self._check_controller()
        return self

    def _check_controller(self) -> None:
        low, high = self.min_coefficient, self.max_coefficient
        if self.target is None:
            raise ValueError(f'`target` must be given for kind="{self.kind}", got None. Pass for example target=0.01.')
        if not low <= self.coefficient <= high:
            raise ValueError(
                f"`coefficient` must lie within [min_coefficient, max_coefficient] = [{low}, {high}], got {self.coefficient}. "
                "Change it or the bounds."
            )
        if self.kind == "adaptive" and low == 0.0:
            raise ValueError('`min_coefficient` must be > 0 for kind="adaptive", got 0: no factor leads away from 0. Raise it.')
        if self.kind == "pid" and not self.proportional + self.integral + self.derivative > 0.0:
            raise ValueError(
                '`proportional`, `integral` or `derivative` must be > 0 for kind="pid", got 0 for all: the coefficient would '
                'never move. Give a gain, or use kind="fixed".'
            )


@dataclasses.dataclass(frozen=True)
class KLPenaltyState:
    """Where the controller stands.

    Attributes:
        coefficient: What the next update's divergence is multiplied by.
        error_sum: Sum of the errors ``kl - target`` so far, clamped ("pid"; else 0), in nats.
        previous_error: Error of the last update ("pid"; None: there was none), in nats.
    """

    coefficient: float
    error_sum: float = 0.0
    previous_error: float | None = None


def next_state(state: KLPenaltyState, kl: float, config: KLPenaltyConfig) -> KLPenaltyState:
    """Return the state after an update that caused a divergence of ``kl`` nats; ValueError if ``kl`` is not finite.

    - "fixed": ``state``.
    - "adaptive": ``coefficient * factor`` if ``kl > tolerance * target``, ``coefficient / factor`` if
      ``kl < target / tolerance``, within the bounds.
    - "pid", with ``e = kl - target``: ``clamp(start + proportional * e + integral * sum(e) + derivative * (e - e_before))``,
      where ``start`` is ``config.coefficient``. The sum is clamped to what the bounds let it express, so that it does not
      wind up while the coefficient is at a bound.

    Example:
        >>> config = KLPenaltyConfig(kind="adaptive", coefficient=1.0, target=0.01)
        >>> [next_state(KLPenaltyState(1.0), kl, config).coefficient for kl in (0.016, 0.01, 0.006)]
        [2.0, 1.0, 0.5]

    Source: "adaptive" is Schulman et al. 2017, section 4. The positional form of "pid" adds the three terms to the starting
    coefficient: adding them to the previous one would integrate twice.
    """
    if not math.isfinite(kl):
        raise ValueError(f"`kl` must be finite, got {kl}. Leave the penalty alone after an update that measured none.")
    if config.kind == "fixed" or config.target is None:
        return state
    low, high = config.min_coefficient, config.max_coefficient
    if config.kind == "adaptive":
        above, below = kl > config.target * config.tolerance, kl < config.target / config.tolerance
        moved = state.coefficient * (config.factor if above else 1.0 / config.factor if below else 1.0)
        return dataclasses.replace(state, coefficient=min(max(moved, low), high))
    error = kl - config.target
    total = state.error_sum + error
    if config.integral > 0.0:
        total = min(max(total, (low - config.coefficient) / config.integral), (high - config.coefficient) / config.integral)
    change = 0.0 if state.previous_error is None else error - state.previous_error
    terms = config.proportional * error + config.integral * total + config.derivative * change
    return KLPenaltyState(min(max(config.coefficient + terms, low), high), total, error)


@final
class KLPenalty:
    """The live coefficient of the penalty, and what its controller remembers.

    The config is one copy of live hyperparameters: change it with :meth:`reconfigure`. It does not travel with the state.

    Example:
        >>> penalty = KLPenalty(KLPenaltyConfig(kind="adaptive", coefficient=1.0, target=0.01))
        >>> penalty.update(kl=0.05)
        >>> penalty.coefficient
        2.0
    """

    def __init__(self, config: KLPenaltyConfig) -> None:
        self._config = config
        self._state = KLPenaltyState(config.coefficient)

    @property
    def config(self) -> KLPenaltyConfig:
        """The settings in force."""
        return self._config

    @property
    def coefficient(self) -> float:
        """What the next update multiplies its divergence by."""
        return self._state.coefficient

    def update(self, kl: float) -> None:
        """Move the coefficient after an update that caused a mean divergence of ``kl`` nats; ValueError if not finite."""
        self._state = next_state(self._state, kl, self._config)

    def reconfigure(self, config: KLPenaltyConfig) -> None:
        """Use ``config`` from now on. Another kind or starting coefficient starts the controller anew, else its state stays."""
        restarts = (config.kind, config.coefficient) != (self._config.kind, self._config.coefficient)
        self._config = config
        self._state = KLPenaltyState(config.coefficient) if restarts else _within(self._state, config)

    def reset(self) -> None:
        """Start anew from the configured coefficient."""
        self._state = KLPenaltyState(self._config.coefficient)

    def state_dict(self) -> dict[str, Any]:
        """Return ``kind``, ``coefficient``, ``error_sum`` and ``previous_error``: plain data."""
        return {"kind": self._config.kind, **dataclasses.asdict(self._state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the config stays this penalty's own.

        The coefficient is brought within this config's bounds; for "fixed" the config alone says it.

        Raises:
            StateMismatch: It was written by another kind of penalty, or by something else; nothing is changed.
        """
        problems = _misfits(state, self._config.kind)
        if problems:
            raise StateMismatch("the state does not fit this KL penalty; nothing was changed.", tuple(problems))
        previous = state["previous_error"]
        loaded = KLPenaltyState(
            float(state["coefficient"]), float(state["error_sum"]), None if previous is None else float(previous)
        )
        self._state = _within(loaded, self._config)


def _within(state: KLPenaltyState, config: KLPenaltyConfig) -> KLPenaltyState:
    if config.kind == "fixed":
        return KLPenaltyState(config.coefficient)
    bounded = min(max(state.coefficient, config.min_coefficient), config.max_coefficient)
    return dataclasses.replace(state, coefficient=bounded)


def _misfits(state: Mapping[str, Any], kind: Kind) -> list[str]:
    names = ("kind", *(field.name for field in dataclasses.fields(KLPenaltyState)))
    problems = [f"`{name}` is missing" for name in names if name not in state]
    problems += [f"`{name}` is unknown" for name in state if name not in names]
    if problems:
        return problems
    if state["kind"] != kind:
        problems.append(f"`kind` is {state['kind']!r}, this penalty's is {kind!r}")
    problems += [
        f"`{name}` is {state[name]!r}, expected a finite number"
        for name in names[1:]
        if not (_is_number(state[name]) or (name == "previous_error" and state[name] is None))
    ]
    if _is_number(state["coefficient"]) and state["coefficient"] < 0:
        problems.append(f"`coefficient` is {state['coefficient']}, expected a number >= 0")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
