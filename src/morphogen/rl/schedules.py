"""Schedules: a setting as a function of the fraction of training done, computed in closed form, without a clock of its own.

A schedule is a number, one of the config objects below (which YAML can hold), or any callable that takes the fraction.
:func:`resolve` is the one way to read it: pure, so nothing can compound and nothing needs saving.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeAlias, cast

import numpy as np
from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, field_validator

from morphogen.config import Config


class Linear(Config):
    """``start + (end - start) * min(fraction / until, 1)``.

    Attributes:
        kind: Always "linear"; names the schedule in a file.
        start: Value at the beginning of training.
        end: Value from ``until`` on.
        until: Fraction of training in (0, 1] at which ``end`` is reached.

    Example:
        >>> resolve(Linear(start=1e-3, end=0.0), 0.5)
        0.0005
    """

    kind: Literal["linear"] = "linear"
    start: float
    end: float
    until: float = Field(default=1.0, gt=0, le=1)

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` of training done."""
        return _between(self.start, self.end, min(fraction / self.until, 1.0))


class Cosine(Config):
    """Half a cosine wave: ``end + (start - end) * (1 + cos(pi * min(fraction / until, 1))) / 2``.

    Attributes:
        kind: Always "cosine"; names the schedule in a file.
        start: Value at the beginning of training.
        end: Value from ``until`` on.
        until: Fraction of training in (0, 1] at which ``end`` is reached.

    Example:
        >>> round(resolve(Cosine(start=1.0, end=0.0), 0.25), 4)
        0.8536

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, one cycle.
    """

    kind: Literal["cosine"] = "cosine"
    start: float
    end: float
    until: float = Field(default=1.0, gt=0, le=1)

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` of training done."""
        return _between(self.start, self.end, (1.0 - math.cos(math.pi * min(fraction / self.until, 1.0))) / 2.0)


class Points(Config):
    """Straight lines through given points: warm-ups, holds and jumps (two points at one fraction: the later holds from there).

    Attributes:
        kind: Always "points"; names the schedule in a file.
        points: Pairs (fraction in [0, 1], value), fractions not falling. Before the first and after the last point the value
            is that point's.

    Example:
        >>> warmup = Points(points=((0.0, 0.0), (0.1, 3e-4), (1.0, 0.0)))
        >>> resolve(warmup, 0.05), resolve(warmup, 0.1), resolve(warmup, 1.0)
        (0.00015, 0.0003, 0.0)
    """

    kind: Literal["points"] = "points"
    points: tuple[tuple[float, float], ...] = Field(min_length=1)

    @field_validator("points")
    @classmethod
    def _in_order(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        fractions = [fraction for fraction, _ in points]
        if fractions != sorted(fractions) or not 0.0 <= fractions[0] <= fractions[-1] <= 1.0:
            raise ValueError(f"`points` must have fractions that rise within [0, 1], got {fractions}. Sort and rescale them.")
        return points

    def __call__(self, fraction: float) -> float:
        """Return the value at ``fraction`` of training done."""
        after = bisect.bisect_right(self.points, fraction, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(after - 1, 0)][1]
        (left, start), (right, end) = self.points[after - 1], self.points[after]
        return _between(start, end, (fraction - left) / (right - left))


def _between(start: float, end: float, share: float) -> float:
    """Return ``start`` at ``share`` 0 and ``end`` at 1, both exactly."""
    return start * (1.0 - share) + end * share


def _writable(schedule: Any) -> Any:
    if isinstance(schedule, Linear | Cosine | Points):
        return schedule.model_dump()
    if callable(schedule):
        raise ValueError(
            f"a schedule must be a number, Linear, Cosine or Points to be written to a file, got {schedule!r}. Write its "
            "values as Points."
        )
    return schedule


Named: TypeAlias = Linear | Cosine | Points
"""The schedules that a file can hold, told apart by their ``kind``."""

_KINDS: dict[str, type[Linear] | type[Cosine] | type[Points]] = {"linear": Linear, "cosine": Cosine, "points": Points}


def _read(value: Any, info: ValidationInfo) -> Any:
    """One sentence for a bad schedule, where pydantic would report on each kind that it might have been."""
    if isinstance(value, Mapping):
        return _from_mapping(cast("Mapping[str, Any]", value), info)
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(
            f"`{info.field_name}` must be a finite number, a schedule ({', '.join(_KINDS)}) or a callable of the fraction of "
            f"training done, got {value!r}. Pass for example 0.1 or Linear(start=0.1, end=0.0)."
        )
    return float(value)


def _from_mapping(value: Mapping[str, Any], info: ValidationInfo) -> Named:
    if value.get("kind") not in _KINDS:
        raise ValueError(
            f"`{info.field_name}.kind` must be one of {', '.join(_KINDS)}, got {value.get('kind')!r}. Name a kind."
        )
    return _KINDS[value["kind"]](**value)


Schedule: TypeAlias = Annotated[
    float | Named | Callable[[float], float], PlainValidator(_read), PlainSerializer(_writable, when_used="json")
]
"""A number, a :data:`Named` schedule, or a callable of the fraction of training *done*, in [0, 1].

Stable-Baselines3 gives its callables the fraction that *remains*: ``lambda remaining: lr * remaining`` there is
``lambda fraction: lr * (1 - fraction)`` here.
"""


def resolve(
    schedule: Schedule, fraction: float, *, field: str = "schedule", minimum: float = -math.inf, maximum: float = math.inf
) -> float:
    """Return the value of ``schedule`` when ``fraction`` of training is done.

    Args:
        schedule: A number (the same at all times), a config object of this module, or a callable of ``fraction``.
        fraction: Part of training that is done, in [0, 1].
        field: Name of the setting, for the errors.
        minimum: Smallest value allowed.
        maximum: Largest value allowed.

    Raises:
        ValueError: ``fraction`` is outside [0, 1], or the value is not finite or outside the bounds.
        TypeError: The callable gave no number.

    Example:
        >>> resolve(0.2, 0.9), resolve(lambda fraction: 1 - fraction, 0.25)
        (0.2, 0.75)
        >>> resolve(Linear(start=1e-3, end=-1e-3), 1.0, field="learning_rate", minimum=0.0)
        Traceback (most recent call last):
        ...
        ValueError: `learning_rate` must be a finite number >= 0.0, got -0.001 at fraction 1.0 of training. Change its schedule.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"`fraction` must be in [0, 1], got {fraction}. Pass the part of training that is done.")
    value = schedule(fraction) if callable(schedule) else schedule
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{field}` must give a number, got {value!r} at fraction {fraction}. Return a float.") from None
    if not math.isfinite(number) or not minimum <= number <= maximum:
        bounds = (f" >= {minimum}" if minimum > -math.inf else "") + (f" <= {maximum}" if maximum < math.inf else "")
        raise ValueError(
            f"`{field}` must be a finite number{bounds}, got {number} at fraction {fraction} of training. Change its schedule."
        )
    return number


def check_schedule(schedule: Schedule, *, field: str, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    """Raise what :func:`resolve` would raise at some time of training, before it starts.

    A number and the objects of this module are checked at all times; a callable at 0, 1/2 and 1.

    Example:
        >>> check_schedule(Linear(start=0.2, end=0.0), field="clip_range", minimum=0.0)
    """
    inner = [fraction for fraction, _ in schedule.points] if isinstance(schedule, Points) else [0.5]
    for fraction in (0.0, *inner, 1.0):
        resolve(schedule, fraction, field=field, minimum=minimum, maximum=maximum)
