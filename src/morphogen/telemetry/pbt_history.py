"""What the log of a population tells: who scored what with what, and who took over whom. Pure: records to plain views.

Source: standard library only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from morphogen.telemetry.jsonl import Record, last_of, mapping_in, number_in, of_kind, text_in


@dataclasses.dataclass(frozen=True)
class Report:
    """A member at the end of an interval; the score is NaN where it was lost."""

    member: int
    interval: int
    score: float
    hyperparameters: Record
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Takeover:
    """A member took over another one, or only explored: then ``source`` is itself."""

    member: int
    interval: int
    source: int
    source_interval: int
    reason: str
    strategy: str
    score_before: float
    source_score: float
    score_after: float | None

    @property
    def is_exploit(self) -> bool:
        """Whether another member was taken over."""
        return self.reason != "explore"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A part of a lineage: the intervals ``first`` to ``last`` of ``member``."""

    member: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Success:
    """How exploits of one strategy went, as shares of those that are known to have come to something."""

    strategy: str
    exploits: int
    above_own_past: float
    above_source: float
    mean_gain_on_source: float


@dataclasses.dataclass(frozen=True)
class History:
    """A population as its log tells of it.

    Attributes:
        population_size: Members.
        interval_steps: Steps between two decisions.
        total_steps: Steps of each member.
        sign: 1 where more is better, -1 where less is.
        reports: By (member, interval).
        takeovers: In the order of the log.
    """

    population_size: int
    interval_steps: int
    total_steps: int
    sign: float
    reports: dict[tuple[int, int], Report]
    takeovers: tuple[Takeover, ...]

    def step_after(self, interval: int) -> int:
        """Return how many steps a member has done after ``interval``."""
        return min(interval * self.interval_steps, self.total_steps)

    def of_member(self, member: int) -> list[Report]:
        """Return the reports of a member, by interval."""
        return [self.reports[key] for key in sorted(self.reports) if key[0] == member]

    @property
    def best(self) -> Report | None:
        """The member whose last score is best, as it reported last; None where no score is a number."""
        latest = [reports[-1] for member in range(self.population_size) if (reports := self.of_member(member))]
        finite = [report for report in latest if math.isfinite(report.score)]
        return max(finite, key=lambda report: (self.sign * report.score, -report.member), default=None)

    def lineage(self, end: Report) -> tuple[Stretch, ...]:
        """Return how a member came to where it was at ``end``, from the start of the run on."""
        taken = {(each.member, each.interval): each for each in self.takeovers if each.is_exploit}
        stretches: list[Stretch] = []
        member, last = end.member, end.interval
        while True:
            entries = [interval for who, interval in taken if who == member and interval < last]
            stretches.append(Stretch(member, max(entries) + 1 if entries else 1, last))
            if not entries:
                return tuple(stretches[::-1])
            entry = taken[member, max(entries)]
            member, last = entry.source, entry.source_interval

    def success(self) -> tuple[Success, ...]:
        """Return how exploits went, a row for each strategy."""
        strategies = sorted({each.strategy for each in self.takeovers if each.is_exploit})
        return tuple(self._success(strategy) for strategy in strategies)

    def _success(self, strategy: str) -> Success:
        known = [
            (each, each.score_after)
            for each in self.takeovers
            if each.is_exploit and each.strategy == strategy and each.score_after is not None
        ]
        gains = [self.sign * (after - each.source_score) for each, after in known]
        own = [self.sign * (after - each.score_before) > 0 for each, after in known if math.isfinite(each.score_before)]
        return Success(strategy, len(known), _mean(own), _mean([gain > 0 for gain in gains]), _mean(gains))


def history_of(records: Sequence[Record]) -> History:
    """Return what ``records`` tell; of two records of the same thing the later one counts."""
    start = last_of(records, "PopulationStarted") or {}
    reports: dict[tuple[int, int], Report] = {}
    for record in records:
        if record.get("event") in ("MemberReported", "MemberLost"):
            report = _report(record)
            reports[report.member, report.interval] = report
    exploited = {(_whole(record, "event_number"), _whole(record, "member")): record for record in _exploited(records)}
    return History(
        population_size=_whole(start, "population_size"),
        interval_steps=_whole(start, "interval_steps"),
        total_steps=_whole(last_of(records, "PopulationReconfigured") or start, "total_steps"),
        sign=-1.0 if start.get("mode") == "min" else 1.0,
        reports=reports,
        takeovers=tuple(_takeover(record, reports) for record in exploited.values()),
    )


def _exploited(records: Sequence[Record]) -> list[Record]:
    return of_kind(records, "MemberExploited")


def _report(record: Record) -> Report:
    lost = record.get("event") == "MemberLost"
    return Report(
        member=_whole(record, "member"),
        interval=_whole(record, "interval"),
        score=math.nan if lost else _number(record, "score"),
        hyperparameters=mapping_in(record, "hyperparameters"),
        problem=text_in(record, "problem") if lost else "",
    )


def _takeover(record: Record, reports: dict[tuple[int, int], Report]) -> Takeover:
    member, interval = _whole(record, "member"), _whole(record, "interval")
    after = reports.get((member, interval + 1))
    return Takeover(
        member=member,
        interval=interval,
        source=_whole(record, "source"),
        source_interval=_whole(record, "source_interval"),
        reason=text_in(record, "reason"),
        strategy=text_in(record, "strategy"),
        score_before=_number(record, "score_before"),
        source_score=_number(record, "source_score"),
        score_after=None if after is None or not math.isfinite(after.score) else after.score,
    )


def _whole(record: Record, name: str) -> int:
    return int(number_in(record, name) or 0)


def _number(record: Record, name: str) -> float:
    value = number_in(record, name)
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
