"""The page of a PPO job, at every moment of its life, from its log alone."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import JsonlSink
from morphogen.telemetry.report import write_report

STARTED: dict[str, Json] = {
    "event": "PPOStarted", "step": 0, "env": "Cart<Pole>-v1", "total_steps": 400, "parameters": 9155,
    "observation_space": "Box(4)", "action_space": "Discrete(2)",
    "command": "morphogen ppo --config x", "config": {"gamma": 0.99}, "versions": {"torch": "2"},
}  # fmt: skip
FINISHED: dict[str, Json] = {"event": "PPOFinished", "step": 400, "updates": 4, "wall_seconds": 4.0}


def updated(number: int, mean_return: Json = 20.0) -> dict[str, Json]:
    return {
        "event": "Updated", "step": 100 * number, "update": number, "seconds": float(number), "steps_per_second": 2000.0,
        "mean_return": mean_return, "mean_length": 19.5, "episodes": 7, "skipped_minibatches": int(number == 2),
        "kl": 0.01, "explained_variance": -0.5, "entropy": 0.6,
    }  # fmt: skip


def evaluated(step: int, mean_return: float) -> dict[str, Json]:
    numbers: dict[str, Json] = {"mean_return": mean_return, "std_return": 1.5, "mean_length": 30.0}
    return {"event": "Evaluated", "step": step, "episodes": 10, **numbers}


UPDATES = [updated(1, "nan"), updated(2), updated(3, 25.0), updated(4, 31.25)]


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


def test_a_finished_job_says_what_it_reached(tmp_path: Path) -> None:
    text = page_of(tmp_path, [STARTED, *UPDATES[:2], evaluated(200, 22.0), *UPDATES[2:], evaluated(400, 33.0), FINISHED])
    assert "Cart<Pole>-v1: PPO" in text
    assert "Return 33 ± 1.5 over 10 evaluation episodes after 400 steps" in text
    assert "finished" in text and "not finished" not in text
    assert "training 31.25" in text and "evaluation 33" in text and "environment steps" in text
    assert "KL 0.01" in text and "EV -0.5" in text and "steps/s 2000" in text
    assert "morphogen ppo --config x" in text and "gamma: 0.99" in text


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([STARTED], ["Not evaluated yet.", "not finished: step 0 of 400", "n/a: not measured yet."]),
        ([STARTED, *UPDATES[:1]], ["not finished: step 100 of 400", "n/a: not measured yet."]),
        ([STARTED, *UPDATES[:2]], ["not finished: step 200 of 400", "training 20"]),
        (
            [STARTED, *UPDATES[:2], {"event": "PPOFaulted", "step": 200, "kind": "EnvironmentFault", "message": "on fire"}],
            ["Stopped by EnvironmentFault: on fire"],
        ),
        (
            [STARTED, {"event": "PPOFaulted", "step": 0, "kind": "EnvironmentFault", "message": "on fire"}, *UPDATES[:2]],
            ["Not evaluated yet."],
        ),
    ],
)
def test_a_job_under_way_says_how_far_it_is(tmp_path: Path, records: list[dict[str, Json]], words: list[str]) -> None:
    text = page_of(tmp_path, records)
    for word in words:
        assert word in text


def test_trouble_is_counted(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("nonsense\n")
    text = page_of(tmp_path, [STARTED, *UPDATES, {"event": "EpisodesRestarted", "step": 100, "reason": "x"}])
    health = text[: text.index("Not evaluated yet")]
    for name in ("skipped minibatches", "episodes begun anew after resuming", "malformed lines"):
        assert health.split(name)[1].split()[0] == "1", name
    assert health.split("faults")[1].split()[0] == "0"
