"""The log keeps every whole record through crashes and resumes, and says what it could not read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import (
    ArmRecords,
    JsonlSink,
    arm_records,
    elapsed_seconds,
    number_in,
    read_records,
    result_rows,
    rollback_entries,
    standing_stages,
    text_in,
)

LOG = "events.jsonl"


def numbered(number: int) -> dict[str, Json]:
    return {"event": "Numbered", "number": number}


def write(path: Path, *numbers: int, resume_at: int | None = None) -> int:
    """Append numbered records as a process does that ends well; return the offset after them."""
    with contextlib.closing(JsonlSink(path, resume_at=resume_at)) as sink:
        for number in numbers:
            sink.write(numbered(number))
        return sink.offset


def numbers(path: Path) -> list[Json]:
    return [record["number"] for record in read_records(path).records]


def test_one_record_a_line_readable_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / LOG)
    sink.write({"event": "A", "value": 0.1 + 0.2, "text": "ü\n\u2028\ud800", "nothing": None})
    sink.write(numbered(1))
    lines = (tmp_path / LOG).read_bytes().split(b"\n")
    assert lines[0] == b'{"event":"A","value":0.30000000000000004,"text":"\\u00fc\\n\\u2028\\ud800","nothing":null}'
    assert lines[2] == b""
    assert sink.offset == (tmp_path / LOG).stat().st_size
    sink.close()


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("floats") / LOG
    sink = JsonlSink(path)
    sink.write({"event": "A", "value": value})
    sink.close()
    read = read_records(path).records[0]["value"]
    assert isinstance(read, float)
    assert (read, math.copysign(1, read)) == (value, math.copysign(1, value))


def test_a_record_that_is_no_strict_json_is_refused_whole(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / LOG)
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write({"event": "A", "value": math.nan})
    assert (tmp_path / LOG).read_bytes() == b""
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(numbered(1))


def test_a_full_disk_is_an_error() -> None:
    with contextlib.closing(JsonlSink("/dev/full")) as sink:
        with pytest.raises(OSError, match="No space left"):
            sink.write(numbered(1))
        assert sink.offset == 0


def test_an_existing_log_is_appended_to(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / LOG, number)
    assert numbers(tmp_path / LOG) == [0, 1, 2]


def test_a_resumed_log_equals_one_that_was_never_interrupted(tmp_path: Path) -> None:
    write(tmp_path / "whole", *range(6))
    checkpoint = write(tmp_path / LOG, *range(3))
    write(tmp_path / LOG, 99)
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"event":"Nu')
    assert write(tmp_path / LOG, resume_at=checkpoint) == checkpoint
    write(tmp_path / LOG, *range(3, 6), resume_at=checkpoint)
    assert (tmp_path / LOG).read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("offset", [1_000, -1])
def test_a_resume_beyond_the_log_is_refused_and_changes_nothing(tmp_path: Path, offset: int) -> None:
    write(tmp_path / LOG, 0)
    before = (tmp_path / LOG).read_bytes()
    with pytest.raises(ValueError, match=rf"`resume_at` must be at most .*, {len(before)} bytes, got {offset}"):
        JsonlSink(tmp_path / LOG, resume_at=offset)
    assert (tmp_path / LOG).read_bytes() == before


def test_a_resume_of_a_log_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 bytes, got 10"):
        JsonlSink(tmp_path / LOG, resume_at=10)
    assert not (tmp_path / LOG).exists()


def test_a_resume_within_a_record_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / LOG, 0)
    before = (tmp_path / LOG).read_bytes()
    with pytest.raises(ValueError, match="`resume_at` must be the end of a line"):
        JsonlSink(tmp_path / LOG, resume_at=5)
    assert (tmp_path / LOG).read_bytes() == before


def test_malformed_lines_are_counted_and_a_torn_last_line_is_not_one(tmp_path: Path) -> None:
    good = json.dumps(numbered(1)).encode()
    lines = [good, b"{]", b"", b"[1]", b'{"number":2}', b'{"event":3}', b"\xff\xfe", good]
    (tmp_path / LOG).write_bytes(b"\n".join(lines) + b'\n{"event":"Nu')
    log = read_records(tmp_path / LOG)
    assert [record["number"] for record in log.records] == [1, 1]
    assert (log.malformed_count, log.has_torn_line) == (6, True)


def test_a_whole_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"no\n" + json.dumps(numbered(1)).encode())
    log = read_records(tmp_path / LOG)
    assert (len(log.records), log.malformed_count, log.has_torn_line) == (1, 1, False)


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b'{"event":"Nu')
    write(tmp_path / LOG, 1)
    log = read_records(tmp_path / LOG)
    assert (len(log.records), log.malformed_count, log.has_torn_line) == (1, 1, False)


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_log_cut_anywhere_gives_a_beginning_of_its_records(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cuts") / LOG
    path.write_bytes(b"".join(json.dumps(numbered(number)).encode() + b"\n" for number in range(6))[:cut])
    assert numbers(path) == list(range(len(numbers(path))))
    assert read_records(path).malformed_count == 0


def test_a_tick_costs_less_than_800_bytes(played: Callable[..., Path]) -> None:
    log = played() / LOG
    num_ticks = sum(record["event"] == "TickMeasured" for record in read_records(log).records)
    assert log.stat().st_size / num_ticks <= 800


def test_fields_are_read_as_what_they_are() -> None:
    record: dict[str, Json] = {"nan": "nan", "low": "-inf", "flag": True, "text": "3", "null": None, "whole": 3}
    assert math.isnan(number_in(record, "nan") or 0)
    assert number_in(record, "low") == -math.inf
    assert [number_in(record, name) for name in ("flag", "text", "null", "gone", "whole")] == [None] * 4 + [3]
    nested: dict[str, Json] = {"value": {"a": [1, None], "b": 0.123456}, "empty": []}
    assert text_in(nested, "value") == "a 1, n/a, b 0.1235"
    assert [text_in(nested, name) for name in ("empty", "gone")] == ["n/a", "n/a"]


def test_seconds_go_on_where_a_resumed_clock_starts_again() -> None:
    assert elapsed_seconds([{"seconds": 4.0}, {"seconds": 9.0}, {}, {"seconds": 2.0}, {"seconds": 5.0}]) == 14.0


def change(step: int, previous: str, stage: str) -> dict[str, Json]:
    return {"event": "StageChanged", "train_step": step, "slot": "early", "previous": previous, "stage": stage}


def tick(step: int, stage: str) -> dict[str, Json]:
    return {"event": "TickMeasured", "train_step": step, "stages": {"early": stage}}


def run_of(records: Iterable[dict[str, Json]]) -> ArmRecords:
    return arm_records([{**record, "arm": "grown", "repeat": 0} for record in records])[0]


def stages_of(*records: dict[str, Json]) -> list[tuple[float, str]]:
    return [(entry.step, entry.stage) for entry in standing_stages(run_of(records), "early")]


def rollbacks_of(*records: dict[str, Json]) -> list[tuple[float, float]]:
    return [(entry.start, entry.end) for entry in rollback_entries(run_of(records))]


def test_stages_that_a_rollback_took_back_do_not_stand() -> None:
    before = (change(10, "dormant", "germinated"), change(20, "germinated", "training"), tick(20, "training"))
    assert stages_of(*before) == [(0, "dormant"), (10, "germinated"), (20, "training")]
    assert stages_of(*before, tick(15, "germinated")) == [(0, "dormant"), (10, "germinated")]
    again = change(16, "germinated", "training")
    assert stages_of(*before, tick(15, "germinated"), again) == [(0, "dormant"), (10, "germinated"), (16, "training")]


def test_a_stage_that_a_tick_saw_without_a_record_of_it_counts() -> None:
    seen = stages_of(change(10, "dormant", "germinated"), tick(30, "dormant"))
    assert seen == [(0, "dormant"), (10, "germinated"), (30, "dormant")]


@pytest.mark.parametrize(
    ("before", "here", "span"),
    [
        (90, 100, (60, 100)),  # the clocks agree, the record is written before the run's clock goes back
        (90, 60, (60, 100)),  # or after it
        (190, 200, (160, 200)),  # the run's clock is ahead: the governor's began later
        (90, 40, (40, 80)),  # the run's clock is behind, as it went back before, and has just gone back
        (70, 80, (40, 80)),  # the same, not yet gone back
    ],
)
def test_a_rollback_is_placed_on_the_train_steps(before: int, here: int, span: tuple[int, int]) -> None:
    rollback: dict[str, Json] = {"event": "Rollback", "train_step": here, "from_step": 100, "to_step": 60}
    assert rollbacks_of(tick(before, "dormant"), rollback) == [span]


def test_a_rollback_that_does_not_say_its_steps_has_an_empty_span() -> None:
    assert rollbacks_of({"event": "Rollback", "train_step": 7}) == [(7, 7)]


def test_rows_before_the_end_are_means_without_an_interval(played: Callable[..., Path]) -> None:
    records = read_records(played(finishes=False) / LOG).records
    rows = {row["arm"]: row for row in result_rows(records)}
    assert list(rows) == ["static", "reference", "grown"]
    ends = [record for record in records if record["event"] == "ArmFinished" and record["arm"] == "grown"]
    expected = sum(number_in(end, "test_metric") or 0 for end in ends) / 3
    assert rows["grown"]["mean"] == pytest.approx(expected)
    assert rows["grown"].get("low") is None
