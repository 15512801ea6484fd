"""The words of a report: numbers, durations, nested settings and the verdict."""

from __future__ import annotations

import math

from morphogen.telemetry.markup import yaml
from morphogen.telemetry.report_page import large_text, time_text, verdict_of


def test_an_interval_that_touches_zero_is_not_significant() -> None:
    assert verdict_of(0.01, 0.0, 0.02, repeats="5", metric="accuracy").value.startswith("Not significant")
    assert verdict_of(0.01, None, None, repeats="1", metric="accuracy").value == (
        "No verdict: paired repeats 1 give no interval; grown minus static host is +1.0 points."
    )


def test_words_for_numbers() -> None:
    assert [large_text(value) for value in (0, 999, 1_000, 2.5e9, 1e18, None, math.nan)] == [
        "0", "999", "1 k", "2.5 G", "1e+03 P", "n/a", "nan",
    ]  # fmt: skip
    assert [time_text(value) for value in (0.04, 59.44, 59.96, 61, 3_600, 7_380, None)] == [
        "0.0 s", "59.4 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "2 h 03 min", "n/a",
    ]  # fmt: skip
    assert yaml({"a": {"b": [1, None]}, "c": {}, "d": "x: y"}) == 'a:\n  b: [1, null]\nc: {}\nd: "x: y"'
