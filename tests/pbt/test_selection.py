"""Who takes over whom: every method against theory, and the rules that hold for all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from scipy.stats import ttest_1samp, ttest_ind

from morphogen.pbt import MemberRecord, PBTConfig
from morphogen.pbt.selection import MAX_SCORES, SELECTORS, ranked, welch

METHODS = ("truncation", "binary_tournament", "t_test")


def config(method: str = "truncation", **changes: Any) -> PBTConfig:
    space = {"x": {"kind": "float", "low": 0.0, "high": 1.0}}
    given: dict[str, Any] = {
        "total_steps": 100,
        "perturbation_interval": 10,
        "hyperparameters": space,
        "exploit_method": method,
    }
    return PBTConfig(**{**given, **changes})


def record(member: int, score: float, **changes: Any) -> MemberRecord:
    scores = tuple(score + 0.01 * wiggle for wiggle in range(-4, 5))
    return MemberRecord(**{"member": member, "score": score, "hyperparameters": {"x": 0.5}, "scores": scores, **changes})


def streams(event: int) -> Callable[[int], np.random.Generator]:
    return lambda member: np.random.default_rng((event, member))


def select(made: PBTConfig, records: list[MemberRecord], event: int = 0) -> dict[int, list[int]]:
    found = SELECTORS[made.exploit_method](made, ranked(made, records), streams(event))
    return {member: [source.member for source in sources] for member, sources in found.items()}


def test_truncation_replaces_the_worst_by_one_of_the_best_each_as_probable() -> None:
    made = config(population_size=10, truncation_ratio=0.3)
    records = [record(member, float(member)) for member in range(10)]
    firsts: Counter[int] = Counter()
    for event in range(600):
        found = select(made, records, event)
        assert found.keys() == {0, 1, 2}
        for sources in found.values():
            firsts[sources[0]] += 1
            assert sorted(sources[1:], reverse=True) == sources[1:]  # then the others, from the best on
            assert len({*sources}) == len(sources)
    assert firsts.keys() == {7, 8, 9} and all(540 < count < 660 for count in firsts.values())


@pytest.mark.parametrize("rank", [0, 2, 5, 7])
def test_a_tournament_is_won_as_often_as_theory_says(rank: int) -> None:
    """One opponent is drawn of the n - 1 others: a member with b better ones is exploited with probability b / (n - 1)."""
    made = config("binary_tournament", population_size=8)
    records = [record(member, -float(member)) for member in range(8)]
    draws = 4000
    lost = Counter(sources[rank][0] for event in range(draws) if rank in (sources := select(made, records, event)))
    p = rank / 7
    assert abs(sum(lost.values()) - p * draws) <= 4.0 * math.sqrt(p * (1 - p) * draws)
    for winner in range(rank):  # each as probable
        assert abs(lost[winner] - draws / 7) <= 4.0 * math.sqrt(draws / 7)
    assert all(winner < rank for winner in lost)


def test_the_opponent_that_won_is_the_source() -> None:
    made = config("binary_tournament", population_size=3)
    records = [record(0, 0.0), record(1, 1.0), record(2, 2.0)]
    for event in range(200):
        for member, sources in select(made, records, event).items():
            opponent = [other for other in (0, 1, 2) if other != member][streams(event)(member).integers(2)]
            assert sources[0] == opponent and records[opponent].score > records[member].score


@pytest.mark.parametrize("seed", range(10))
def test_welch_is_that_of_scipy(seed: int) -> None:
    chance = np.random.default_rng(seed)
    higher = chance.normal(0.3, chance.uniform(0.1, 3.0), chance.integers(2, 12)).tolist()
    lower = chance.normal(0.0, chance.uniform(0.1, 3.0), chance.integers(2, 12)).tolist()
    expected = ttest_ind(higher, lower, equal_var=False, alternative="greater").pvalue
    assert welch(higher, lower) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("higher", "lower", "p_value"),
    [
        ([], [], math.nan),
        ([1.0], [0.0, 0.0], math.nan),
        ([1.0, math.inf], [0.0, 0.0], math.nan),
        ([1.0, math.nan], [0.0, 0.0], math.nan),
        ([1.0, 1.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 1.0], 1.0),
    ],
)
def test_welch_where_there_is_little_to_test(higher: list[float], lower: list[float], p_value: float) -> None:
    assert welch(higher, lower) == pytest.approx(p_value, nan_ok=True)


def test_welch_with_one_sample_without_spread_is_that_of_scipy() -> None:
    higher, lower = [1.0, 1.0, 1.0], [0.0, 0.5, 0.7, 0.2]
    assert welch(higher, lower) == pytest.approx(ttest_1samp(lower, 1.0, alternative="less").pvalue)


def test_a_t_test_needs_significance_and_looks_at_the_last_results_alone() -> None:
    made = config("t_test", population_size=2)
    noisy = [record(0, 0.0, scores=(5.0, -5.0, 4.0, -4.0)), record(1, 0.1, scores=(5.1, -4.9, 4.1, -3.9))]
    clear = [record(0, 0.0, scores=(0.1, -0.1, 0.1, -0.1)), record(1, 1.0, scores=(1.1, 0.9, 1.1, 0.9))]
    assert select(made, noisy) == {}
    assert select(made, clear) == {0: [1]}
    assert select(made, [record(0, 0.0, scores=(0.0,)), record(1, 1.0, scores=(1.0,))]) == {}  # too few to tell
    old = tuple([100.0, -100.0] * 5)
    longer = [record(one.member, one.score, scores=(*old, *(one.scores * 5)[-MAX_SCORES:])) for one in clear]
    assert select(made, longer) == {0: [1]}


def test_a_t_test_is_wrong_about_equals_as_rarely_as_it_says() -> None:
    made = config("t_test", population_size=2, significance=0.05)
    chance, wrong = np.random.default_rng(0), 0
    for event in range(2000):
        samples = chance.normal(0.0, 1.0, (2, 8)).tolist()
        records = [record(member, float(np.mean(sample)), scores=tuple(sample)) for member, sample in enumerate(samples)]
        wrong += bool(select(made, records, event))
    assert 140 < wrong < 260  # 2 members, 5 % each


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("records", [[], [record(3, 1.0)]], ids=["nobody", "one"])
def test_where_nobody_is_to_be_taken_over_nobody_is(method: str, records: list[MemberRecord]) -> None:
    assert select(config(method), records) == {}


scores = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]))
populations = st.lists(st.tuples(scores, st.booleans(), st.booleans()), min_size=2, max_size=12)


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.sampled_from(METHODS), populations, st.sampled_from(["max", "min"]), st.floats(0.0, 10.0), st.integers(0, 1000))
def test_a_source_is_always_another_one_sound_recent_and_strictly_better(
    method: str, population: list[Any], mode: Any, gap: float, event: int
) -> None:
    made = config(method, population_size=12, mode=mode, min_gap=gap)
    records = [
        record(member, score, is_alive=alive, is_recent=recent) for member, (score, alive, recent) in enumerate(population)
    ]
    for member, sources in select(made, records, event).items():
        assert sources and len({*sources}) == len(sources) and member not in sources
        for source in (records[number] for number in sources):
            difference = source.score - records[member].score
            assert (difference if mode == "max" else -difference) > gap
            assert source.is_alive and source.is_recent and math.isfinite(source.score)


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.sampled_from(METHODS), populations, st.integers(0, 1000))
def test_the_least_is_the_mirror_image_of_the_most(method: str, population: list[Any], event: int) -> None:
    most = [record(member, score, is_recent=recent) for member, (score, _, recent) in enumerate(population)]
    least = [
        record(each.member, -each.score, scores=tuple(-score for score in each.scores), is_recent=each.is_recent)
        for each in most
    ]
    assert select(config(method, population_size=12), most, event) == select(
        config(method, population_size=12, mode="min"), least, event
    )


def test_equal_scores_rank_by_place_and_what_is_no_number_does_not_rank() -> None:
    values = [1.0, math.nan, 1.0, math.inf, 2.0, -math.inf]
    assert [each.member for each in ranked(config(), [record(*pair) for pair in enumerate(values)])] == [4, 0, 2]
