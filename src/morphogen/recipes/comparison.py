"""From episodes played on the same seeds to a table: means, paired bootstrap intervals, Pareto fronts, sentences. Pure.

Legend: P pairs, R resamples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from morphogen.state import RandomStreams
from morphogen.telemetry.metrics import difference_texts

Quantity = Literal["total_return", "test_metric"]
QUANTITIES: tuple[Quantity, ...] = ("total_return", "test_metric")
LEARNED = "learned"
"""What the trained policy is called in every table."""
MIN_PAIRS = 6
"""With fewer, not even differences that all have one sign are significant at 5 %: 2 * 0.5 ** 5 > 0.05."""
_LEVEL = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """One episode of one player.

    Attributes:
        player: Who decided.
        seed: Of the environment.
        test_metric: On the test split at the end; larger is better. NaN if the network came to nothing.
        metric: On the decision split, likewise.
        total_return: Undiscounted sum of rewards.
        parameters: At the end.
        host_parameters: Of the host alone.
        relative_flops: Training FLOPs over those of the host alone.
        ticks: Decisions.
        rolled_back: Whether the governor ended it.
    """

    player: str
    seed: int
    test_metric: float
    metric: float
    total_return: float
    parameters: int
    host_parameters: int
    relative_flops: float
    ticks: int
    rolled_back: bool


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayerRow:
    """One player in the table; everything is a mean over episodes, but the counts.

    Attributes:
        player: Who decided.
        episodes: How many.
        test_metric: On the test split, of the networks that did not come to nothing.
        total_return: Undiscounted sum of rewards.
        parameters: At the end.
        relative_flops: Training FLOPs over those of the host alone.
        rollbacks: Episodes that the governor ended.
        without_metric: Episodes whose network came to nothing; they count as rollbacks too.
        on_parameters_front: Nobody has a test metric as good with as few parameters, and one of the two better.
        on_flops_front: The same with training FLOPs.
    """

    player: str
    episodes: int
    test_metric: Estimate
    total_return: Estimate
    parameters: float
    relative_flops: float
    rollbacks: int
    without_metric: int
    on_parameters_front: bool
    on_flops_front: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """The trained policy minus another player, on the same seeds.

    Attributes:
        other: The other player.
        quantity: "total_return" or "test_metric".
        estimate: Of the mean difference.
        pairs: Episodes of each; of the test metric, those where both networks have one.
    """

    other: str
    quantity: Quantity
    estimate: Estimate
    pairs: int

    @property
    def outcome(self) -> Literal["beats", "loses to", "ties with"]:
        """What the interval says: ties where it holds 0, and where there are too few pairs to say anything."""
        if self.pairs < MIN_PAIRS:
            return "ties with"
        if self.estimate.low > 0.0:
            return "beats"
        return "loses to" if self.estimate.high < 0.0 else "ties with"


def bootstrap(values_P: NDArray[np.float64], generator: np.random.Generator, *, resamples: int = 10_000) -> Estimate:
    """Return the mean of ``values_P`` and its 95 % percentile bootstrap interval.

    Means of ``resamples`` draws of P values with replacement, from their 2.5 % to their 97.5 % quantile (Efron & Tibshirani
    1993, chapter 13). With few values it is too narrow, by about a factor of sqrt((P - 1) / P) and the tails of Student's t:
    at P = 5 it covers some 83 %, at P = 30 some 94 %.

    Args:
        values_P: At least two, finite; for paired data the differences within the pairs.
        generator: Draws the resamples.
        resamples: R.

    Raises:
        ValueError: There are fewer than two values, or one is not finite.

    Example:
        >>> bootstrap(np.array([1.0, 1.0, 1.0]), np.random.default_rng(0))
        Estimate(mean=1.0, low=1.0, high=1.0)
    """
    if len(values_P) < 2 or not np.isfinite(values_P).all():
        raise ValueError(f"`values_P` must be at least two finite numbers, got {values_P.tolist()}. Play more episodes.")
    means_R = values_P[generator.integers(len(values_P), size=(resamples, len(values_P)))].mean(1)
    low, high = np.quantile(means_R, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)).tolist()
    return Estimate(float(values_P.mean()), low, high)


def compare(played: Sequence[Played], *, seed: int, resamples: int) -> tuple[tuple[PlayerRow, ...], tuple[Difference, ...]]:
    """Return one row for each player, in the order of their first episode, and the differences of the trained policy.

    Args:
        played: Of every player one episode for each seed.
        seed: Of the resampling.
        resamples: Of each interval.

    Raises:
        ValueError: A player lacks the episode of a seed, or there are fewer than two.
    """
    by_player: dict[str, dict[int, Played]] = {}
    for episode in played:
        by_player.setdefault(episode.player, {})[episode.seed] = episode
    seeds = sorted(by_player[LEARNED])
    for player, episodes in by_player.items():
        if sorted(episodes) != seeds:
            raise ValueError(f"`played` must hold the same seeds of every player, got others of {player!r}. Play those left.")
    streams = RandomStreams(seed).child("bootstrap")
    ordered = {player: [episodes[seed] for seed in seeds] for player, episodes in by_player.items()}
    others = [player for player in ordered if player != LEARNED]
    differences: list[Difference] = []
    for player, quantity in itertools.product(others, QUANTITIES):
        gap_P = _values(ordered[LEARNED], quantity) - _values(ordered[player], quantity)
        estimate = _estimate(gap_P, streams.numpy("difference", player, quantity), resamples)
        pairs = int(np.isfinite(gap_P).sum())
        differences.append(Difference(other=player, quantity=quantity, estimate=estimate, pairs=pairs))
    return _rows(ordered, streams, resamples), tuple(differences)


def on_front(values: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Return which points are on the Pareto front: no other has a value as high and a cost as low, and one of them better.

    A point without a value (NaN) is not.

    Example:
        >>> on_front([0.9, 0.8, 0.8], [10, 5, 6])
        [True, True, False]
    """
    points = list(zip(values, costs, strict=True))
    return [
        not math.isnan(value) and not any(v >= value and c <= cost and (v, c) != (value, cost) for v, c in points)
        for value, cost in points
    ]


