"""What a governor's report says, whether as text or as a page: the words, the numbers and the rows of its tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from morphogen.governor.findings import Finding
from morphogen.governor.report.timeline import Entries, History
from morphogen.telemetry.events import Json

Rows = tuple[tuple[str, ...], ...]

NOT_FINITE = ("NaN", "inf", "-inf")
REWIND_COLUMNS = ("#", "observation", "from step", "to step", "optimizer", "learning rate", "evidence")
FINDING_COLUMNS = ("step", "detector", "value", "threshold", "outcome", "message")
SKIP_COLUMNS = ("observation", "step", "reason")
SNAPSHOT_COLUMNS = ("step", "observation", "promoted", "dropped")
KEPT_COLUMNS = ("step", "observations ago", "state")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GovernorSummary:
    """The governor as it stands.

    Attributes:
        observations: Calls of ``observe`` so far.
        skipped_steps: Steps stopped so far.
        rewinds: Rewinds so far.
        status: "healthy", "suspicious", "recovering" or another word of the governor's.
        detectors: Names of the detectors.
        config: The knobs, as JSON data.
    """

    observations: int
    skipped_steps: int
    rewinds: int
    status: str
    detectors: tuple[str, ...] = ()
    config: Mapping[str, Json] = dataclasses.field(default_factory=dict[str, Json])


def number_text(value: float | None) -> str:
    """Return ``value`` to 4 digits or to the unit, with thousands apart.

    Example:
        >>> [number_text(value) for value in (0.0123456, 12345.6, 1e9, 7, float("nan"), None)]
        ['0.01235', '12,346', '1e+09', '7', 'NaN', '–']
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return NOT_FINITE[0] if math.isnan(value) else NOT_FINITE[1 if value > 0 else 2]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e7 else f"{value:.4g}"


def plain(text: str) -> str:
    """Return ``text`` on one line, without control characters: it may come from anywhere."""
    return "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))


def status_of(history: History, summary: GovernorSummary) -> str:
    """Return the governor's word, or "collapsed" where nothing was observed after the collapse."""
    collapse = history.collapse
    return "collapsed" if collapse is not None and collapse.observed >= history.observed else summary.status


def headline(history: History, summary: GovernorSummary) -> str:
    """Return the report in one line."""
    if not summary.observations:
        return "nothing observed yet"
    counted = (
        _counted(summary.observations, "observation"),
        f"{_counted(summary.skipped_steps, 'step')} skipped",
        _counted(summary.rewinds, "rewind"),
    )
    return f"{plain(status_of(history, summary))}: {', '.join(counted)}"


def loss_line(history: History) -> str:
    """Return the losses in one line; empty where none was recorded."""
    measured = [bucket for bucket in history.curve if bucket.is_measured]
    facts = [f"{number_text(history.non_finite)} not finite"] if history.non_finite else []
    if measured:
        values = {
            "first": measured[0].last,
            "last": measured[-1].last,
            "lowest": min(bucket.low for bucket in measured),
            "highest": max(bucket.high for bucket in measured),
        }
        facts = [*(f"{name} {number_text(value)}" for name, value in values.items()), *facts]
    return ", ".join(facts)


def advice(history: History, summary: GovernorSummary) -> tuple[str, ...]:
    """Return what to do next after a collapse, one sentence or two each; empty while the run lives."""
    collapse = history.collapse
    if collapse is None or status_of(history, summary) != "collapsed":
        return ()
    last = [entry.finding for entry in history.findings.latest if entry.observed == collapse.observed]
    tried = history.rewinds.latest[-collapse.rewinds :] if collapse.rewinds else ()
    steps = sorted({*(entry.event.from_step for entry in tried), collapse.step})
    places = ("step " if len(steps) == 1 else "steps ") + " to ".join(
        number_text(step) for step in sorted({steps[0], steps[-1]})
    )
    if any(finding.non_finite for finding in last):
        cause = (
            "Values stopped being finite. Look for NaN in the inputs, for logarithms, roots and divisions at zero, and for "
            "float16 overflow; torch.autograd.set_detect_anomaly(True) names the operation."
        )
    else:
        cause = (
            "The loss or the gradients left their past level and did not come back. Lower the learning rate, give it a longer "
            "warm-up, or clip gradients before observe()."
        )
    return (
        f"The fault came back; it showed at {places}. Look at the batches read there.",
        cause,
        f"The run was left at the snapshot of step {number_text(collapse.to_step)}. Go on from there once the cause is "
        "gone, or from an earlier checkpoint.",
        f"More rewinds (max_rewinds, now {_setting(summary, 'max_rewinds')}) or older snapshots (generations, now "
        f"{_setting(summary, 'generations')}) help only if the fault is in the data and passes.",
    )


def evidence(finding: Finding) -> str:
    """Return a finding in one line."""
    return plain(f"{finding.detector}: {finding.message}")


def rewind_rows(history: History) -> Rows:
    """Return the rewinds, oldest first, numbered as they happened."""
    rewinds = history.rewinds
    return tuple(
        (
            number_text(rewinds.num_dropped + index),
            number_text(entry.observed),
            number_text(entry.event.from_step),
            number_text(entry.event.to_step),
            plain(entry.event.optimizer_strategy),
            f"× {number_text(entry.event.learning_rate_factor)}",
            "; ".join(map(evidence, entry.event.findings)) or plain(entry.event.reason),
        )
        for index, entry in enumerate(rewinds.latest, start=1)
    )


def finding_rows(history: History) -> Rows:
    """Return the findings, oldest first."""
    return tuple(
        (
            number_text(entry.step),
            plain(entry.finding.detector),
            number_text(float(entry.finding.value)),
            number_text(entry.finding.threshold),
            entry.outcome,
            plain(entry.finding.message),
        )
        for entry in history.findings.latest
    )


def skip_rows(history: History) -> Rows:
    """Return the skipped steps, oldest first."""
    return tuple((number_text(entry.observed), number_text(entry.step), plain(entry.reason)) for entry in history.skips.latest)


def note_rows(history: History) -> Rows:
    """Return the accepted levels and the parts taken out, oldest first."""
    names = {"level": "new level", "quarantine": "taken out"}
    return tuple(
        (number_text(entry.observed), number_text(entry.step), plain(f"{names.get(entry.kind, entry.kind)}: {entry.reason}"))
        for entry in history.notes.latest
    )


def snapshot_rows(history: History) -> Rows:
    """Return every snapshot remembered, oldest first."""
    return tuple(
        (number_text(entry.step), *map(number_text, (entry.observed, entry.promoted, entry.dropped)))
        for entry in history.snapshots.latest
    )


def kept_rows(history: History) -> Rows:
    """Return the snapshots there are now, newest first, with their ages."""
    return tuple(
        (
            number_text(entry.step),
            number_text(max(0, history.observed - entry.observed)),
            "on probation" if entry.promoted is None else "good: a rewind may go there",
        )
        for entry in reversed(history.snapshots.latest)
        if entry.dropped is None
    )


def shown(entries: Entries[object], limit: int | None = None) -> str:
    """Return how many entries are shown: "(3)" for all of them, "(last 10 of 312)"."""
    count = len(entries.latest) if limit is None else min(limit, len(entries.latest))
    return f"({count:,})" if count == entries.count else f"(last {count:,} of {entries.count:,})"


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _setting(summary: GovernorSummary, name: str) -> str:
    return plain(str(summary.config.get(name, "as configured")))
