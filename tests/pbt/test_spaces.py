"""Hyperparameters stay within their bounds, keep their type, move in every direction, and never get stuck."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from scipy.stats import kstest

from morphogen.pbt import Categorical, Float, Int, LogFloat, Logit, Ordered, PBTConfig

SPACES: dict[str, Any] = {
    "float": Float(low=-1.0, high=3.0),
    "float, normal": Float(low=-1.0, high=3.0, noise="normal"),
    "float, whole range": Float(low=-1.0, high=3.0, step=1.0),
    "negative": Float(low=-3.0, high=-1.0),
    "log": LogFloat(low=1e-5, high=1e-1),
    "log, normal": LogFloat(low=1e-5, high=1e-1, noise="normal"),
    "log, far": LogFloat(low=1e-3, high=2e-3, factor=1000.0),
    "logit": Logit(low=0.5, high=0.9999),
    "logit, normal": Logit(low=0.01, high=0.99, noise="normal", factor=5.0),
    "int": Int(low=-5, high=20),
    "int, normal": Int(low=1, high=7, noise="normal"),
    "int, two": Int(low=0, high=1),
    "categorical": Categorical(values=("relu", "tanh", "gelu")),
    "bool": Categorical(values=(False, True)),
    "ordered": Ordered(values=(16, 32, 64)),
    "ordered, mixed": Ordered(values=(0, 0.5, 1)),
}
NUMBERS = {name: space for name, space in SPACES.items() if hasattr(space, "low")}
CONTINUOUS = {name: space for name, space in NUMBERS.items() if not isinstance(space, Int)}
PLAIN = (bool, int, float, str)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", SPACES)
def test_many_perturbations_stay_in_bounds_and_never_stand_still(name: str) -> None:
    space, generator = SPACES[name], chance()
    value = space.draw(generator)
    kind = type(value)
    seen, stood_still = set(), 0
    for _ in range(100_000 // len(SPACES)):  # about 1e5 in all
        moved = space.perturb(value, generator)
        assert space.problem(moved) == "", (value, moved)
        stood_still += moved == value and type(moved) is type(value)  # a reflection may lead back
        assert type(moved) in PLAIN
        assert name == "ordered, mixed" or type(moved) is kind
        value = moved
        seen.add(value)
    assert len(seen) > 1
    assert stood_still <= (0 if name not in NUMBERS else 1000)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_bound_is_no_trap(name: str) -> None:
    space = NUMBERS[name]
    for bound in (space.low, space.high):
        moved = [space.perturb(bound, chance(seed)) for seed in range(50)]
        assert all(space.problem(value) == "" for value in moved)
        assert sum(value == bound for value in moved) == 0, moved


@pytest.mark.parametrize("name", [name for name in NUMBERS if "far" not in name and "whole" not in name])
def test_a_walk_visits_the_whole_range(name: str) -> None:
    space, generator = NUMBERS[name], chance()
    value, walk = space.draw(generator), []
    for _ in range(4000):
        value = space.perturb(value, generator)
        walk.append(space._to_scale(value))
    low, high = space._to_scale(space.low), space._to_scale(space.high)
    shares = np.histogram(walk, bins=2, range=(low, high))[0] / len(walk)
    assert shares.min() > 0.25, shares


def test_steps_are_what_the_kind_says() -> None:
    for seed in range(20):
        assert abs(Float(low=0.0, high=2.0, step=0.1).perturb(1.0, chance(seed)) - 1.0) == pytest.approx(0.2)
        log = LogFloat(low=1e-4, high=1.0, factor=2.0).perturb(0.1, chance(seed))
        assert min(abs(log - 0.05), abs(log - 0.2)) < 1e-12
        odds = Logit(low=0.1, high=0.99, factor=2.0).perturb(0.5, chance(seed))
        assert min(abs(odds - 1 / 3), abs(odds - 2 / 3)) < 1e-12
        assert Int(low=0, high=100, step=0.05).perturb(50, chance(seed)) in (45, 55)
        assert Int(low=0, high=4).perturb(2, chance(seed)) in (1, 3)  # at least 1


def test_zero_and_negatives_move_like_any_other_value() -> None:
    space = Float(low=-1.0, high=1.0, step=0.1)
    assert {round(space.perturb(0.0, chance(seed)), 9) for seed in range(20)} == {-0.2, 0.2}
    assert {round(space.perturb(-0.5, chance(seed)), 9) for seed in range(20)} == {-0.7, -0.3}


def test_up_and_down_are_equally_probable() -> None:
    for space, value in ((Float(low=0.0, high=1.0), 0.5), (LogFloat(low=1e-4, high=1.0), 1e-2), (Int(low=0, high=10), 5)):
        ups = sum(space.perturb(value, chance(seed)) > value for seed in range(1000))
        assert 420 < ups < 580


def test_beyond_a_bound_a_value_is_reflected() -> None:
    space = Float(low=0.0, high=1.0, step=0.3)
    assert {round(space.perturb(0.9, chance(seed)), 9) for seed in range(20)} == {0.6, 0.8}  # 1.2 -> 0.8
    assert {round(space.perturb(0.1, chance(seed)), 9) for seed in range(20)} == {0.4, 0.2}  # -0.2 -> 0.2
    log = LogFloat(low=1e-2, high=1.0, factor=2.0)
    assert {round(log.perturb(0.8, chance(seed)), 9) for seed in range(20)} == {0.4, 0.625}  # 1.6 -> 1 / 1.6


@pytest.mark.parametrize("name", CONTINUOUS)
def test_resampling_is_uniform_on_the_scale(name: str) -> None:
    space, generator = CONTINUOUS[name], chance(1)
    values = [space._to_scale(space.resample(generator)) for _ in range(4000)]
    low, high = space._to_scale(space.low), space._to_scale(space.high)
    assert kstest(values, "uniform", (low, high - low)).pvalue > 0.01


def test_a_log_scale_is_log_uniform_and_not_uniform() -> None:
    space, generator = LogFloat(low=1e-5, high=1e-1), chance()
    values = [space.resample(generator) for _ in range(4000)]
    assert kstest(np.log(values), "uniform", (math.log(1e-5), math.log(1e4))).pvalue > 0.01
    assert kstest(values, "uniform", (1e-5, 1e-1)).pvalue < 1e-6


def test_each_choice_is_as_probable() -> None:
    for space in (Int(low=3, high=6), Categorical(values=(3, 4, 5, 6)), Ordered(values=(3, 4, 5, 6))):
        generator = chance()
        values = [space.resample(generator) for _ in range(4000)]
        assert all(900 < values.count(value) < 1100 for value in (3, 4, 5, 6))


@pytest.mark.parametrize(
    "space",
    [
        Float(low=0.0, high=10.0, init_low=4.0, init_high=5.0),
        LogFloat(low=1e-6, high=1.0, init_low=1e-3, init_high=1e-2),
        Int(low=0, high=100, init_low=40, init_high=42),
        Logit(low=0.1, high=0.999, init_low=0.9, init_high=0.9),
        Categorical(values=("a", "b", "c"), init_values=("b",)),
        Ordered(values=(1, 2, 3), init_values=(1, 2)),
    ],
    ids=lambda space: space.kind,
)
def test_values_start_in_the_initial_range_and_leave_it(space: Any) -> None:
    generator = chance()
    if hasattr(space, "low"):
        starts = [space.draw(generator) for _ in range(200)]
        assert all(space.init_low <= value <= space.init_high for value in starts)
        assert any(not space.init_low <= space.resample(generator) <= space.init_high for _ in range(200))
    else:
        assert {space.draw(generator) for _ in range(200)} == {*space.init_values}
        assert {space.resample(generator) for _ in range(200)} == {*space.values}


def test_categorical_moves_to_any_other_and_ordered_to_a_neighbour_without_going_round() -> None:
    names, sizes = Categorical(values=("a", "b", "c")), Ordered(values=(16, 32, 64))
    assert {names.perturb("a", chance(seed)) for seed in range(30)} == {"b", "c"}
    assert {sizes.perturb(64, chance(seed)) for seed in range(30)} == {32}
    assert {sizes.perturb(16, chance(seed)) for seed in range(30)} == {32}
    assert {sizes.perturb(32, chance(seed)) for seed in range(30)} == {16, 64}


def test_one_and_true_are_two_values() -> None:
    space = Categorical(values=(1, True, 1.0))
    assert [type(space.perturb(True, chance(seed))) for seed in range(8)].count(bool) == 0
    assert space.problem(1) == space.problem(True) == space.problem(1.0) == "" != space.problem("1")


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, True, 2.1, -0.1])
def test_what_is_no_value_is_named(value: object) -> None:
    assert "a number in [0.0, 1.0]" in Float(low=0.0, high=1.0).problem(value)
    assert "a whole number in [0, 1]" in Int(low=0, high=1).problem(value if value is not True else 1.0)


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("float", {"low": 1.0, "high": 1.0}, "`low` must be below `high`"),
        ("float", {"low": 2.0, "high": 1.0}, "`low` must be below `high`"),
        ("float", {"low": 0.0, "high": math.inf}, "high"),
        ("float", {"low": 0.0, "high": math.nan}, "high"),
        ("float", {"low": 0.0, "high": 1.0, "step": 0.0}, "step"),
        ("float", {"low": 0.0, "high": 1.0, "init_low": -1.0}, "`init_low` and `init_high`"),
        ("float", {"low": 0.0, "high": 1.0, "init_low": 0.8, "init_high": 0.2}, "in order"),
        ("float", {"low": 0.0, "high": 1.0, "noise": "gauss"}, "noise"),
        ("float", {"low": 0.0}, "`high` must be given"),
        ("float", {"low": 0.0, "high": 1.0, "factor": 2.0}, "factor"),
        ("log_float", {"low": 0.0, "high": 1.0}, "`low` must be > 0 on a log scale"),
        ("log_float", {"low": -1.0, "high": 1.0}, "`low` must be > 0 on a log scale"),
        ("log_float", {"low": 0.1, "high": 1.0, "factor": 1.0}, "factor"),
        ("logit", {"low": 0.0, "high": 0.9}, "within (0, 1)"),
        ("logit", {"low": 0.1, "high": 1.0}, "within (0, 1)"),
        ("int", {"low": 1.5, "high": 3}, "low"),
        ("int", {"low": 3, "high": 3}, "`low` must be below `high`"),
        ("categorical", {"values": []}, "at least two different ones"),
        ("categorical", {"values": ["a"]}, "at least two different ones"),
        ("categorical", {"values": ["a", "a"]}, "at least two different ones"),
        ("ordered", {"values": [1, 2], "init_values": [3]}, "`init_values` must be some of"),
        ("ordered", {"values": [1, 2], "init_values": []}, "`init_values` must be some of"),
        ("loguniform", {"low": 0.1, "high": 1.0}, "log_float"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused_with_the_reason(kind: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as error:
        PBTConfig(total_steps=10, perturbation_interval=2, hyperparameters={"x": {"kind": kind, **values}})
    assert says in str(error.value)


@pytest.mark.parametrize("name", SPACES)
def test_chance_comes_from_the_given_generator_alone(name: str) -> None:
    space = SPACES[name]
    before = random.getstate(), repr(np.random.get_state(legacy=False))
    ways = [[space.draw(chance(4)), space.resample(chance(4)), space.perturb(space.draw(chance(5)), chance(4))] for _ in "ab"]
    assert ways[0] == ways[1]
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == before


finite = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1e-9, 1e6)
seeds = st.integers(0, 2**32 - 1)


@hypothesis_settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.tuples(finite, finite, st.floats(1e-3, 1.0), st.sampled_from(["two_point", "normal"])).map(
            lambda given: (Float, sorted(given[:2]), {"step": given[2], "noise": given[3]})
        ),
        st.tuples(positive, positive, st.floats(1.001, 1e3), st.sampled_from(["two_point", "normal"])).map(
            lambda given: (LogFloat, sorted(given[:2]), {"factor": given[2], "noise": given[3]})
        ),
        st.tuples(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6), st.floats(1.001, 1e3)).map(
            lambda given: (Logit, sorted(given[:2]), {"factor": given[2]})
        ),
        st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000), st.floats(1e-3, 1.0)).map(
            lambda given: (Int, sorted(given[:2]), {"step": given[2]})
        ),
    ).filter(lambda given: given[1][0] < given[1][1]),
    seeds,
)
def test_no_space_and_no_chance_leads_out_of_bounds(given: Any, seed: int) -> None:
    kind, (low, high), options = given
    space, generator = kind(low=low, high=high, **options), chance(seed)
    values = [low, high, space.draw(generator), space.resample(generator)]
    values += [space.perturb(value, generator) for value in values]
    values += [space.perturb(value, generator) for value in values]
    assert [value for value in values if space.problem(value)] == []
    assert {type(value) for value in values[2:]} == {int if kind is Int else float}


def test_bounds_that_a_scale_does_not_tell_apart_are_bounds() -> None:
    space, generator = Logit(low=1e-06, high=1.0000000000000002e-06), np.random.default_rng(0)
    assert space.perturb(1e-06, generator) in (space.low, space.high)
