"""Statistics of an evaluation, against naive oracles and known coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from morphogen.recipes.comparison import LEARNED, Difference, Estimate, Played, bootstrap, compare, on_front, sentences


def episode(player: str, seed: int, **changes: float) -> Played:
    values = {"test_metric": 0.5, "metric": 0.5, "total_return": 0.0, "parameters": 100, "relative_flops": 1.0}
    fixed = {"host_parameters": 100, "ticks": 4, "rolled_back": False}
    return Played(player=player, seed=seed, **{**values, **fixed, **changes})


def test_the_interval_is_that_of_every_resample_where_there_are_few() -> None:
    values = np.array([0.0, 1.0, 5.0])
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    exact = np.quantile(means, (0.025, 0.975), method="inverted_cdf")
    found = bootstrap(values, np.random.default_rng(0), resamples=20_000)
    assert found.mean == 2.0
    np.testing.assert_allclose((found.low, found.high), exact)


def test_the_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=30)
    found = bootstrap(values, np.random.default_rng(0), resamples=20_000)
    other = scipy_bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    np.testing.assert_allclose((found.low, found.high), other.confidence_interval, atol=0.02)


@pytest.mark.parametrize(("pairs", "least", "most"), [(30, 0.91, 0.965), (5, 0.78, 0.88)])
def test_coverage_is_what_the_docstring_says(pairs: int, least: float, most: float) -> None:
    generator = np.random.default_rng(7)
    draws = generator.normal(1.0, 2.0, size=(1500, pairs))
    estimates = [bootstrap(values, generator, resamples=600) for values in draws]
    assert least < np.mean([estimate.low <= 1.0 <= estimate.high for estimate in estimates]) < most


def test_pairing_takes_away_what_the_seeds_have_in_common() -> None:
    generator = np.random.default_rng(0)
    of_seed = generator.normal(0, 10.0, size=20)
    played = [episode("wait", seed, total_return=of_seed[seed]) for seed in range(20)]
    played += [episode(LEARNED, seed, total_return=of_seed[seed] + 1 + 0.1 * (seed % 2)) for seed in reversed(range(20))]
    rows, differences = compare(played, seed=0, resamples=1000)
    of_return = next(each for each in differences if each.quantity == "total_return")
    assert of_return.outcome == "beats" and 1.0 <= of_return.estimate.low <= 1.05 <= of_return.estimate.high <= 1.1
    assert rows[0].total_return.high - rows[0].total_return.low > 5  # unpaired, nothing could be told


def test_intervals_hang_on_the_seed_alone_and_not_on_who_else_plays() -> None:
    generator = np.random.default_rng(0)
    learned = [episode(LEARNED, seed, total_return=generator.normal()) for seed in range(8)]
    wait = [episode("wait", seed, total_return=generator.normal()) for seed in range(8)]
    others = [episode("random", seed, total_return=generator.normal()) for seed in range(8)]
    alone = compare([*learned, *wait], seed=1, resamples=500)[1]
    among = compare([*others, *learned, *wait], seed=1, resamples=500)[1]
    assert set(alone) <= set(among)
    assert compare([*learned, *wait], seed=2, resamples=500)[1] != alone


def test_a_missing_episode_is_refused() -> None:
    played = [episode(LEARNED, 0), episode(LEARNED, 1), episode("wait", 0)]
    with pytest.raises(ValueError, match="same seeds of every player, got others of 'wait'"):
        compare(played, seed=0, resamples=100)


def test_nothing_is_estimated_from_what_is_not_finite_or_alone() -> None:
    for values in ([1.0], [1.0, float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="at least two finite numbers"):
            bootstrap(np.array(values), np.random.default_rng(0))


def test_the_front_is_that_of_looking_at_each_pair() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        values, costs = generator.integers(0, 4, size=(2, 6)).tolist()
        found = on_front(values, costs)
        for place in range(6):
            dominated = False
            for other in range(6):
                no_worse = values[other] >= values[place] and costs[other] <= costs[place]
                better = values[other] > values[place] or costs[other] < costs[place]
                dominated = dominated or (no_worse and better)
            assert found[place] is not dominated


def difference(low: float, high: float, pairs: int = 30, quantity: str = "total_return") -> Difference:
    return Difference(other="wait", quantity=quantity, estimate=Estimate((low + high) / 2, low, high), pairs=pairs)


def rows_of(*players: tuple[str, float, float]):
    played = [
        episode(name, seed, test_metric=metric, parameters=parameters)
        for name, metric, parameters in players
        for seed in range(2)
    ]
    return compare(played, seed=0, resamples=100)[0]


def test_sentences_say_who_wins_and_when_nobody_does() -> None:
    rows = rows_of((LEARNED, 0.5, 100), ("wait", 0.5, 100))
    assert sentences(rows, [difference(0.1, 0.3)], "accuracy")[0] == (
        "The learned policy beats wait in return by +0.2 [+0.1, +0.3], 95% paired bootstrap, 30 episodes."
    )
    assert (
        "loses to wait in test accuracy by -2.0 points [-3.0, -1.0]"
        in (sentences(rows, [difference(-0.03, -0.01, quantity="test_metric")], "accuracy")[0])
    )
    for low, high in ((-0.1, 0.3), (0.0, 0.3), (0.0, 0.0)):
        assert sentences(rows, [difference(low, high)], "accuracy")[0].startswith("No significant difference")
    few = difference(0.1, 0.3, pairs=5)
    assert few.outcome == "ties with" and sentences(rows, [few], "accuracy")[0].startswith("Too few episodes to tell")


def test_sentences_name_who_dominates() -> None:
    rows = rows_of((LEARNED, 0.5, 100), ("wait", 0.4, 50), ("random", 0.6, 90))
    said = sentences(rows, [], "accuracy")
    assert said == (
        "It is not on the Pareto front of mean test accuracy against parameters: random dominates it.",
        "It is not on the Pareto front of mean test accuracy against training FLOPs: random dominates it.",
    )
    alike = sentences(rows_of((LEARNED, 0.5, 100), ("wait", 0.5, 100)), [], "accuracy")
    assert all(words.startswith("It is on the Pareto front") for words in alike)


def test_networks_that_came_to_nothing_are_left_out_of_the_metric_and_named() -> None:
    nan = float("nan")
    played = [episode("wait", seed, test_metric=0.4) for seed in range(8)]
    played += [episode(LEARNED, seed, test_metric=nan if seed < 2 else 0.5, rolled_back=seed < 2) for seed in range(8)]
    played += [episode("random", seed, test_metric=nan, rolled_back=True) for seed in range(8)]
    rows, differences = compare(played, seed=0, resamples=200)
    by_name = {row.player: row for row in rows}
    assert by_name[LEARNED].test_metric.mean == 0.5 and by_name[LEARNED].without_metric == 2
    assert not by_name["random"].on_parameters_front and by_name[LEARNED].on_parameters_front
    of_metric = {each.other: each for each in differences if each.quantity == "test_metric"}
    assert of_metric["wait"].pairs == 6 and of_metric["wait"].outcome == "beats"
    assert of_metric["random"].pairs == 0 and of_metric["random"].outcome == "ties with"
    said = sentences(rows, differences, "accuracy")
    assert "2 of 8 networks of learned came to nothing: they have no test accuracy." in said
    assert "8 of 8 networks of random came to nothing: they have no test accuracy." in said
