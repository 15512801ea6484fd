"""Schedules against their closed forms, as they stand in configs and files, and what they may not give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, strategies as st
from pydantic_core import PydanticSerializationError

from morphogen.config import Config
from morphogen.rl.schedules import Cosine, Linear, Points, Schedule, check_schedule, resolve

FRACTIONS = st.floats(0.0, 1.0)


class Knobs(Config):
    """Two settings that may change in the course of training.

    Attributes:
        rate: A schedule.
        clip: Another.
    """

    rate: Schedule = 0.1
    clip: Schedule = Linear(start=0.2, end=0.1)


@given(fraction=FRACTIONS, until=st.floats(0.01, 1.0))
def test_closed_forms(fraction: float, until: float) -> None:
    share = min(fraction / until, 1.0)
    assert resolve(Linear(start=3.0, end=1.0, until=until), fraction) == pytest.approx(3.0 - 2.0 * share)
    cosine = resolve(Cosine(start=3.0, end=1.0, until=until), fraction)
    assert cosine == pytest.approx(1.0 + 2.0 * (1 + math.cos(math.pi * share)) / 2)
    assert resolve(0.25, fraction) == 0.25
    assert resolve(lambda done: done**2, fraction) == fraction**2


@given(fraction=FRACTIONS)
def test_points_are_joined_by_lines(fraction: float) -> None:
    points = Points(points=((0.1, 5.0), (0.4, 2.0), (0.4, 1.0), (0.9, 0.0)))
    expected = np.interp(fraction, [0.1, 0.4], [5.0, 2.0]) if fraction < 0.4 else np.interp(fraction, [0.4, 0.9], [1.0, 0.0])
    assert resolve(points, fraction) == pytest.approx(expected)


def test_a_jump_holds_from_its_fraction_on() -> None:
    jump = Points(points=((0.0, 1.0), (0.5, 1.0), (0.5, 3.0), (1.0, 3.0)))
    assert [resolve(jump, fraction) for fraction in (0.0, 0.499, 0.5, 1.0)] == [1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "schedule", [Linear(start=0.1, end=0.7), Cosine(start=0.1, end=0.7), Points(points=((0, 0.1), (1, 0.7)))]
)
def test_ends_are_exact_and_calls_do_not_compound(schedule: Schedule) -> None:
    for _ in range(3):
        assert (resolve(schedule, 0.0), resolve(schedule, 1.0)) == (0.1, 0.7)
        assert resolve(schedule, 0.5) == pytest.approx(0.4)


@pytest.mark.parametrize("schedule", [0.5, Linear(start=1, end=0), Cosine(start=1, end=0, until=0.5), Points(points=((0, 1),))])
def test_a_file_holds_every_schedule_but_functions(schedule: Schedule) -> None:
    knobs = Knobs(rate=schedule)
    assert Knobs(**yaml.safe_load(yaml.safe_dump(knobs.model_dump(mode="json")))) == knobs
    assert Knobs(**json.loads(knobs.model_dump_json())) == knobs
    assert knobs.replace(clip=0.3).rate == schedule


def test_a_function_is_a_schedule_that_no_file_can_hold() -> None:
    knobs = Knobs(rate=lambda fraction: 1.0 - fraction)
    assert resolve(knobs.rate, 0.25) == 0.75
    with pytest.raises(PydanticSerializationError, match="Write its values as Points"):
        knobs.model_dump(mode="json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "`rate` must be a finite number, a schedule .* or a callable .*, got 'fast'"),
        (None, "`rate` must be a finite number"),
        (True, "`rate` must be a finite number"),
        (float("nan"), "`rate` must be a finite number"),
        ({"start": 1, "end": 0}, "`rate.kind` must be one of linear, cosine, points, got None"),
        ({"kind": "lin", "start": 1, "end": 0}, "`rate.kind` must be one of linear, cosine, points, got 'lin'"),
        ({"kind": "linear", "start": 1}, "`end` must be given"),
        ({"kind": "linear", "start": 1, "stop": 0, "end": 0}, "`stop` is not a setting of Linear"),
        ({"kind": "linear", "start": 1, "end": 0, "until": 0}, "`until` must be greater than 0"),
        ({"kind": "points", "points": []}, "`points` must have at least 1 item"),
        ({"kind": "points", "points": [[0.5, 1], [0, 2]]}, "`points` must have fractions that rise"),
        ({"kind": "points", "points": [[0, 1], [1.5, 2]]}, "`points` must have fractions that rise"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_sentence(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Knobs(rate=value)
    assert str(refused.value).count("must") + str(refused.value).count("is not a setting") == 1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda fraction: math.nan, "`rate` must be a finite number >= 0.0, got nan at fraction 0.5 of training"),
        (lambda fraction: -fraction, "`rate` must be a finite number >= 0.0, got -0.5"),
        (Linear(start=1.0, end=-2.0), "`rate` must be a finite number >= 0.0, got -0.5"),
        (-1.0, "got -1.0"),
        (math.inf, "got inf"),
    ],
)
def test_a_value_that_may_not_be_names_its_setting(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(schedule, 0.5, field="rate", minimum=0.0)


def test_bounds_fractions_and_types_are_checked() -> None:
    with pytest.raises(ValueError, match="<= 1.0, got 2.0"):
        resolve(2.0, 0.5, field="gamma", maximum=1.0)
    with pytest.raises(TypeError, match="`rate` must give a number, got None at fraction 0.5"):
        resolve(lambda fraction: None, 0.5, field="rate")
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`fraction` must be in \[0, 1\]"):
            resolve(1.0, fraction)


@pytest.mark.parametrize(
    "schedule",
    [
        -1.0,
        Linear(start=1, end=-1),
        Cosine(start=-1, end=1),
        Points(points=((0, 1), (0.1, -1), (0.2, 1))),
        lambda done: 0.6 - done,
    ],
)
def test_checking_finds_what_would_fail_later(schedule: float | Callable[[float], float]) -> None:
    with pytest.raises(ValueError, match="`rate` must be a finite number >= 0"):
        check_schedule(schedule, field="rate", minimum=0.0)
    check_schedule(schedule, field="rate")
