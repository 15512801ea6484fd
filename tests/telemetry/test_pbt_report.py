"""The page of a population, at every moment of its life, from its log alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.markup import Markup
from morphogen.telemetry.pbt_charts import Bar, LineageChart, lineage_chart, share_bars
from morphogen.telemetry.pbt_history import Stretch, history_of
from morphogen.telemetry.report import write_report
from morphogen.telemetry.tensorboard import TensorBoardSink

STARTED: dict[str, Json] = {
    "event": "PopulationStarted", "step": 0, "member": "ppo", "subject": "Cart<Pole>-v1", "population_size": 3,
    "total_steps": 250, "interval_steps": 100, "kinds": {"lr": "log_float", "act": "categorical"},
    "choices": {"act": ["relu", "tanh"]}, "mode": "max", "engine": "inline", "command": "morphogen pbt --config x",
    "config": {"env": "Cart<Pole>-v1"}, "versions": {"torch": "2"},
}  # fmt: skip
FINISHED: dict[str, Json] = {
    "event": "PopulationFinished", "step": 250, "best": 0, "score": 40.0, "hyperparameters": {}, "wall_seconds": 4.0,
    "cpu_seconds": 3.0,
}  # fmt: skip


def reported(member: int, interval: int, score: Json, rate: float = 1e-3) -> dict[str, Json]:
    return {
        "event": "MemberReported", "step": min(100 * interval, 250), "member": member, "interval": interval, "score": score,
        "hyperparameters": {"lr": rate, "act": "relu"}, "metrics": {}, "cpu_seconds": 0.5,
    }  # fmt: skip


def exploited(number: int, member: int, interval: int, source: int, **changes: Json) -> dict[str, Json]:
    return {
        "event": "MemberExploited", "step": 100 * interval, "event_number": number, "member": member, "interval": interval,
        "reason": "worse", "source": source, "source_interval": interval, "score_before": 5.0, "source_score": 20.0,
        "strategy": "copy", "hyperparameters_before": {"lr": 1e-3}, "hyperparameters": {"lr": 1e-2}, **changes,
    }  # fmt: skip


def lost(member: int, interval: int) -> dict[str, Json]:
    return {"event": "MemberLost", "step": 100, "member": member, "interval": interval, "problem": "it <burns>\nTraceback"}


FIRST = [reported(0, 1, 5.0), reported(1, 1, 20.0), reported(2, 1, 10.0)]
SECOND = [reported(0, 2, 30.0, 1e-2), reported(1, 2, 25.0), lost(2, 2)]
THIRD = [reported(0, 3, 40.0, 1e-2), reported(1, 3, 26.0), reported(2, 3, 28.0)]
RECORDS = [
    STARTED, *FIRST, exploited(0, 0, 1, 1), *SECOND,
    exploited(1, 2, 2, 0, reason="lost", score_before="nan", source_score=30.0), *THIRD, FINISHED,
]  # fmt: skip


class Checked(HTMLParser):
    """Text of a page whose tags all close."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(directory: Path, records: Sequence[dict[str, Json]]) -> str:
    sink = JsonlSink(directory / "events.jsonl")
    for record in records:
        sink.write({"seconds": 0.0, **record})
    sink.close()
    page = Checked()
    page.feed(write_report(directory).read_text(encoding="utf-8"))
    assert not page.open
    return "\n".join(page.text)


def health_of(text: str, name: str) -> str:
    return text.split(f"\n{name}\n")[1].split()[0]


def test_a_finished_population_says_who_is_best_and_why(tmp_path: Path) -> None:
    text = page_of(tmp_path, RECORDS)
    assert "Cart<Pole>-v1: a population of 3" in text
    assert "Best: member 0, score 40, with lr 0.01, act relu." in text
    assert "finished" in text and "not finished" not in text
    assert "best 40" in text and "best 0.01" in text and "best relu" in text, "the ends of the curves"
    assert "member 0 took over member 1 after 100 steps (worse: 5 against 20)" in text
    assert "member 2 was lost: it <burns>" in text and "Traceback" not in text
    assert "member 1, steps 0 to 100, of the best lineage" in text and "member 0, steps 100 to 250, of the best lineage" in text
    assert "copy, above its source" in text and "copy, above its own past" in text
    assert "morphogen pbt --config x" in text
    assert health_of(text, "members lost") == "1"


