"""The log of a population that is resumed: the directory says what counts, and what does not is taken out of the log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphogen.pbt.history import Exploit, MemberReport
from morphogen.recipes.run_directory import write_bytes
from morphogen.telemetry.jsonl import read_records

_KEPT = ("PopulationStarted", "PopulationReconfigured", "PopulationFaulted")


def cut_back(log: Path, reports: Sequence[MemberReport], exploits: Sequence[Exploit], *, synchronous: bool) -> None:
    """Take out of ``log`` what was under way when the run stopped, which will be done and said again.

    Args:
        log: The event log; it is replaced whole or not at all.
        reports: Those that the directory holds.
        exploits: Likewise.
        synchronous: Everybody goes back to the interval that all have behind them, and not each to its own last one. What was
            decided after that is decided again.
    """
    known = {(report.member, report.interval) for report in reports}
    latest: dict[int, int] = {}
    for report in reports:
        latest[report.member] = max(report.interval, latest.get(report.member, 0))
    if synchronous:
        latest = dict.fromkeys(latest, min(latest.values(), default=0))
    done = {(exploit.event, exploit.member) for exploit in exploits if exploit.interval < latest.get(exploit.member, 0)}
    records = read_records(log).records
    decided = max((place for place, record in enumerate(records) if _is_decided(record, done)), default=-1)
    lines = [
        json.dumps(record, allow_nan=False, separators=(",", ":"))
        for place, record in enumerate(records)
        if _counts(record, known, done) or (record["event"] == "SourceRefused" and place <= decided)
    ]
    write_bytes(log, "".join(f"{line}\n" for line in lines).encode("ascii"))


def _counts(record: Mapping[str, Any], known: set[tuple[int, int]], done: set[tuple[int, int]]) -> bool:
    if record["event"] in ("MemberReported", "MemberLost"):
        return (record["member"], record["interval"]) in known
    return record["event"] in _KEPT or _is_decided(record, done)


def _is_decided(record: Mapping[str, Any], done: set[tuple[int, int]]) -> bool:
    return record["event"] == "MemberExploited" and (record["event_number"], record["member"]) in done
