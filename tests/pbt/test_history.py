"""What can be asked about what happened."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from morphogen.pbt import Exploit, MemberReport, lineage, success_by_strategy
from morphogen.pbt.history import Segment


def exploit(member: int, interval: int, source: int = 1, **changes: Any) -> Exploit:
    facts: dict[str, Any] = {
        "event": interval - 1,
        "reason": "worse",
        "source_step": 10 * interval,
        "source_interval": interval,
        "score_before": 1.0,
        "source_score": 2.0,
        "strategy": "copy",
        "hyperparameters_before": {"lr": 0.1},
        "hyperparameters": {"lr": 0.2},
        "moves": {"lr": "perturbed"},
        "seed": 7,
    }
    return Exploit(member=member, interval=interval, source=source, **{**facts, **changes})


def test_a_lineage_goes_back_through_whoever_was_taken_over() -> None:
    first, second = exploit(1, 2, source=2), exploit(0, 4, source=1)
    others = [exploit(2, 3, source=0), exploit(0, 1, source=1), exploit(1, 5, source=2), exploit(3, 4, source=2)]
    found = lineage(0, 6, [*others, second, first])
    assert found == [Segment(2, 1, 2, None), Segment(1, 3, 4, first), Segment(0, 5, 6, second)]
    assert [(each.first, each.last) for each in found] == [(1, 2), (3, 4), (5, 6)]  # every interval once


def test_a_lineage_of_nobody_else() -> None:
    assert lineage(3, 5, []) == [Segment(3, 1, 5, None)]
    assert lineage(3, 5, [exploit(3, 5, source=0)]) == [Segment(3, 1, 5, None)]  # it comes after
    assert lineage(3, 5, [exploit(3, 2, source=3, reason="explore")]) == [Segment(3, 1, 5, None)]


def test_a_source_that_was_ahead_or_behind_is_followed_where_it_was() -> None:
    taken = exploit(0, 3, source=1, source_interval=5)
    assert lineage(0, 4, [taken]) == [Segment(1, 1, 5, None), Segment(0, 4, 4, taken)]


def test_how_strategies_went() -> None:
    exploits = [
        exploit(0, 1, 1, score_after=3.0),
        exploit(0, 2, 1, score_after=1.5),
        exploit(0, 3, 1, score_after=0.5),
        exploit(0, 4, 1),  # not known yet
        exploit(0, 5, 0, score_after=9.0, reason="explore"),
        exploit(0, 6, 1, score_after=2.5, strategy="reset", score_before=math.nan, reason="not finite"),
    ]
    copy, reset = success_by_strategy([dataclasses.replace(each) for each in exploits])
    assert (copy.strategy, copy.exploits) == ("copy", 3) and (reset.strategy, reset.exploits) == ("reset", 1)
    assert (copy.above_own_past, copy.above_source) == pytest.approx((2 / 3, 1 / 3))
    assert copy.mean_gain_on_source == pytest.approx((1.0 - 0.5 - 1.5) / 3)
    assert math.isnan(reset.above_own_past) and reset.above_source == 1.0  # NaN before is no past to be above


def test_where_less_is_better_a_gain_is_less() -> None:
    down = [exploit(0, 1, 1, score_before=3.0, source_score=2.0, score_after=1.0)]
    (row,) = success_by_strategy(down, mode="min")
    assert (row.above_own_past, row.above_source, row.mean_gain_on_source) == (1.0, 1.0, 1.0)
    (row,) = success_by_strategy(down)
    assert (row.above_own_past, row.above_source, row.mean_gain_on_source) == (0.0, 0.0, -1.0)


def test_nothing_is_known_of_what_did_not_happen() -> None:
    assert success_by_strategy([]) == []
    (row,) = success_by_strategy([exploit(0, 1, 1)])
    assert row.exploits == 0 and math.isnan(row.above_source) and math.isnan(row.mean_gain_on_source)


def test_what_failed_afterwards_came_to_nothing_that_could_be_compared() -> None:
    rows = success_by_strategy([exploit(0, 1, 1, score_after=math.nan), exploit(0, 2, 1, score_after=3.0)])
    assert (rows[0].exploits, rows[0].above_source, rows[0].mean_gain_on_source) == (1, 1.0, 1.0)


def test_a_report_is_a_record_of_what_the_scheduler_sees() -> None:
    report = MemberReport(2, 3, 30, 1.5, {"lr": 0.1}, seed=9, scores=(1.0, 2.0))
    record = report.record()
    assert (record.member, record.score, record.step, record.scores) == (2, 1.5, 30, (1.0, 2.0))
    assert record.is_alive and record.is_recent and record.is_sound
    lost = MemberReport(2, 3, 30, math.nan, {"lr": 0.1}, seed=9, problem="it broke").record(is_recent=False)
    assert not (lost.is_alive or lost.is_recent or lost.is_sound)
