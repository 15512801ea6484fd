"""The table's numbers, against values worked out by hand."""

from __future__ import annotations

import pytest

from morphogen.recipes.results import ArmResult, Interval, interval, paired_difference, sentence, table


def result(arm: str, repeat: int, metric: float, parameters: int = 100) -> ArmResult:
    return ArmResult(
        arm=arm,  # pyright: ignore
        repeat=repeat,
        test_metric=metric,
        decision_metric=metric,
        parameters=parameters,
        train_flops=10,
        wall_seconds=1.0,
        rollbacks=repeat,
        skipped_steps=0,
    )


def test_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])  # s = 1.2910, t(0.975, 3) = 3.1824, half = 2.0543
    assert found.mean == 2.5
    assert found.low == pytest.approx(0.44574, abs=1e-4)
    assert found.high == pytest.approx(4.55426, abs=1e-4)


def test_a_single_value_has_no_interval() -> None:
    assert interval([0.5]) == Interval(0.5, None, None, 1)


def test_difference_is_paired_by_repeat_not_by_order() -> None:
    results = [result("grown", 1, 0.9), result("static", 0, 0.5), result("static", 1, 0.8), result("grown", 0, 0.6)]
    found = paired_difference(results, "grown", "static")
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.high is not None and found.low is not None
    assert found.high - found.low < 1e-9  # both pairs differ by exactly 0.1


def test_unpaired_repeats_are_left_out() -> None:
    assert paired_difference([result("grown", 0, 0.9), result("static", 1, 0.5)], "grown", "static") is None


def test_rows_come_in_the_order_of_the_arms_and_average_over_repeats() -> None:
    rows = table([result("grown", 0, 0.8, 300), result("static", 0, 0.4), result("grown", 1, 0.6, 500)])
    assert [row.arm for row in rows] == ["static", "grown"]
    assert rows[1].parameters == 400
    assert rows[1].test_metric.mean == pytest.approx(0.7)
    assert rows[1].rollbacks == 0.5


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (None, "No pair"),
        (Interval(0.1, None, None, 1), "single pair"),
        (Interval(0.1, 0.02, 0.18, 5), "beats"),
        (Interval(-0.1, -0.18, -0.02, 5), "loses"),
        (Interval(0.1, -0.02, 0.22, 5), "No significant"),
    ],
)
def test_sentence_claims_no_more_than_the_interval(difference: Interval | None, words: str) -> None:
    assert words in sentence(difference)