def test_the_history_is_that_of_the_records() -> None:
    history = history_of(RECORDS)
    assert history.best is not None and history.best.member == 0
    assert history.lineage(history.best) == (Stretch(1, 1, 1), Stretch(0, 2, 3))
    [success] = history.success()
    assert (success.strategy, success.exploits) == ("copy", 2)
    assert (success.above_own_past, success.above_source) == (1.0, 0.5), "a member without a score has no past to compare with"
    assert success.mean_gain_on_source == pytest.approx((30 - 20 + 28 - 30) / 2)
    assert [history.step_after(interval) for interval in (0, 1, 2, 3)] == [0, 100, 200, 250]


def test_less_may_be_better_and_the_later_of_two_records_counts() -> None:
    history = history_of([{**STARTED, "mode": "min"}, *FIRST, reported(1, 1, 2.0), exploited(0, 0, 1, 1), reported(0, 2, 4.0)])
    assert history.best is not None and history.best.member == 1, "its last score counts"
    [success] = history.success()
    assert (success.above_own_past, success.mean_gain_on_source) == (1.0, 16.0)
    assert len(history.reports) == 4


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([STARTED], ["No member has a score yet.", "not finished: interval 0 of 3", "no interval is done yet"]),
        ([STARTED, *FIRST[:2]], ["not finished: interval 0 of 3", "Best so far: member 1, score 20"]),
        ([STARTED, *FIRST], ["not finished: interval 1 of 3", "No exploit yet."]),
        ([STARTED, *FIRST, exploited(0, 0, 1, 1)], ["copy", "n/a"]),
        ([STARTED, *(reported(member, 1, "nan") for member in range(3))], ["No member has a score yet."]),
        ([STARTED, *FIRST, {"event": "PopulationFaulted", "step": None, "kind": "PopulationLost", "message": "all gone"}],
         ["Stopped by PopulationLost: all gone"]),
        ([STARTED, {"event": "PopulationFaulted", "step": 1, "kind": "X", "message": "y"}, *FIRST], ["Best so far: member 1"]),
        ([STARTED, *FIRST, exploited(0, 0, 1, 0, reason="explore")], ["explore", "No exploit yet."]),
    ],
)  # fmt: skip
def test_a_population_under_way_says_how_far_it_is(tmp_path: Path, records: list[dict[str, Json]], words: list[str]) -> None:
    text = page_of(tmp_path, records)
    for word in words:
        assert word in text


def test_trouble_is_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("nonsense\n")
    refused: dict[str, Json] = {"event": "SourceRefused", "step": 100, "member": 0, "source": 1, "reason": "damaged"}
    text = page_of(tmp_path, [STARTED, *FIRST[:2], reported(2, 1, "nan"), refused, lost(0, 2)])
    for name in ("members lost", "sources refused", "scores that are no number", "malformed lines"):
        assert health_of(text, name) == "1", name
    assert "could not take over 1" in text and "damaged" in text


def test_a_source_that_is_less_far_does_not_draw_a_line_backwards(tmp_path: Path) -> None:
    records = [STARTED, *FIRST, *SECOND[:2], exploited(0, 0, 2, 2, source_interval=1), reported(0, 3, 50.0)]
    text = page_of(tmp_path, records)
    assert "member 2, steps 0 to 100, of the best lineage" in text and "best 50" in text


def test_pictures_of_nothing_and_of_many(tmp_path: Path) -> None:
    empty = LineageChart(label="x", population_size=3, last_step=10, lives=(), arrows=(), losses=())
    assert "no interval is done yet" in lineage_chart(empty)
    bars = share_bars("success", [Bar(name="a < b", share=math.nan, text="n/a"), Bar(name="c", share=1.0, text="100%")])
    assert isinstance(bars, Markup) and "a &lt; b" in bars
    many = [{**STARTED, "population_size": 100}, *(reported(member, 1, float(member)) for member in range(100))]
    text = page_of(tmp_path, many)
    assert "Best so far: member 99, score 99" in text


def test_a_population_without_a_beginning_is_a_page_too(tmp_path: Path) -> None:
    assert history_of([]).best is None
    assert "morphogen run" in page_of(tmp_path, FIRST), "without it nobody knows that it is one"


def test_tensorboard_shows_each_member(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for record in RECORDS:
        sink.write(record)
    sink.close()
    assert {path.name for path in tmp_path.iterdir()} == {"member-0", "member-1", "member-2"}
    found: dict[str, Any] = {path.name: list(path.iterdir()) for path in tmp_path.iterdir()}
    assert all(len(files) == 1 for files in found.values())
