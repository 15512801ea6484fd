"""The source of truth of a run: ``events.jsonl``, one strict JSON object a line, only ever appended to.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast, final

from morphogen.telemetry.events import Json

Record: TypeAlias = Mapping[str, Json]


@final
class JsonlSink:
    r"""Appends each record to a file and hands it to the operating system at once: a crash loses no whole record.

    A run is resumed by keeping :attr:`offset` in its checkpoint and giving it back as ``resume_at``: what was written
    after the checkpoint will be written again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "events.jsonl"
        >>> sink = JsonlSink(path)
        >>> sink.write({"event": "RunStarted", "seconds": 0.25})
        >>> path.read_text()
        '{"event":"RunStarted","seconds":0.25}\n'
        >>> sink.offset
        38
        >>> sink.close()
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_at: int | None = None) -> None:
        """Open ``path`` for appending, making it if it is not there.

        Args:
            path: The file; its directory must be there.
            resume_at: Bytes to keep, an earlier ``offset``; None keeps all, and ends a torn last line.

        Raises:
            ValueError: ``resume_at`` is not the end of a record of this file.
            OSError: The file cannot be opened or cut.
        """
        self._path = Path(path)
        if resume_at is not None:
            _truncate(self._path, resume_at)
        self._file = open(self._path, "ab", buffering=0)
        self._offset = self._file.tell()
        if not _ends_a_line(self._path, self._offset):
            self._append(b"\n")

    @property
    def offset(self) -> int:
        """The size of the file in bytes after the last whole record."""
        return self._offset

    def write(self, record: Record) -> None:
        """Append ``record`` as one line.

        Raises:
            ValueError: The record holds a non-finite float (see ``record_of``), or the sink is closed.
            OSError: The line could not be written whole, for instance as the disk is full.
        """
        line = json.dumps(record, allow_nan=False, separators=(",", ":"))
        self._append(line.encode("ascii") + b"\n")

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        self._file.close()

    def _append(self, line: bytes) -> None:
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self._path}: wrote {written} of {len(line)} bytes of a record. Free some disk space.")
        self._offset += written


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadResult:
    """What a log holds.

    Attributes:
        records: The records in the order of writing.
        malformed_count: Lines that are not a JSON object with an ``event``.
        has_torn_line: Whether the last line lacks its end and cannot be read: the run is writing it now, or was killed
            while it did. Not counted as malformed.
    """

    records: tuple[dict[str, Json], ...]
    malformed_count: int
    has_torn_line: bool = False


