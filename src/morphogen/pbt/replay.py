"""Training the best lineage of a finished population again, alone: the same numbers, at the cost of one member."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from morphogen.errors import MorphogenError
from morphogen.pbt.config import PBTConfig
from morphogen.pbt.engines.hosting import Birth, Members, Succession, one_thread
from morphogen.pbt.history import Exploit, MemberReport, Segment, lineage
from morphogen.pbt.member import Factory, Trained


@dataclasses.dataclass(frozen=True)
class ReplayedInterval:
    """An interval of a lineage, trained again.

    Attributes:
        member: Whose place it was.
        interval: Number of the interval.
        step: How far the lineage had come at its end.
        recorded_score: What it came to in the population.
        score: What it came to now.
    """

    member: int
    interval: int
    step: int
    recorded_score: float
    score: float

    @property
    def is_same(self) -> bool:
        """Whether both scores are equal to the bit."""
        return self.score == self.recorded_score


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """A lineage, trained again.

    Attributes:
        segments: Whose intervals it is made of.
        intervals: Each of them, with both scores.
        parameters: All that travels of the member at the end, moments included.
        state: All of it, as data; see :func:`morphogen.pbt.snapshots.to_bytes`.
    """

    segments: tuple[Segment, ...]
    intervals: tuple[ReplayedInterval, ...]
    parameters: Any
    state: Any

    @property
    def is_same(self) -> bool:
        """Whether every score is equal to the recorded one to the bit."""
        return all(interval.is_same for interval in self.intervals)


def replay(
    member_factory: Factory,
    config: PBTConfig,
    reports: Sequence[MemberReport],
    exploits: Sequence[Exploit],
    *,
    member: int | None = None,
) -> ReplayResult:
    """Train a lineage again: one member goes through all its segments, and takes over itself where it took over another one.

    That is the same to the bit if the run was synchronous and if all that a member keeps when it takes over another one is
    where the other one's is: schedules are, since everybody is as far as everybody else.

    Args:
        member_factory: As in the run.
        config: As in the run.
        reports: Of the run.
        exploits: Of the run.
        member: Whose lineage; by default that of the best at the end.

    Raises:
        ValueError: The run was asynchronous.
        MorphogenError: The member raised, or the run has no report.
    """
    if not config.synchronous:
        raise ValueError("`synchronous` must be True for a run that can be replayed: else what happened hung on time, too.")
    last = max((report.interval for report in reports), default=0)
    final = [report for report in reports if report.interval == last and not report.problem]
    if not final:
        raise MorphogenError("the run has no report to replay. Train it first.")
    sign = 1.0 if config.mode == "max" else -1.0
    best = max(final, key=lambda report: (sign * report.score, -report.member)).member if member is None else member
    segments = lineage(best, last, exploits)
    members = Members(member_factory, config.metric)
    with one_thread(), contextlib.closing(members):
        return _replayed(members, config, segments, reports, exploits)


def _replayed(
    members: Members,
    config: PBTConfig,
    segments: Sequence[Segment],
    reports: Sequence[MemberReport],
    exploits: Sequence[Exploit],
) -> ReplayResult:
    recorded = {(report.member, report.interval): report for report in reports}
    explored = {(exploit.member, exploit.interval): exploit for exploit in exploits if not exploit.is_exploit}
    number, first = segments[0].member, recorded[segments[0].member, 1]
    _demand(members.begin(Birth(number, first.hyperparameters, first.seed)))
    intervals: list[ReplayedInterval] = []
    for segment in segments:
        if segment.entry is not None:
            entry = segment.entry
            values = members.read(number, config.optimizer_exploit_strategy)
            if values is None:
                raise MorphogenError("the lineage could not be replayed: the member does not give its parameters.")
            order = Succession(number, entry.hyperparameters, entry.seed, config.optimizer_exploit_strategy)
            _demand(members.take_over(order, values))
        for interval in range(segment.first, segment.last + 1):
            before = explored.get((segment.member, interval - 1))
            if before is not None and interval > segment.first:
                _demand(members.explore(number, before.hyperparameters))
            report = recorded[segment.member, interval]
            outcome = members.train(number, report.step)
            _demand(outcome.problem)
            trained = outcome.trained or Trained(float("nan"))
            intervals.append(ReplayedInterval(segment.member, interval, report.step, report.score, trained.score))
    return ReplayResult(tuple(segments), tuple(intervals), members.read(number, "copy"), members.save(number))


def _demand(problem: str) -> None:
    if problem:
        raise MorphogenError(f"the lineage could not be replayed: {problem}")
