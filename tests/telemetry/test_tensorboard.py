"""TensorBoard reads back what was written, on one step axis, also after a rollback and a resume."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Event, Json
from morphogen.telemetry.jsonl import read_records
from morphogen.telemetry.tensorboard import TensorBoardSink


def tick(step: int, **values: Json) -> dict[str, Json]:
    base: dict[str, Json] = {"event": "TickMeasured", "arm": "grown", "repeat": 0, "train_step": step, "alphas": {}}
    return {**base, **values}


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def tags(directory: Path) -> set[str]:
    return set(EventAccumulator(str(directory)).Reload().Tags()["scalars"])


def test_a_played_run_is_read_back_by_arm_and_repeat(tmp_path: Path, played: Callable[..., Path]) -> None:
    records = read_records(played(repeats=2, with_faults=False, ticks=5) / "events.jsonl").records
    sink = TensorBoardSink(tmp_path / "tb")
    for record in records:
        sink.write(record)
    sink.close()
    found = {str(path.relative_to(tmp_path / "tb")) for path in (tmp_path / "tb").glob("*/*")}
    assert found == {f"{arm}/repeat-{repeat}" for arm in ("static", "reference", "grown") for repeat in (0, 1)}
    grown = [r for r in records if r["event"] == "TickMeasured" and (r["arm"], r["repeat"]) == ("grown", 1)]
    directory = tmp_path / "tb" / "grown" / "repeat-1"
    scalars = {"train_loss", "metric", "parameters", "learning_rate"}
    assert tags(directory) == scalars | {"alpha/early", "alpha/late"}
    expected = [(record["train_step"], pytest.approx(record["train_loss"], rel=1e-6)) for record in grown]
    assert curve(directory, "train_loss") == expected
    assert [step for step, _ in curve(directory, "metric")] == [40, 60, 80, 100], "the first tick measured no metric"


def test_nothing_is_written_before_the_first_measured_record(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tb")
    sink.write({"event": "ArmStarted", "arm": "grown", "repeat": 0})
    sink.close()
    assert not (tmp_path / "tb").exists()


def test_nan_stays_nan_and_null_is_left_out(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(tick(1, train_loss="nan", metric=None))
    sink.close()
    assert tags(tmp_path / "grown" / "repeat-0") == {"train_loss"}
    assert math.isnan(curve(tmp_path / "grown" / "repeat-0", "train_loss")[0][1])


def test_steps_trained_again_after_a_rollback_replace_the_earlier_ones(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in ((10, 1.0), (20, 2.0), (30, 9.0), (20, 3.0), (30, 4.0)):
        sink.write(tick(step, metric=value))
    sink.close()
    assert curve(tmp_path / "grown" / "repeat-0", "metric") == [(10, 1.0), (20, 3.0), (30, 4.0)]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    for steps, value in (((10, 20, 30, 40), 1.0), ((30, 40), 2.0)):
        sink = TensorBoardSink(tmp_path)
        for step in steps:
            sink.write(tick(step, metric=value))
        sink.close()
        for file in (tmp_path / "grown" / "repeat-0").iterdir():  # files are read by the second in their names
            file.rename(file.with_name(re.sub(r"tfevents\.\d+", "tfevents.1000000000", file.name)) if value == 1 else file)
    assert curve(tmp_path / "grown" / "repeat-0", "metric") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_what_ppo_measures_is_read_back(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in ((100, "nan"), (200, 2.0), (300, 3.0)):
        sink.write({"event": "Updated", "seconds": 1.0, "step": step, "mean_return": value, "epochs": 4})
        if step == 200:
            sink.write({"event": "Evaluated", "seconds": 1.0, "step": step, "mean_return": 7.0, "episodes": 5})
    sink.write({"event": "PPOFinished", "step": 300, "wall_seconds": 9.0})
    sink.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "training"]
    assert tags(tmp_path / "training") == {"mean_return", "epochs"}
    assert curve(tmp_path / "training", "mean_return")[1:] == [(200, 2.0), (300, 3.0)]
    assert curve(tmp_path / "training", "epochs") == [(100, 4.0), (200, 4.0), (300, 4.0)]
    assert curve(tmp_path / "evaluation", "mean_return") == [(200, 7.0)]


def test_a_record_without_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`TickMeasured` must carry arm, repeat and train_step, got None"):
        TensorBoardSink(tmp_path).write({"event": "TickMeasured"})


def test_a_directory_that_cannot_be_made_drops_the_sink_alone(tmp_path: Path) -> None:
    class TickMeasured(Event):
        """Measured nothing."""

    (tmp_path / "file").write_text("not a directory")
    bus = EventBus([TensorBoardSink(tmp_path / "file")])
    with pytest.warns(RuntimeWarning, match="TensorBoardSink failed"):
        bus.emit(TickMeasured(), arm="grown", repeat=0, train_step=1)
    assert bus.dropped == ("TensorBoardSink",)


def test_what_networks_came_to_is_a_run_with_a_tag_for_each_term(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, metric in ((10, 0.25), (20, 0.5)):
        sink.write(
            {"event": "EpisodesAveraged", "step": step, "metric": metric, "term": {"rent": -metric}, "op": {"wait": 0.75}}
        )
        sink.write({"event": "EpisodeFinished", "step": step, "metric": 9.0})
    sink.close()
    assert tags(tmp_path / "episodes") == {"metric", "term/rent", "op/wait"}
    assert curve(tmp_path / "episodes", "metric") == [(10, 0.25), (20, 0.5)]
    assert curve(tmp_path / "episodes", "term/rent") == [(10, -0.25), (20, -0.5)]
