"""Metrics in words: each in its own unit, and better is never shown as worse."""

from __future__ import annotations

import math

import pytest

from morphogen.telemetry.metrics import difference_texts, interval_text, metric_text


@pytest.mark.parametrize(
    ("value", "metric", "words"),
    [
        (0.8749, "accuracy", "87.5%"),
        (-math.log(4.25), "perplexity", "4.25"),
        (-math.log(50257), "perplexity", "5.026e+04"),
        (-1e6, "perplexity", "1.014e+304"),
        (0.123456, "return", "0.1235"),
        (None, "accuracy", "n/a"),
        (math.nan, "perplexity", "nan"),
    ],
)
def test_a_metric_in_words(value: float | None, metric: str, words: str) -> None:
    assert metric_text(value, metric) == words


def test_an_interval_begins_with_the_smaller_number() -> None:
    assert interval_text(0.5, 0.75, "accuracy") == "[50.0%, 75.0%]"
    assert interval_text(-math.log(5), -math.log(4), "perplexity") == "[4, 5]"
    assert interval_text(None, 0.1, "accuracy") == "[n/a]"


def test_differences_have_their_unit() -> None:
    assert difference_texts((0.031, -0.012), "accuracy") == ["+3.1 points", "-1.2 points"]
    assert difference_texts((0.0003,), "accuracy") == ["+0.03 points"]
    assert difference_texts((0.0123,), "perplexity") == ["+0.0123 nats per token"]
    assert difference_texts((2.0,), "return") == ["+2"]
