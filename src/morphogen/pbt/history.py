"""What happened in a population, as records, and what can be asked about it. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from morphogen.pbt.records import Hyperparameters, MemberRecord


@dataclasses.dataclass(frozen=True)
class MemberReport:
    """An interval of a member.

    Attributes:
        member: Its place.
        interval: Number of the interval, from 1.
        step: How far its lineage had come at the end.
        score: What it came to; NaN where it failed.
        scores: Single results behind it.
        metrics: Whatever else it said.
        hyperparameters: Those in use during the interval.
        seed: Of its chance during it.
        problem: Why it failed; else empty.
        cpu_seconds: Of training.
        snapshot: Digest of all of the member at the end; None without a directory, where it failed, or where it is gone.
    """

    member: int
    interval: int
    step: int
    score: float
    hyperparameters: Hyperparameters
    seed: int
    scores: tuple[float, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    problem: str = ""
    cpu_seconds: float = 0.0
    snapshot: str | None = None

    def record(self, *, is_recent: bool = True) -> MemberRecord:
        """Return it as the scheduler sees it."""
        return MemberRecord(
            member=self.member,
            score=self.score,
            hyperparameters=self.hyperparameters,
            step=self.step,
            scores=self.scores,
            is_alive=not self.problem,
            is_recent=is_recent,
        )


@dataclasses.dataclass(frozen=True)
class Exploit:
    """A decision that was carried out.

    Attributes:
        event: Number of the decision.
        member: Who changed.
        interval: After which of its intervals.
        reason: "worse", "not finite", "lost" or "explore".
        source: Whom it took over; itself where it only explored.
        source_step: How far the source had come.
        source_interval: After which of the source's intervals.
        score_before: Of the member.
        source_score: Of the source.
        score_after: Of the member an interval later; None before.
        strategy: What became of moments.
        hyperparameters_before: Of the member.
        hyperparameters: Of the member afterwards, read back.
        moves: Which of them moved, and how.
        seed: Of the member's chance afterwards.
        source_snapshot: Digest of all of the source; None without a directory.
        refused: Sources that were tried before, and why they were of no use.
    """

    event: int
    member: int
    interval: int
    reason: str
    source: int
    source_step: int
    source_interval: int
    score_before: float
    source_score: float
    strategy: str
    hyperparameters_before: Hyperparameters
    hyperparameters: Hyperparameters
    moves: Mapping[str, str]
    seed: int
    score_after: float | None = None
    source_snapshot: str | None = None
    refused: tuple[tuple[int, str], ...] = ()

    @property
    def is_exploit(self) -> bool:
        """Whether another member was taken over."""
        return self.reason != "explore"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a lineage: one member's intervals between two takeovers.

    Attributes:
        member: Whose.
        first: First interval, from 1.
        last: Last interval.
        entry: How it began: the takeover, or None for the start of the run.
    """

    member: int
    first: int
    last: int
    entry: Exploit | None


@dataclasses.dataclass(frozen=True)
class StrategySuccess:
    """How exploits of one strategy went.

    Attributes:
        strategy: Which.
        exploits: How many are known to have come to something.
        above_own_past: Part of them that scored better an interval later than the member had before.
        above_source: Part that scored better than the source had.
        mean_gain_on_source: By how much, on average.
    """

    strategy: str
    exploits: int
    above_own_past: float
    above_source: float
    mean_gain_on_source: float


def lineage(member: int, interval: int, exploits: Sequence[Exploit]) -> list[Segment]:
    """Return how ``member`` came to where it was after ``interval``, from the start of the run on."""
    taken = {(exploit.member, exploit.interval): exploit for exploit in exploits if exploit.is_exploit}
    segments: list[Segment] = []
    last = interval
    while True:
        entries = [number for (who, number) in taken if who == member and number < last]
        if not entries:
            segments.append(Segment(member, 1, last, None))
            return segments[::-1]
        entry = taken[member, max(entries)]
        segments.append(Segment(member, entry.interval + 1, last, entry))
        member, last = entry.source, entry.source_interval


def success_by_strategy(exploits: Sequence[Exploit], *, mode: str = "max") -> list[StrategySuccess]:
    """Return how exploits went, a row for each strategy."""
    sign = 1.0 if mode == "max" else -1.0
    rows: list[StrategySuccess] = []
    for strategy in sorted({exploit.strategy for exploit in exploits if exploit.is_exploit}):
        pairs = [
            (exploit, exploit.score_after)
            for exploit in exploits
            if exploit.is_exploit and exploit.strategy == strategy and _is_known(exploit.score_after)
        ]
        gains = [sign * (after - exploit.source_score) for exploit, after in pairs]
        above = [sign * (after - exploit.score_before) > 0 for exploit, after in pairs if math.isfinite(exploit.score_before)]
        rows.append(
            StrategySuccess(strategy, len(pairs), _mean(above), _mean([gain > 0 for gain in gains]), _mean(gains)),
        )
    return rows


def _is_known(score: float | None) -> TypeGuard[float]:
    return score is not None and math.isfinite(score)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
