"""What the governor answers, and the pure rules by which it decides."""

from __future__ import annotations

import dataclasses
import enum

from morphogen.governor.config import GovernorConfig
from morphogen.governor.events import Rollback
from morphogen.governor.findings import Finding


class Action(enum.Enum):
    """What happens to the step that was observed."""

    PROCEED = "proceed"
    SKIP = "skip"
    REWIND = "rewind"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one observation.

    Attributes:
        step: The observation's number.
        action: PROCEED: take the step. SKIP: do not; the run is as ``backward`` left it, and gradient scalers have ended the
            step. REWIND: do not; the run is at an earlier state.
        findings: Why, empty when proceeding.
        rollback: What was rewound, for a REWIND.
    """

    step: int
    action: Action
    findings: tuple[Finding, ...] = ()
    rollback: Rollback | None = None

    @property
    def proceed(self) -> bool:
        """Whether to take the optimizer's step (and the scaler's and the scheduler's)."""
        return self.action is Action.PROCEED

    @property
    def reason(self) -> str:
        """The findings as one line; empty when proceeding."""
        return "; ".join(finding.message for finding in self.findings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchState:
    """What the governor remembers between observations, detectors and snapshots aside.

    Attributes:
        observed: Observations so far.
        alarms: Numbers of the alarming observations within the alarm window.
        suspicious_steps: Observations in a row with an alarm in the window.
        position: Clean observations on the way to the present state; a rewind takes it back.
        fault_position: Furthest position at which a fault led to a rewind; -1 before the first.
        candidate_clean_steps: Clean observations in a row since the present candidate snapshot was taken.
        rewinds: Rewinds since the run last got past ``fault_position`` and stayed clean.
        since_rewind: Observations since the last rewind; None before the first.
        skipped: Steps skipped in all.
        rewound: Rewinds in all.
    """

    observed: int = 0
    alarms: tuple[int, ...] = ()
    suspicious_steps: int = 0
    position: int = 0
    fault_position: int = -1
    candidate_clean_steps: int = 0
    rewinds: int = 0
    since_rewind: int | None = None
    skipped: int = 0
    rewound: int = 0


def watched(state: WatchState, alarmed: bool, config: GovernorConfig) -> WatchState:
    """Return the state after one more observation, with or without an alarm."""
    recent = tuple(number for number in state.alarms if state.observed - number < config.alarm_window_steps)
    alarms = (*recent, state.observed) if alarmed else recent
    return dataclasses.replace(
        state,
        observed=state.observed + 1,
        alarms=alarms,
        suspicious_steps=state.suspicious_steps + 1 if alarms else 0,
        position=state.position if alarmed else state.position + 1,
        candidate_clean_steps=0 if alarmed else state.candidate_clean_steps + 1,
        since_rewind=None if state.since_rewind is None else state.since_rewind + 1,
    )


def is_out_of_patience(state: WatchState, config: GovernorConfig) -> bool:
    """Whether there are enough alarms in the window to rewind: one more after each rewind that did not help, to be surer.

    A damaged state alarms at every observation while its steps are skipped; noisy data does so now and then.
    """
    return len(state.alarms) >= min(config.alarm_window_steps, config.patience + state.rewinds)


def decide(state: WatchState, config: GovernorConfig, *, state_is_sound: bool, step_was_taken: bool) -> Action:
    """Return what an alarm leads to.

    A step that can still be stopped is skipped. A state that is damaged (non-finite parameters or buffers), a fault seen only
    after its step was taken, and too many alarms within the window call for a rewind.
    """
    if not state_is_sound or step_was_taken or is_out_of_patience(state, config):
        return Action.REWIND
    return Action.SKIP


def is_level_shift(state: WatchState, config: GovernorConfig, lasted_steps: int) -> bool:
    """Whether what alarms is the data and not the run.

    Either the fault has shown since the first observation after a rewind, until patience ran out: a known-good state that
    shows it at once, again and again, is not the one at fault. Or alarms have come and gone for as long as a probation.

    Args:
        state: After the present alarm.
        config: Has the patience.
        lasted_steps: Of the present finding: the fault may have shown in observations that were no alarms.
    """
    if state.suspicious_steps > max(config.probation_steps, config.alarm_window_steps):
        return True
    if state.since_rewind is None or not is_out_of_patience(state, config):
        return False
    return state.since_rewind <= lasted_steps + len(state.alarms) - 1


def after_rewind(state: WatchState, position: int) -> WatchState:
    """Return the state after a rewind to a snapshot that was taken at ``position``."""
    return dataclasses.replace(
        state,
        alarms=(),
        suspicious_steps=0,
        position=position,
        fault_position=max(state.fault_position, state.position),
        candidate_clean_steps=0,
        rewinds=state.rewinds + 1,
        since_rewind=0,
        rewound=state.rewound + 1,
    )


def after_promotion(state: WatchState, position: int) -> WatchState:
    """Return the state after a snapshot taken at ``position`` proved good: past the last fault, its rewinds are forgiven."""
    return dataclasses.replace(state, rewinds=0) if position > state.fault_position else state


def is_watching_closely(state: WatchState, config: GovernorConfig) -> bool:
    """Whether each step must be judged before it is taken, whatever ``check_every``: while suspicious or just rewound."""
    return bool(state.alarms) or (state.since_rewind is not None and state.since_rewind < config.alarm_window_steps)
