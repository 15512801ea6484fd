"""Who takes over whom: a function for each method, from records in, sources by member out. Pure.

To add a method, write a function like those here and add a line to ``SELECTORS`` and to ``ExploitMethod``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import stdtr

from morphogen.pbt.config import PBTConfig
from morphogen.pbt.records import MemberRecord

Draw = Callable[[int], np.random.Generator]
"""Member -> the stream that its choice is drawn from."""
Selector = Callable[[PBTConfig, Sequence[MemberRecord], Draw], Mapping[int, Sequence[MemberRecord]]]
"""Config, sound members from best to worst, streams -> member -> sources to try, in order; none for those that go on."""

MAX_SCORES = 10
"""The last results that "t_test" looks at (Jaderberg et al. 2017, section 4.1.1)."""


def ranked(config: PBTConfig, records: Sequence[MemberRecord]) -> list[MemberRecord]:
    """Return the sound members from best to worst; equal scores in the order of their places."""
    sign = -1.0 if config.mode == "max" else 1.0
    return sorted((record for record in records if record.is_sound), key=lambda record: (sign * record.score, record.member))


def is_better(config: PBTConfig, record: MemberRecord, other: MemberRecord) -> bool:
    """Return whether ``record`` is better than ``other`` by more than ``min_gap``; equal scores never are."""
    gap = record.score - other.score if config.mode == "max" else other.score - record.score
    return gap > config.min_gap


def better_than(config: PBTConfig, order: Sequence[MemberRecord], record: MemberRecord) -> list[MemberRecord]:
    """Return those that may be a source for ``record``, from best to worst."""
    return [other for other in order if other.is_recent and is_better(config, other, record)]


def truncation(config: PBTConfig, order: Sequence[MemberRecord], draw: Draw) -> dict[int, list[MemberRecord]]:
    """Each of the last k takes over one of the first k, drawn evenly; k is the truncation ratio times those there."""
    k = max(1, config.exploited_of(len(order)))
    best = {record.member for record in [record for record in order if record.is_recent][:k]}
    found: dict[int, list[MemberRecord]] = {}
    for record in order[-k:]:
        better = better_than(config, order, record)
        first = [other for other in better if other.member in best]
        if first:
            drawn = drawn_from(first, draw, record.member)
            found[record.member] = [drawn, *(other for other in better if other is not drawn)]
    return found


def binary_tournament(config: PBTConfig, order: Sequence[MemberRecord], draw: Draw) -> dict[int, list[MemberRecord]]:
    """Each draws one other member evenly, and takes it over if that is better."""
    found: dict[int, list[MemberRecord]] = {}
    for record in order:
        opponent = _opponent(order, record, draw)
        if opponent is not None and is_better(config, opponent, record):
            better = better_than(config, order, record)
            found[record.member] = [opponent, *(other for other in better if other is not opponent)]
    return found


def t_test(config: PBTConfig, order: Sequence[MemberRecord], draw: Draw) -> dict[int, list[MemberRecord]]:
    """Each draws one other member evenly, and takes it over if it is better and Welch's one-sided test says so."""
    found: dict[int, list[MemberRecord]] = {}
    for record in order:
        opponent = _opponent(order, record, draw)
        if opponent is not None and is_better(config, opponent, record) and _is_significant(config, opponent, record):
            significant = [other for other in better_than(config, order, record) if _is_significant(config, other, record)]
            found[record.member] = [opponent, *(other for other in significant if other is not opponent)]
    return found


def nobody(config: PBTConfig, order: Sequence[MemberRecord], draw: Draw) -> dict[int, list[MemberRecord]]:
    """Each goes on."""
    return {}


def drawn_from(records: Sequence[MemberRecord], draw: Draw, member: int) -> MemberRecord:
    """Return one of ``records``, each as probable; a stream is made only where there is a choice."""
    return records[int(draw(member).integers(len(records)))] if len(records) > 1 else records[0]


def welch(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return the one-sided p-value of "``higher`` has the greater mean" (Welch 1947); NaN with fewer than two values.

    Example:
        >>> round(welch([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]), 3)
        0.035
    """
    if min(len(higher), len(lower)) < 2 or not all(map(math.isfinite, (*higher, *lower))):
        return math.nan
    gap = statistics.fmean(higher) - statistics.fmean(lower)
    parts = [statistics.variance(values) / len(values) for values in (higher, lower)]
    if sum(parts) == 0.0:
        return 0.0 if gap > 0 else 1.0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (higher, lower), strict=True) if part > 0
    )
    return float(stdtr(freedom, -gap / math.sqrt(sum(parts))))


def _opponent(order: Sequence[MemberRecord], record: MemberRecord, draw: Draw) -> MemberRecord | None:
    others = sorted((other for other in order if other is not record and other.is_recent), key=lambda other: other.member)
    return drawn_from(others, draw, record.member) if others else None


def _is_significant(config: PBTConfig, better: MemberRecord, worse: MemberRecord) -> bool:
    samples = better.scores[-MAX_SCORES:], worse.scores[-MAX_SCORES:]
    p_value = welch(*(samples if config.mode == "max" else samples[::-1]))
    return p_value < config.significance


SELECTORS: Mapping[str, Selector] = {
    "truncation": truncation,
    "binary_tournament": binary_tournament,
    "t_test": t_test,
    "none": nobody,
}
