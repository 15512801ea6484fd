"""Replaying detectors over traces, and counting what they found. No run is trained here."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from peers import Peer
from traces import Record, Trace

from morphogen.governor import GovernorConfig
from morphogen.governor.detectors import Detector
from morphogen.governor.faults import FAMILIES
from morphogen.governor.findings import Finding, Observation
from morphogen.governor.verdicts import Action, WatchState, decide, is_level_shift, watched

DEADLINE_STEPS = 50


class Alarm(NamedTuple):
    """One alarm: at which step, why, and whether it would have been a rewind rather than a skipped step."""

    step: int
    finding: Finding | None
    rewind: bool = False


class Watcher(Protocol):
    """Judges observations one after another, and remembers."""

    def look(self, observation: Observation) -> Alarm | None:
        """Return the alarm of one step, if any."""
        ...


class GovernorWatch:
    """Detectors as a governor uses them, but for what it would have done: the traces go on regardless."""

    def __init__(self, detectors: Sequence[Detector], config: GovernorConfig, signals: bool = True) -> None:
        """Start with no past; without ``signals`` detectors are shown loss and gradient norm alone."""
        self._detectors, self._config, self._signals = detectors, config, signals
        self._state = WatchState()

    def look(self, observation: Observation) -> Alarm | None:
        if not self._signals:
            observation = dataclasses.replace(observation, signals={})
        found = [finding for detector in self._detectors if (finding := detector.inspect(observation)) is not None]
        alarms = [finding for finding in found if not finding.warning]
        harmless = alarms and any(f.non_finite for f in alarms) and not any(f.in_state for f in alarms)
        self._state = watched(self._state, bool(alarms), self._config, doubtful=bool(found) and not harmless)
        if not found:
            for detector in self._detectors:
                detector.accept(observation)
        return self._react(observation.step, alarms) if alarms else None

    def _react(self, step: int, alarms: list[Finding]) -> Alarm:
        finite, sound = not any(f.non_finite for f in alarms), not any(f.in_state for f in alarms)
        if finite and sound and is_level_shift(self._state, self._config, max(f.lasted_steps for f in alarms), 0):
            for detector in self._detectors:
                detector.forget()
            self._state = dataclasses.replace(self._state, alarms=(), doubts=(), suspicious_steps=0, since_rewind=None)
            return Alarm(step, alarms[0])
        action = decide(self._state, self._config, state_is_sound=sound, step_was_taken=False)
        return Alarm(step, alarms[0], action is Action.REWIND)


class PeerWatch:
    """A published rule."""

    def __init__(self, peer: Peer) -> None:
        """Start with no past."""
        self._peer = peer

    def look(self, observation: Observation) -> Alarm | None:
        alarmed = self._peer.alarmed(observation.loss, observation.grad_norm)
        return Alarm(observation.step, None) if alarmed else None


def replay(detectors: Sequence[Detector], trace: Trace, config: GovernorConfig | None = None) -> list[Alarm]:
    """Return every alarm of ``detectors``, which are changed, over a whole trace."""
    watch = GovernorWatch(detectors, config or GovernorConfig())
    return _alarms(watch, (*trace.before, *trace.after))


def _alarms(watch: Watcher, observations: Iterable[Observation]) -> list[Alarm]:
    return [alarm for observation in observations if (alarm := watch.look(observation)) is not None]


@dataclass(frozen=True)
class Outcome:
    """What one detector made of one trace.

    Attributes:
        steps: Observations in the trace.
        early: Alarms before the fault or event.
        alarms: Alarms from it on; of a healthy run, all of them.
    """

    record: Record
    steps: int
    early: tuple[Alarm, ...]
    alarms: tuple[Alarm, ...]

    @property
    def latency(self) -> int | None:
        """Steps from the fault to the first alarm, if there was one before the deadline."""
        if not self.alarms:
            return None
        steps = self.alarms[0].step - self.record.start
        return steps if steps < DEADLINE_STEPS else None


def outcomes(make: Callable[[], Watcher], traces: Sequence[Trace]) -> list[Outcome]:
    """Replay a detector over all traces; what several traces have in common is replayed once."""
    shared: dict[int, tuple[Watcher, tuple[Alarm, ...]]] = {}
    made: list[Outcome] = []
    for trace in traces:
        if id(trace.before) not in shared or not trace.before:
            watch = make()
            shared[id(trace.before)] = (watch, tuple(_alarms(watch, trace.before)))
        watch, early = shared[id(trace.before)]
        alarms = tuple(_alarms(copy.deepcopy(watch), trace.after))
        made.append(Outcome(trace.record, len(trace.before) + len(trace.after), early, alarms))
    return made


def score(found: Sequence[Outcome]) -> dict[str, Any]:
    """Return the numbers of one row of the table."""
    faults = [outcome for outcome in found if outcome.record.role == "fault"]
    healthy = [outcome for outcome in found if outcome.record.role == "healthy"]
    shifts = [outcome for outcome in found if outcome.record.role == "shift"]
    benign = [o for o in found if o.record.role == "benign" and not o.record.damaging]
    damaging = [outcome for outcome in faults if outcome.record.damaging]
    latencies = sorted(outcome.latency for outcome in damaging if outcome.latency is not None)
    steps = sum(outcome.steps for outcome in healthy)
    false = sum(len(outcome.early) + len(outcome.alarms) for outcome in healthy)
    return {
        "damaging": _share(damaging),
        "families": {family: _share([o for o in faults if o.record.family == family]) for family in FAMILIES},
        "damaging_families": {family: _share([o for o in damaging if o.record.family == family]) for family in FAMILIES},
        "latency_p50": percentile(latencies, 50),
        "latency_p90": percentile(latencies, 90),
        "healthy_steps": steps,
        "false_alarms": false,
        "false_alarms_per_1000_steps": round(1000 * false / max(1, steps), 3),
        "healthy_runs": len(healthy),
        "healthy_runs_alarmed": sum(bool(outcome.early or outcome.alarms) for outcome in healthy),
        "healthy_runs_rewound": sum(any(a.rewind for a in (*o.early, *o.alarms)) for o in healthy),
        "shifts": len(shifts),
        "shifts_early": sum(any(alarm.step < o.record.start for alarm in o.alarms) for o in shifts),
        "shifts_last_alarm": max((a.step - o.record.start for o in shifts for a in o.alarms), default=None),
        "benign": len(benign),
        "benign_alarmed": sum(bool(outcome.alarms) for outcome in benign),
        "benign_rewound": sum(any(alarm.rewind for alarm in outcome.alarms) for outcome in benign),
    }


def _share(some: Sequence[Outcome]) -> tuple[int, int]:
    return sum(outcome.latency is not None for outcome in some), len(some)


def percentile(values: Sequence[int], percent: int) -> int | None:
    """Return the smallest value that at least ``percent`` of the ``values``, sorted, do not exceed; None if there are none."""
    if not values:
        return None
    return values[max(0, -(-percent * len(values) // 100) - 1)]


def misses(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the damaging faults that were not found."""
    lost = [o for o in found if o.record.role == "fault" and o.record.damaging and o.latency is None]
    keys = ("split", "task", "family", "kind", "seed", "excess")
    return [
        {"strength": "weak" if outcome.record.weak else "default"} | {key: getattr(outcome.record, key) for key in keys}
        for outcome in sorted(lost, key=lambda outcome: outcome.record.weak)
    ]


