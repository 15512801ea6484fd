"""What values a hyperparameter may take, how it is drawn, and how it moves. Pure."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from morphogen.config import Config

Value = bool | int | float | str
"""A value of a hyperparameter: always a plain Python object."""
Noise = Literal["two_point", "normal"]


class Space(Protocol):
    """What every kind of hyperparameter can do; nothing here draws from any generator but the one it is given."""

    def draw(self, generator: np.random.Generator) -> Value:
        """Return a value to start with."""
        ...

    def resample(self, generator: np.random.Generator) -> Value:
        """Return any value it may ever take, whatever it was."""
        ...

    def perturb(self, value: Any, generator: np.random.Generator) -> Value:
        """Return a value near ``value`` that is within bounds; from a bound it moves inwards."""
        ...

    def problem(self, value: object) -> str:
        """Return what rule ``value`` breaks, "" if none."""
        ...


class _Interval(Config):
    """Numbers between two bounds.

    Attributes:
        low: Least value it may ever take.
        high: Greatest.
        init_low: Least value to start with; None for ``low``.
        init_high: Greatest value to start with; None for ``high``.
        noise: "two_point": a perturbation is one step up or down, each with probability one half; "normal": a draw from a
            normal distribution with the step as standard deviation.
    """

    low: float
    high: float
    init_low: float | None = None
    init_high: float | None = None
    noise: Noise = "two_point"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low} and {self.high}. Swap or widen them.")
        low, high = self._initial()
        if not self.low <= low <= high <= self.high:
            raise ValueError(
                f"`init_low` and `init_high` must be in order within [{self.low}, {self.high}], got {low} and {high}. "
                "Values start within the range they evolve in."
            )
        return self

    def _initial(self) -> tuple[float, float]:
        low = self.low if self.init_low is None else self.init_low
        return low, self.high if self.init_high is None else self.init_high

    def _to_scale(self, value: float) -> float:
        """Return ``value`` on the scale on which its steps are equal."""
        return value

    def _from_scale(self, scaled: float) -> float:
        return scaled

    def _step(self) -> float:
        """Return the length of a step on that scale."""
        raise NotImplementedError

    def draw(self, generator: np.random.Generator) -> Value:
        """Return a value to start with, uniform on the scale."""
        return self._uniform(*self._initial(), generator)

    def resample(self, generator: np.random.Generator) -> Value:
        """Return any value within the bounds, uniform on the scale."""
        return self._uniform(self.low, self.high, generator)

    def perturb(self, value: Any, generator: np.random.Generator) -> Value:
        """Return ``value`` a step away, reflected where that is beyond a bound."""
        step = self._step()
        moved = step * generator.normal() if self.noise == "normal" else step * (1.0 if generator.random() < 0.5 else -1.0)
        low, high = self._to_scale(self.low), self._to_scale(self.high)
        return self._within(self._from_scale(_reflected(self._to_scale(float(value)) + moved, low, high)))

    def problem(self, value: object) -> str:
        """Return what rule ``value`` breaks, "" if none."""
        if isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
            return ""
        return f"a number in [{self.low}, {self.high}]"

    def _uniform(self, low: float, high: float, generator: np.random.Generator) -> Value:
        start, end = self._to_scale(low), self._to_scale(high)
        return self._within(self._from_scale(start + (end - start) * generator.random()), low, high)

    def _within(self, value: float, low: float | None = None, high: float | None = None) -> Value:
        """Return ``value`` as a plain float; rounding on the way to the scale and back may have led it past a bound."""
        low, high = self.low if low is None else low, self.high if high is None else high
        return float(min(max(value, low), high))


class Float(_Interval):
    """A number that moves by equal steps.

    Attributes:
        kind: "float".
        step: Length of a step as a fraction of ``high - low``, in (0, 1].

    Example:
        >>> Float(low=0.0, high=1.0).perturb(1.0, np.random.default_rng(0))
        0.9
    """

    kind: Literal["float"] = "float"
    step: float = Field(default=0.1, gt=0.0, le=1.0)

    def _step(self) -> float:
        return self.step * (self.high - self.low)


class LogFloat(_Interval):
    """A positive number that moves by equal factors: a learning rate, a coefficient.

    Attributes:
        kind: "log_float".
        factor: A step multiplies or divides by it; > 1.

    Example:
        >>> round(LogFloat(low=1e-5, high=1e-2, factor=2.0).perturb(1e-2, np.random.default_rng(0)), 6)
        0.005
    """

    kind: Literal["log_float"] = "log_float"
    factor: float = Field(default=1.25, gt=1.0)

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.low <= 0.0:
            raise ValueError(f"`low` must be > 0 on a log scale, got {self.low}. Use kind: float for values around zero.")
        return self

    def _to_scale(self, value: float) -> float:
        return math.log(value)

    def _from_scale(self, scaled: float) -> float:
        return math.exp(scaled)

    def _step(self) -> float:
        return math.log(self.factor)


class Logit(_Interval):
    """A number between 0 and 1 that moves by equal factors of its odds: a discount, a momentum, a smoothing.

    Attributes:
        kind: "logit".
        factor: A step multiplies or divides value / (1 - value) by it; > 1.

    Example:
        >>> round(Logit(low=0.9, high=0.9999, factor=2.0).perturb(0.9, np.random.default_rng(0)), 4)
        0.9474
    """

    kind: Literal["logit"] = "logit"
    factor: float = Field(default=1.5, gt=1.0)

    @model_validator(mode="after")
    def _open(self) -> Self:
        if not (0.0 < self.low and self.high < 1.0):
            raise ValueError(f"`low` and `high` must be within (0, 1), got {self.low} and {self.high}. 0 and 1 have no odds.")
        return self

    def _to_scale(self, value: float) -> float:
        return math.log(value) - math.log1p(-value)

    def _from_scale(self, scaled: float) -> float:
        return 1.0 / (1.0 + math.exp(-scaled))

    def _step(self) -> float:
        return math.log(self.factor)


class Int(_Interval):
    """A whole number; a step is at least 1.

    Attributes:
        kind: "int".
        low: Least value it may ever take.
        high: Greatest.
        init_low: Least value to start with; None for ``low``.
        init_high: Greatest value to start with; None for ``high``.
        step: Length of a step as a fraction of ``high - low``, in (0, 1].

    Example:
        >>> Int(low=1, high=10).perturb(10, np.random.default_rng(0))
        9
    """

    kind: Literal["int"] = "int"
    low: int  # pyright: ignore[reportIncompatibleVariableOverride]
    high: int  # pyright: ignore[reportIncompatibleVariableOverride]
    init_low: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    init_high: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    step: float = Field(default=0.1, gt=0.0, le=1.0)

    def problem(self, value: object) -> str:
        """Return what rule ``value`` breaks, "" if none."""
        if isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high:
            return ""
        return f"a whole number in [{self.low}, {self.high}]"

    def perturb(self, value: Any, generator: np.random.Generator) -> Value:
        """Return ``value`` a step away, at least 1, reflected where that is beyond a bound."""
        up = generator.random() < 0.5
        size = self._step() * (abs(generator.normal()) if self.noise == "normal" else 1.0)
        whole = max(1, round(size))
        return round(_reflected(value + (whole if up else -whole), self.low, self.high))

    def _step(self) -> float:
        return self.step * (self.high - self.low)

    def _uniform(self, low: float, high: float, generator: np.random.Generator) -> Value:
        return int(generator.integers(int(low), int(high), endpoint=True))


class _Choices(Config):
    """Some values.

    Attributes:
        values: At least two, no two alike, all of one kind.
        init_values: Those to start with; None for all.
    """

    values: tuple[bool | int | float | str, ...]
    init_values: tuple[bool | int | float | str, ...] | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(self.values) < 2 or len({*map(_key, self.values)}) < len(self.values):
            raise ValueError(f"`values` must be at least two different ones, got {list(self.values)}. One needs no search.")
        strange = [value for value in self.init_values or () if self._place(value) is None]
        if strange or self.init_values == ():
            raise ValueError(f"`init_values` must be some of {list(self.values)}, got {list(self.init_values or ())}. Choose.")
        return self

    def _place(self, value: object) -> int | None:
        keys = [*map(_key, self.values)]
        return keys.index(_key(value)) if _key(value) in keys else None

    def draw(self, generator: np.random.Generator) -> Value:
        """Return a value to start with; all are as probable."""
        return _one_of(self.values if self.init_values is None else self.init_values, generator)

    def resample(self, generator: np.random.Generator) -> Value:
        """Return any value; all are as probable."""
        return _one_of(self.values, generator)

    def problem(self, value: object) -> str:
        """Return what rule ``value`` breaks, "" if none."""
        return "" if self._place(value) is not None else f"one of {list(self.values)}"


class Categorical(_Choices):
    """One of some values without an order; a perturbation is any other one.

    Attributes:
        kind: "categorical".

    Example:
        >>> Categorical(values=("relu", "tanh")).perturb("relu", np.random.default_rng(0))
        'tanh'
    """

    kind: Literal["categorical"] = "categorical"

    def perturb(self, value: Any, generator: np.random.Generator) -> Value:
        """Return another value."""
        return _one_of([other for other in self.values if _key(other) != _key(value)], generator)


class Ordered(_Choices):
    """One of some values in order; a perturbation is the next one up or down, without going round at the ends.

    Attributes:
        kind: "ordered".

    Example:
        >>> Ordered(values=(16, 32, 64)).perturb(64, np.random.default_rng(0))
        32
    """

    kind: Literal["ordered"] = "ordered"

    def perturb(self, value: Any, generator: np.random.Generator) -> Value:
        """Return a neighbour."""
        place = self._place(value)
        assert place is not None
        return _one_of([self.values[near] for near in (place - 1, place + 1) if 0 <= near < len(self.values)], generator)


Hyperparameter = Annotated[Float | LogFloat | Logit | Int | Categorical | Ordered, Field(discriminator="kind")]


def _key(value: object) -> tuple[str, object]:
    """Return what tells 1, 1.0 and True apart."""
    return type(value).__name__, value


def _one_of(values: Any, generator: np.random.Generator) -> Value:
    return values[int(generator.integers(len(values)))]


def _reflected(value: float, low: float, high: float) -> float:
    """Return ``value`` mirrored at the bounds until it is between them."""
    width = high - low
    if width == 0.0:  # neighbouring numbers, which a scale does not tell apart
        return low
    offset = (value - low) % (2.0 * width)
    return low + min(offset, 2.0 * width - offset)
