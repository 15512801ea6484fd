"""What happened to a governed run, in bounded memory however long it runs. Free of torch.

Of the loss a decimated curve is kept, of all else the latest entries of each kind and the count of all there were.
``observed`` is the clock of everything here: the number of observations so far, the present one included. It never goes
back, as the caller's step does after a rewind.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from morphogen.governor.events import Collapsed, LevelShiftAccepted, PartQuarantined, Rollback, StepSkipped, Warned
from morphogen.governor.findings import Finding
from morphogen.telemetry.events import Event, Json, to_json

MAX_BUCKETS = 2_000
MAX_ENTRIES = 200
_MAX_MESSAGE_CHARACTERS = 1_000

EntryT = TypeVar("EntryT", covariant=True)


class Bucket(NamedTuple):
    """The losses of one stretch of observations.

    Attributes:
        observed: The last observation of the stretch.
        step: The caller's step there.
        low: The lowest finite loss; +inf where there was none.
        high: The highest finite loss; -inf where there was none.
        last: The last finite loss; NaN where there was none.
        non_finite: How many losses were NaN or infinite.
    """

    observed: int
    step: int
    low: float
    high: float
    last: float
    non_finite: int

    @property
    def is_measured(self) -> bool:
        """Whether there was a finite loss."""
        return self.low <= self.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindingEntry:
    """A finding and what the governor did about it: "skipped", "rewound", "accepted" and so on."""

    observed: int
    step: int
    outcome: str
    finding: Finding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipEntry:
    """A step that was not taken."""

    observed: int
    step: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindEntry:
    """A rewind; ``to_observed`` is when the snapshot it went to was taken, None where that is not known."""

    observed: int
    to_observed: int | None
    event: Rollback


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoteEntry:
    """A new level of the loss that was accepted (``kind`` "level") or a part that was taken out ("quarantine")."""

    observed: int
    step: int
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotEntry:
    """The life of a snapshot: when it was taken, promoted to last-known-good and dropped; None for what has not happened."""

    observed: int
    step: int
    promoted: int | None = None
    dropped: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollapseEntry:
    """The end: ``rewinds`` did not help, and the run was left at the snapshot of ``to_step``."""

    observed: int
    step: int
    reason: str
    to_step: int
    rewinds: int


@dataclasses.dataclass(frozen=True)
class Entries(Generic[EntryT]):
    """The latest entries of one kind, oldest first, and how many there were in all."""

    latest: tuple[EntryT, ...] = ()
    count: int = 0

    @property
    def num_dropped(self) -> int:
        """How many older ones are no longer here."""
        return self.count - len(self.latest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """A timeline as it stood at one moment.

    Attributes:
        observed: Observations so far.
        curve: The losses, in order; the first observation has a bucket of its own.
        non_finite: Losses that were NaN or infinite.
    """

    observed: int = 0
    curve: tuple[Bucket, ...] = ()
    non_finite: int = 0
    findings: Entries[FindingEntry] = Entries()
    skips: Entries[SkipEntry] = Entries()
    rewinds: Entries[RewindEntry] = Entries()
    notes: Entries[NoteEntry] = Entries()
    snapshots: Entries[SnapshotEntry] = Entries()
    collapse: CollapseEntry | None = None


class Generation(Protocol):
    """A snapshot in the governor's ring, of which the timeline reads these alone."""

    @property
    def observed(self) -> int:
        """Observations before it was taken; no two have the same."""
        ...

    @property
    def step(self) -> int:
        """The caller's step at which it was taken."""
        ...

    @property
    def good(self) -> bool:
        """Whether a rewind may go to it."""
        ...