def false_alarms(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the healthy runs with alarms: how many, and the first of each."""
    rows: list[dict[str, Any]] = []
    for outcome in found:
        alarms = (*outcome.early, *outcome.alarms)
        if outcome.record.role == "healthy" and alarms:
            record, first = outcome.record, alarms[0]
            row = {"split": record.split, "kind": record.kind, "seed": record.seed, "alarms": len(alarms)}
            message = first.finding.message if first.finding else ""
            rows.append({**row, "rewinds": sum(a.rewind for a in alarms), "step": first.step, "message": message})
    return rows


def check() -> None:
    """Check the arithmetic on a case small enough to count by hand."""
    nothing = Record(role="fault", split="tune", task="t", kind="k", seed=0, file="f", key="k", family="spike", start=10)
    harmful = dataclasses.replace(nothing, excess=float("inf"))
    quiet = dataclasses.replace(nothing, role="healthy", start=0)
    found = [
        Outcome(nothing, 130, (), (Alarm(12, None),)),
        Outcome(harmful, 130, (), (Alarm(59, None),)),
        Outcome(harmful, 130, (Alarm(9, None),), (Alarm(60, None),)),
        Outcome(quiet, 500, (), (Alarm(3, None), Alarm(4, None, rewind=True))),
    ]
    row = score(found)
    assert row["damaging"] == (1, 2) and row["families"]["spike"] == (2, 3) and row["latency_p90"] == 49
    assert row["false_alarms_per_1000_steps"] == 4.0 and row["healthy_runs_rewound"] == 1
    assert [percentile(list(range(10)), p) for p in (50, 90, 100)] == [4, 8, 9] and percentile([], 50) is None
    assert statistics.median_low(range(10)) == percentile(list(range(10)), 50)
    assert len(misses(found)) == 1
