"""The page of a train job, at every moment of its life, from its log alone."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report

STARTED: dict[str, Json] = {
    "event": "TrainStarted", "step": 0, "task": "dig<i>ts", "metric_name": "accuracy", "total_steps": 200, "episode_steps": 50,
    "parameters": 9155, "num_envs": 2, "slots": ["early"], "command": "morphogen train --config x", "config": {"job": "train"},
    "versions": {"torch": "2"},
}  # fmt: skip
FINISHED: dict[str, Json] = {
    "event": "TrainFinished", "step": 200, "updates": 2, "episodes": 4, "mean_return": 7.25, "metric": 0.875,
    "parameters": 1234.0, "rollbacks": 1, "wall_seconds": 4.0,
}  # fmt: skip
FAULTED: dict[str, Json] = {"event": "TrainFaulted", "step": 100, "kind": "EnvironmentFault", "message": "a worker died"}


def update(number: int, metric: float) -> list[dict[str, Json]]:
    step = 100 * number
    episodes: list[dict[str, Json]] = [
        {
            "event": "EpisodeFinished", "step": step, "env": env, "ticks": 50, "total_reward": 10 * metric, "metric": metric,
            "parameters": 1000 + env, "relative_flops": 1.5, "rolled_back": env == 1 and number == 2,
            "terms": {"rent": -0.5, "gain": 8.0}, "ops": {"wait": 50},
        }
        for env in (0, 1)
    ]  # fmt: skip
    averaged: dict[str, Json] = {
        "event": "EpisodesAveraged", "step": step, "episodes": 2, "mean_return": 10 * metric, "metric": metric,
        "parameters": 1000.5, "relative_flops": 1.5, "rollbacks": number - 1, "term": {"rent": -metric, "gain": 8.0},
        "op": {"wait": metric, "prune": 1 - metric},
    }  # fmt: skip
    updated: dict[str, Json] = {
        "event": "Updated", "step": step, "update": number, "seconds": float(number), "steps_per_second": 20.0,
        "mean_return": 10 * metric, "mean_length": 50.0, "episodes": 2 * number, "skipped_minibatches": 0,
        "kl": 0.01, "explained_variance": -0.5, "entropy": 0.6,
    }  # fmt: skip
    return [*episodes, averaged, updated]


UPDATES = [*update(1, 0.25), *update(2, 0.5)]


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


def test_a_finished_job_says_what_its_networks_came_to(tmp_path: Path) -> None:
    text = page_of(tmp_path, [STARTED, *UPDATES, FINISHED])
    assert "dig<i>ts: learning when to grow" in text
    assert "Last 4 episodes, means: return 7.25, accuracy 87.5% on the decision split, 1,234 parameters." in text
    assert "finished" in text and "not finished" not in text
    assert "1.5x" in text and "gain 8" in text and "rent -0.5" in text
    assert "morphogen train --config x" in text and 'job: "train"' in text


def test_tables_hold_the_beginning_and_the_end(tmp_path: Path) -> None:
    lines = page_of(tmp_path, [STARTED, *UPDATES]).splitlines()
    rent = lines.index("rent", lines.index("What was paid"))
    assert lines[rent : rent + 3] == ["rent", "-0.25", "-0.5"]
    wait = lines.index("wait", lines.index("What was done"))
    assert lines[wait : wait + 3] == ["wait", "25.0%", "50.0%"]
    assert lines.count("governor") == 1 and lines.count("task") == 3


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([STARTED], ["Not trained to the end yet.", "not finished: step 0 of 200", "n/a: not measured yet."]),
        ([STARTED, *UPDATES], ["Not trained to the end yet.", "not finished: step 200 of 200"]),
        ([STARTED, *update(1, 0.5), FAULTED], ["Stopped by EnvironmentFault: a worker died"]),
        ([STARTED, *update(1, 0.5), FAULTED, *update(2, 0.5)], ["Not trained to the end yet."]),
    ],
)
def test_a_job_under_way_says_how_far_it_is(tmp_path: Path, records: list[dict[str, Json]], words: list[str]) -> None:
    text = page_of(tmp_path, records)
    for word in words:
        assert word in text
