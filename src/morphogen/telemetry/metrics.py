"""Metrics in words. Records hold metrics of which more is better: accuracy as a fraction, perplexity as minus its logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence

_SHOWN_WITH_ONE_DIGIT = 5e-4


def metric_text(value: float | None, metric: str) -> str:
    """Return ``value`` of ``metric`` in words: accuracy as percent, perplexity as itself.

    Example:
        >>> metric_text(0.875, "accuracy"), metric_text(-1.5, "perplexity")
        ('87.5%', '4.482')
    """
    if value is None or not math.isfinite(value):
        return "n/a" if value is None else str(value)
    if metric == "perplexity":
        return f"{math.exp(min(-value, 700.0)):.4g}"
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4g}"


def interval_text(low: float | None, high: float | None, metric: str) -> str:
    """Return an interval of ``metric`` in brackets, the smaller number first."""
    if low is None or high is None:
        return "[n/a]"
    ends = (high, low) if metric == "perplexity" else (low, high)
    return f"[{', '.join(metric_text(end, metric) for end in ends)}]"


def difference_texts(values: Sequence[float], metric: str) -> list[str]:
    """Return signed differences, positive where the first is better.

    Accuracy is in points, with as many digits as keep a difference from reading 0.0. Perplexity is in nats per token: a
    difference of 0.01 means 1 % of it.
    """
    if metric == "perplexity":
        return [f"{value:+.4f} nats per token" for value in values]
    if metric != "accuracy":
        return [f"{value:+.4g}" for value in values]
    digits = 1 if all(abs(value) >= _SHOWN_WITH_ONE_DIGIT for value in values) else 2
    return [f"{100 * value:+.{digits}f} points" for value in values]