def sentences(rows: Sequence[PlayerRow], differences: Sequence[Difference], metric: str) -> tuple[str, ...]:
    """Return the outcome in plain words: against each player in return and in the test metric, then the Pareto fronts."""
    lost = [
        f"{row.without_metric} of {row.episodes} networks of {row.player} came to nothing: they have no test {metric}."
        for row in rows
        if row.without_metric
    ]
    return (*(_difference_sentence(each, metric) for each in differences), *_front_sentences(rows, metric), *lost)


def _rows(ordered: dict[str, list[Played]], streams: RandomStreams, resamples: int) -> tuple[PlayerRow, ...]:
    parameters = [float(np.mean([each.parameters for each in episodes])) for episodes in ordered.values()]
    flops = [float(np.mean([each.relative_flops for each in episodes])) for episodes in ordered.values()]
    metrics, returns = (
        [_estimate(_values(own, each), streams.numpy("mean", player, each), resamples) for player, own in ordered.items()]
        for each in ("test_metric", "total_return")
    )
    means = [metric.mean for metric in metrics]
    fronts = zip(on_front(means, parameters), on_front(means, flops), strict=True)
    return tuple(
        PlayerRow(
            player=player,
            episodes=len(episodes),
            test_metric=metrics[place],
            total_return=returns[place],
            parameters=parameters[place],
            relative_flops=flops[place],
            rollbacks=sum(each.rolled_back for each in episodes),
            without_metric=sum(math.isnan(each.test_metric) for each in episodes),
            on_parameters_front=cheap,
            on_flops_front=quick,
        )
        for place, ((player, episodes), (cheap, quick)) in enumerate(zip(ordered.items(), fronts, strict=True))
    )


def _estimate(values_P: NDArray[np.float64], generator: np.random.Generator, resamples: int) -> Estimate:
    """Return the estimate of the finite ones among ``values_P``, NaN where there are fewer than two."""
    finite_P = values_P[np.isfinite(values_P)]
    if len(finite_P) < 2:
        return Estimate(math.nan, math.nan, math.nan)
    return bootstrap(finite_P, generator, resamples=resamples)


def _values(episodes: Sequence[Played], quantity: Quantity) -> NDArray[np.float64]:
    return np.array([getattr(episode, quantity) for episode in episodes], dtype=np.float64)


def _difference_sentence(difference: Difference, metric: str) -> str:
    estimate, of_return = difference.estimate, difference.quantity == "total_return"
    numbers = (estimate.mean, estimate.low, estimate.high)
    shown, *ends = [f"{value:+.3g}" for value in numbers] if of_return else difference_texts(numbers, metric)
    evidence = f"{shown} [{', '.join(end.split()[0] for end in ends)}], 95% paired bootstrap, {difference.pairs} episodes"
    what = "return" if of_return else f"test {metric}"
    if difference.pairs < MIN_PAIRS:
        return f"Too few episodes to tell the learned policy from {difference.other} in {what}: {evidence}."
    if difference.outcome == "ties with":
        return f"No significant difference between the learned policy and {difference.other} in {what}: {evidence}."
    return f"The learned policy {difference.outcome} {difference.other} in {what} by {evidence}."


def _front_sentences(rows: Sequence[PlayerRow], metric: str) -> list[str]:
    own = next(row for row in rows if row.player == LEARNED)
    if math.isnan(own.test_metric.mean):
        return []
    said: list[str] = []
    for cost, is_on, name in (
        ("parameters", own.on_parameters_front, "parameters"),
        ("relative_flops", own.on_flops_front, "training FLOPs"),
    ):
        if is_on:
            said.append(f"It is on the Pareto front of mean test {metric} against {name}.")
            continue
        better = [
            row.player
            for row in rows
            if row.player != LEARNED
            and row.test_metric.mean >= own.test_metric.mean
            and getattr(row, cost) <= getattr(own, cost)
        ]
        said.append(f"It is not on the Pareto front of mean test {metric} against {name}: {', '.join(better)} dominates it.")
    return said