class Timeline:
    """Remembers what happened to a governed run.

    Args:
        max_buckets: Points of the curve, at least 4; when there are that many, neighbours merge two by two.
        max_entries: Entries kept of each kind, the latest.

    Raises:
        ValueError: ``max_buckets`` is below 4 or ``max_entries`` below 1.

    Example:
        >>> timeline = Timeline()
        >>> for observed, loss in enumerate((2.5, 2.0, 1.5), start=1):
        ...     timeline.record_loss(observed, observed - 1, loss)
        >>> [bucket.last for bucket in timeline.history().curve]
        [2.5, 2.0, 1.5]
    """

    def __init__(self, *, max_buckets: int = MAX_BUCKETS, max_entries: int = MAX_ENTRIES) -> None:
        """Begin with nothing observed."""
        if max_buckets < 4:
            raise ValueError(f"`max_buckets` must be at least 4, got {max_buckets}. A curve needs points.")
        if max_entries < 1:
            raise ValueError(f"`max_entries` must be at least 1, got {max_entries}. Keep one of each kind.")
        self._max_buckets, self._max_entries = max_buckets, max_entries
        self._observed = 0
        self._first = 0
        self._width = 1
        self._end = -1
        self._closed: list[Bucket] = []
        self._open(_empty(0, 0))
        self._non_finite_before = 0
        self._logs: dict[str, collections.deque[Any]] = {
            kind: collections.deque(maxlen=max_entries) for kind in ("findings", "skips", "rewinds", "notes")
        }
        self._counts = dict.fromkeys((*self._logs, "snapshots"), 0)
        self._snapshots: dict[int, SnapshotEntry] = {}
        self._collapse: CollapseEntry | None = None

    # -- recording --------------------------------------------------------------------------------------------------

    def record_loss(self, observed: int, step: int, loss: float) -> None:
        """Add one loss, which may be NaN or infinite.

        Args:
            observed: Observations so far, this one included: larger at each call.
            step: The caller's step, which may go back.
            loss: The loss.

        Raises:
            ValueError: ``observed`` is not larger than at the call before.
        """
        if observed > self._end:
            self._begin_bucket(observed)
        elif observed <= self._observed:
            raise ValueError(f"`observed` must be above {self._observed}, got {observed}. Count observations, not steps.")
        self._observed = observed
        self._step = step
        if loss - loss == 0.0:  # finite
            self._low = loss if loss < self._low else self._low
            self._high = loss if loss > self._high else self._high
            self._last = loss
        else:
            self._non_finite += 1

    def record(self, observed: int, event: Event) -> None:
        """Add an event of the governor, with its findings.

        Of a ``Rollback`` or ``Collapsed``, call this before :meth:`record_generations` with what was left.

        Raises:
            TypeError: ``event`` is not of the governor.
        """
        step = observed if event.step is None else event.step
        match event:
            case StepSkipped():
                self._add_findings(observed, step, "skipped", event.findings)
                self._add("skips", SkipEntry(observed=observed, step=step, reason=_clipped(event.reason)))
            case Rollback():
                self._add_findings(observed, step, "rewound", event.findings)
                self._add_rewind(observed, event)
            case LevelShiftAccepted():
                self._add_findings(observed, step, "accepted", event.findings)
                self._add_note(observed, step, "level", event.findings)
            case PartQuarantined():
                self._add_findings(observed, step, "part taken out", event.findings)
                self._add_note(observed, step, "quarantine", event.findings, f"{event.owner}: ")
            case Warned():
                self._add_findings(observed, step, "warned", event.findings)
            case Collapsed():
                self._add_findings(observed, step, "collapsed", event.findings)
                self._collapse = CollapseEntry(
                    observed=observed, step=step, reason=_clipped(event.reason), to_step=event.to_step, rewinds=event.rewinds
                )
            case _:
                raise TypeError(f"`event` must be an event of the governor, got {type(event).__name__}. Leave others out.")

    def record_generations(self, observed: int, generations: Iterable[Generation]) -> None:
        """Note which snapshots there are now: the new ones were taken, those now good promoted, the missing ones dropped."""
        alive = {generation.observed: generation for generation in generations}
        for taken, generation in alive.items():
            entry = self._snapshots.get(taken)
            if entry is None:
                entry = SnapshotEntry(observed=taken, step=generation.step)
                self._counts["snapshots"] += 1
            promoted = observed if generation.good and entry.promoted is None else entry.promoted
            self._snapshots[taken] = dataclasses.replace(entry, promoted=promoted, dropped=None)
        for taken, entry in self._snapshots.items():
            if taken not in alive and entry.dropped is None:
                self._snapshots[taken] = dataclasses.replace(entry, dropped=observed)
        gone = [taken for taken, entry in self._snapshots.items() if entry.dropped is not None]
        for taken in gone[: max(0, len(self._snapshots) - self._max_entries)]:
            del self._snapshots[taken]

    def history(self) -> History:
        """Return everything as it stands now; the timeline goes on."""
        logs = {kind: Entries(tuple(log), self._counts[kind]) for kind, log in self._logs.items()}
        return History(
            observed=self._observed,
            curve=(*self._closed, self._bucket()) if self._end >= 0 else (),
            non_finite=self._non_finite_before + self._non_finite,
            snapshots=Entries(tuple(self._snapshots.values()), self._counts["snapshots"]),
            collapse=self._collapse,
            **logs,
        )

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Json]:
        """Return everything as strict JSON data."""
        history = self.history()
        return {
            "first": self._first,
            "width": self._width,
            "counts": to_json(self._counts),
            **{field.name: to_json(getattr(history, field.name)) for field in dataclasses.fields(History)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; the limits stay as this timeline was made with.

        Raises:
            KeyError, TypeError, ValueError: ``state`` is something else; the timeline is as it was.
        """
        loaded = Timeline(max_buckets=self._max_buckets, max_entries=self._max_entries)
        loaded._take(state)
        self.__dict__.update(loaded.__dict__)

    def _take(self, state: Mapping[str, Any]) -> None:
        self._first, self._width = int(state["first"]), int(state["width"])
        self._counts = {kind: int(state["counts"][kind]) for kind in self._counts}
        self._closed = [_bucket_from(row) for row in state["curve"]]
        self._observed = int(state["observed"])
        if self._closed:
            self._reopen()
        self._non_finite_before = int(state["non_finite"]) - self._non_finite
        for kind, load in _LOADERS.items():
            self._logs[kind].extend(load(entry) for entry in state[kind]["latest"])
        snapshots = [SnapshotEntry(**entry) for entry in state["snapshots"]["latest"]]
        self._snapshots = {entry.observed: entry for entry in snapshots}
        self._collapse = None if state["collapse"] is None else CollapseEntry(**state["collapse"])

    # -- the curve --------------------------------------------------------------------------------------------------

    def _key(self, observed: int) -> int:
        """Which stretch an observation lies in: the first one alone in stretch 0, then ``width`` to a stretch."""
        return -((self._first - observed) // self._width)

    def _begin_bucket(self, observed: int) -> None:
        if self._end < 0:
            self._first = observed
        else:
            self._closed.append(self._bucket())
            self._non_finite_before += self._non_finite
        while len(self._closed) >= self._max_buckets:
            self._width *= 2
            self._closed = _merged_by(self._closed, self._key)
        if self._closed and self._key(self._closed[-1].observed) == self._key(observed):
            self._non_finite_before -= self._closed[-1].non_finite
            self._reopen()
            return
        self._open(_empty(observed, 0))
        self._end = self._first + self._key(observed) * self._width

    def _reopen(self) -> None:
        bucket = self._closed.pop()
        self._open(bucket)
        self._end = self._first + self._key(bucket.observed) * self._width

    def _open(self, bucket: Bucket) -> None:
        self._step, self._low, self._high, self._last = bucket.step, bucket.low, bucket.high, bucket.last
        self._non_finite = bucket.non_finite

    def _bucket(self) -> Bucket:
        return Bucket(self._observed, self._step, self._low, self._high, self._last, self._non_finite)

    # -- entries ----------------------------------------------------------------------------------------------------

    def _add(self, kind: str, entry: object) -> None:
        self._logs[kind].append(entry)
        self._counts[kind] += 1

    def _add_findings(self, observed: int, step: int, outcome: str, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._add("findings", FindingEntry(observed=observed, step=step, outcome=outcome, finding=_brief(finding)))

    def _add_note(self, observed: int, step: int, kind: str, findings: Iterable[Finding], start: str = "") -> None:
        reason = start + "; ".join(finding.message for finding in findings)
        self._add("notes", NoteEntry(observed=observed, step=step, kind=kind, reason=_clipped(reason)))

    def _add_rewind(self, observed: int, event: Rollback) -> None:
        to_observed = next((taken for taken in reversed(self._snapshots) if self._is_target(taken, event)), None)
        findings = tuple(_brief(finding) for finding in event.findings)
        event = dataclasses.replace(event, reason=_clipped(event.reason), findings=findings)
        self._add("rewinds", RewindEntry(observed=observed, to_observed=to_observed, event=event))

    def _is_target(self, taken: int, rollback: Rollback) -> bool:
        entry = self._snapshots[taken]
        return entry.step == rollback.to_step and entry.promoted is not None and entry.dropped is None


def merged(left: Bucket, right: Bucket) -> Bucket:
    """Return two neighbouring buckets as one."""
    return Bucket(
        observed=right.observed,
        step=right.step,
        low=min(left.low, right.low),
        high=max(left.high, right.high),
        last=right.last if right.is_measured else left.last,
        non_finite=left.non_finite + right.non_finite,
    )


def _merged_by(buckets: Iterable[Bucket], key: Callable[[int], int]) -> list[Bucket]:
    kept: list[Bucket] = []
    for bucket in buckets:
        if kept and key(kept[-1].observed) == key(bucket.observed):
            kept[-1] = merged(kept[-1], bucket)
        else:
            kept.append(bucket)
    return kept


def _empty(observed: int, step: int) -> Bucket:
    return Bucket(observed, step, math.inf, -math.inf, math.nan, 0)


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[: _MAX_MESSAGE_CHARACTERS - 1] + "…"


def _brief(finding: Finding) -> Finding:
    return dataclasses.replace(finding, message=_clipped(finding.message))


def _bucket_from(row: Sequence[Any]) -> Bucket:
    observed, step, low, high, last, non_finite = row
    return Bucket(int(observed), int(step), float(low), float(high), float(last), int(non_finite))


def _finding_from(saved: Mapping[str, Any]) -> Finding:
    threshold = saved["threshold"]
    fields: dict[str, Any] = dict(saved)
    fields |= {"value": float(fields["value"]), "threshold": None if threshold is None else float(threshold)}
    return Finding(**fields)


def _finding_entry_from(saved: Mapping[str, Any]) -> FindingEntry:
    fields: dict[str, Any] = {**saved, "finding": _finding_from(saved["finding"])}
    return FindingEntry(**fields)


def _rewind_from(saved: Mapping[str, Any]) -> RewindEntry:
    fields: dict[str, Any] = dict(saved["event"])
    fields |= {name: float(fields[name]) for name in ("learning_rate_factor", "penalty")}
    fields |= {"findings": tuple(map(_finding_from, fields["findings"])), "parts": tuple(fields["parts"])}
    return RewindEntry(observed=saved["observed"], to_observed=saved["to_observed"], event=Rollback(**fields))


def _skip_from(saved: Mapping[str, Any]) -> SkipEntry:
    return SkipEntry(**saved)


def _note_from(saved: Mapping[str, Any]) -> NoteEntry:
    return NoteEntry(**saved)


_LOADERS: Mapping[str, Callable[[Mapping[str, Any]], object]] = {
    "findings": _finding_entry_from,
    "skips": _skip_from,
    "rewinds": _rewind_from,
    "notes": _note_from,
}