def read_records(path: str | os.PathLike[str]) -> ReadResult:
    """Return the records of the log at ``path``, of a finished, running or crashed run.

    Raises:
        OSError: The file cannot be read.
    """
    *lines, rest = Path(path).read_bytes().split(b"\n")
    parsed = [_record_in(line) for line in lines]
    records = [record for record in parsed if record is not None]
    last = _record_in(rest)
    if last is not None:
        records.append(last)
    return ReadResult(
        records=tuple(records),
        malformed_count=len(parsed) - len(records) + (last is not None),
        has_torn_line=bool(rest) and last is None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ArmRecords:
    """The records of one arm in one repeat; ``index`` counts these pairs in the order of their first record."""

    index: int
    arm: str
    repeat: int
    records: tuple[Record, ...]

    @property
    def title(self) -> str:
        """The arm and repeat in words."""
        return f"{self.arm}, repeat {self.repeat}"


def arm_records(records: Iterable[Record]) -> tuple[ArmRecords, ...]:
    """Return the records that say their arm and repeat, by these."""
    grouped: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        arm, repeat = record.get("arm"), record.get("repeat")
        if isinstance(arm, str) and isinstance(repeat, int):
            grouped.setdefault((arm, repeat), []).append(record)
    return tuple(ArmRecords(index, *key, tuple(group)) for index, (key, group) in enumerate(grouped.items()))


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Return the records whose event is ``kind``, in order."""
    return [record for record in records if record.get("event") == kind]


def last_of(records: Sequence[Record], kind: str) -> Record | None:
    """Return the last record whose event is ``kind``, None where there is none."""
    return next((record for record in reversed(records) if record.get("event") == kind), None)


def elapsed_seconds(records: Iterable[Record]) -> float:
    """Return the seconds on the clocks of all processes that wrote the log: that of a resumed run starts at 0 again.

    Example:
        >>> elapsed_seconds([{"seconds": 4.0}, {"seconds": 9.0}, {"seconds": 2.0}, {"seconds": 5.0}])
        14.0
    """
    total = previous = 0.0
    for record in records:
        seconds = number_in(record, "seconds") or 0.0
        total += seconds - previous if seconds >= previous else seconds
        previous = seconds
    return total


def finished_records(runs: Iterable[ArmRecords], arm: str) -> list[Record]:
    """Return the ``ArmFinished`` record of each repeat of ``arm`` that has ended."""
    ends = (last_of(run.records, "ArmFinished") for run in runs if run.arm == arm)
    return [end for end in ends if end is not None]


def result_rows(records: Sequence[Record]) -> list[Record]:
    """Return the rows of the finished run; before that, means without interval over the repeats that have ended."""
    end = last_of(records, "RunFinished")
    if end is not None and records_in(end, "rows"):
        return list(records_in(end, "rows"))
    runs = arm_records(records)
    rows: list[Record] = []
    for arm in dict.fromkeys(run.arm for run in runs):
        ends = finished_records(runs, arm)
        means = {name: _mean(ends, name) for name in ("parameters", "train_flops", "wall_seconds")}
        rollbacks = sum(number_in(end, "rollbacks") or 0 for end in ends)
        row: Record = {
            "arm": arm,
            "repeats": len(ends),
            "mean": _mean(ends, "test_metric"),
            "rollbacks": rollbacks,
            **means,
        }
        rows += [row] if ends else []
    return rows


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """A slot came into ``stage`` at ``step``; ``number`` counts the run's ``StageChanged`` records, None for none."""

    step: float
    stage: str
    why: str
    blueprint: str | None = None
    number: int | None = None


def standing_stages(run: ArmRecords, slot: str) -> list[StageEntry]:
    """Return the stages of ``slot`` that no rollback took back, the first from step 0.

    A tick that saw a stage no record led to counts as an entry: a rollback restores stages without one.
    """
    changes = [change for change in of_kind(run.records, "StageChanged") if change.get("slot") == slot]
    entries = [StageEntry(0, text_in(changes[0], "previous") if changes else "dormant", "At the start.")]
    number = -1
    for record in run.records:
        kind, step = record["event"], step_of(record)
        number += kind == "StageChanged"
        while len(entries) > 1 and entries[-1].step > step:
            entries.pop()
        seen = mapping_in(record, "stages").get(slot) if kind == "TickMeasured" else None
        if kind == "StageChanged" and record.get("slot") == slot:
            blueprint = text_in(record, "blueprint", "") or None
            entries.append(StageEntry(step, text_in(record, "stage"), text_in(record, "reason"), blueprint, number))
        elif isinstance(seen, str) and seen != entries[-1].stage:
            entries.append(StageEntry(step, seen, f"Seen at tick {text_in(record, 'tick')}."))
    return entries


@dataclasses.dataclass(frozen=True)
class RollbackEntry:
    """A rollback at ``place`` among the records of its run, which threw away the train steps from ``start`` to ``end``."""

    number: int
    place: int
    record: Record
    start: float
    end: float


def rollback_entries(run: ArmRecords) -> list[RollbackEntry]:
    """Return the rollbacks of ``run`` in order.

    ``from_step`` and ``to_step`` are on the governor's own clock, which counts on when the run goes back. They are moved
    onto the train steps by the step of the record: the one it came from or, where that lies back, the one it went to.
    """
    entries: list[RollbackEntry] = []
    for place, record in enumerate(run.records):
        if record["event"] == "Rollback":
            here, before = step_of(record), step_of(run.records[place - 1]) if place else 0.0
            end = _number_or(record, "from_step", here)
            start = min(_number_or(record, "to_step", end), end)
            anchor = here if here in (start, end) else start if before > here else end
            entries.append(RollbackEntry(len(entries), place, record, start + here - anchor, end + here - anchor))
    return entries


def _number_or(record: Record, name: str, missing: float) -> float:
    value = number_in(record, name)
    return missing if value is None or not math.isfinite(value) else value


def step_of(record: Record) -> float:
    """Return the train step of ``record``, 0 where it has none."""
    return _number_or(record, "train_step", 0)


def _mean(records: Sequence[Record], name: str) -> float | None:
    values = [value for record in records if (value := number_in(record, name)) is not None]
    return sum(values) / len(values) if values else None


def number_in(record: Record, name: str) -> float | None:
    """Return the number under ``name``, NaN and infinities too; None where it is missing or no number.

    Example:
        >>> number_in({"train_loss": "nan"}, "train_loss"), number_in({"metric": None}, "metric")
        (nan, None)
    """
    value = record.get(name)
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def text_in(record: Record, name: str, missing: str = "n/a") -> str:
    """Return what is under ``name`` as words: lists joined by commas, floats to 4 digits, ``missing`` for null.

    Example:
        >>> text_in({"parts": ["model", "optimizer"], "penalty": 0.123456}, "parts")
        'model, optimizer'
    """
    return _words(record.get(name), missing)


def list_in(record: Record, name: str) -> list[Json]:
    """Return the list under ``name``, empty where there is none."""
    value = record.get(name)
    return value if isinstance(value, list) else []


def mapping_in(record: Record, name: str) -> dict[str, Json]:
    """Return the mapping under ``name``, empty where there is none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def records_in(record: Record, name: str) -> list[dict[str, Json]]:
    """Return the mappings in the list under ``name``."""
    return [item for item in list_in(record, name) if isinstance(item, dict)]


def _words(value: Json, missing: str) -> str:
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_words(item, missing) for item in value) or missing
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item, missing)}" for key, item in value.items()) or missing
    return str(value)


def _record_in(line: bytes) -> dict[str, Json] | None:
    """The record in ``line``, or None where it holds none."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    record = cast("dict[str, Json]", value)
    return record if isinstance(record.get("event"), str) else None


def _truncate(path: Path, size: int) -> None:
    """Cut the file down to ``size`` bytes, which must be the end of one of its lines."""
    found = path.stat().st_size if path.exists() else 0
    if not 0 <= size <= found:
        raise ValueError(
            f"`resume_at` must be at most the size of {path}, {found} bytes, got {size}. The log is not the one that "
            "the checkpoint was made with: put it back, or start a new run."
        )
    if not _ends_a_line(path, size):
        raise ValueError(
            f"`resume_at` must be the end of a line of {path}, got {size}. Give the `offset` of the sink that wrote it."
        )
    if found > size:
        os.truncate(path, size)


def _ends_a_line(path: Path, size: int) -> bool:
    """Whether the first ``size`` bytes of the file are whole lines."""
    if size == 0:
        return True
    with open(path, "rb") as file:
        return _byte_at(file, size - 1) == b"\n"


def _byte_at(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read(1)
