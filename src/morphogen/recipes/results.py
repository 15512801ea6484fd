"""From results of single runs to the table: means with 95% intervals, and the paired difference. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from morphogen.recipes.config import ARMS, Arm
from morphogen.telemetry.metrics import difference_texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm of one repeat.

    Attributes:
        arm: "static", "reference" or "grown".
        repeat: Number of the repeat, from 0.
        test_metric: On the test split; larger is better.
        decision_metric: On the decision split.
        parameters: At the end.
        train_flops: Of all training steps, failed seeds included, and of scoring seeds on the decision split.
        wall_seconds: Of training.
        rollbacks: Rewinds by the governor.
        skipped_steps: Optimizer steps stopped by the governor.
    """

    arm: Arm
    repeat: int
    test_metric: float
    decision_metric: float
    parameters: int
    train_flops: int
    wall_seconds: float
    rollbacks: int
    skipped_steps: int


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95% Student t interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One arm in the table; all but the interval are means over repeats."""

    arm: Arm
    test_metric: Interval
    parameters: float
    train_flops: float
    wall_seconds: float
    rollbacks: float


def interval(values: Sequence[float]) -> Interval:
    """Return mean +- t(0.975, n - 1) * s / sqrt(n)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def table(results: Sequence[ArmResult]) -> tuple[Row, ...]:
    """Return one row for each arm that has results."""
    rows: list[Row] = []
    for arm in ARMS:
        own = [result for result in results if result.arm == arm]
        if own:
            rows.append(
                Row(
                    arm=arm,
                    test_metric=interval([result.test_metric for result in own]),
                    parameters=statistics.fmean(result.parameters for result in own),
                    train_flops=statistics.fmean(result.train_flops for result in own),
                    wall_seconds=statistics.fmean(result.wall_seconds for result in own),
                    rollbacks=statistics.fmean(result.rollbacks for result in own),
                )
            )
    return tuple(rows)


def paired_difference(results: Sequence[ArmResult], better: Arm, worse: Arm) -> Interval | None:
    """Return the interval of test metric ``better`` minus ``worse``, paired by repeat; None without pairs."""
    metrics = {(result.arm, result.repeat): result.test_metric for result in results}
    repeats = sorted({repeat for arm, repeat in metrics if arm == better and (worse, repeat) in metrics})
    if not repeats:
        return None
    return interval([metrics[better, repeat] - metrics[worse, repeat] for repeat in repeats])


def sentence(difference: Interval | None, metric: str = "accuracy") -> str:
    """Return the verdict on grown against static in plain words; ``metric`` is what the metric is called."""
    if difference is None:
        return "No pair of a grown and a static run to compare."
    mean, low, high = difference.mean, difference.low, difference.high
    if low is None or high is None:
        shown = difference_texts((mean,), metric)[0]
        return f"Grown against static: {shown} in a single pair; run more repeats for an interval."
    shown, *ends = difference_texts((mean, low, high), metric)
    evidence = f"{shown} [{', '.join(end.split()[0] for end in ends)}], 95% paired, {difference.repeats} repeats"
    if low > 0.0:
        return f"The grown network beats the static host by {evidence}."
    if high < 0.0:
        return f"The grown network loses to the static host by {evidence}."
    return f"No significant difference between grown and static: {evidence}."
