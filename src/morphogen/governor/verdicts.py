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
        action: PROCEED: take the step. SKIP: do not; nothing was changed. REWIND: do not; the run is at an earlier state.
        findings: Why, empty when proceeding.
        rollback: What was rewound, for a REWIND.
    """

    step: int
    action: Action
    findings: tuple[Finding, ...] = ()
    rollback: Rollback | None = None

    @property
    def proceed(self) -> bool:
        """Whether to take the optimizer step (and the scheduler's)."""
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
        clean_steps: Clean observations since the last alarm.
        candidate_clean_steps: Clean observations since the present candidate snapshot was taken.
        rewinds: Rewinds since the last new good generation.
        since_rewind: Observations since the last rewind; None before the first.
        skipped: Steps skipped in all.
        rewound: Rewinds in all.
    """

    observed: int = 0
    alarms: tuple[int, ...] = ()
    clean_steps: int = 0
    candidate_clean_steps: int = 0
    rewinds: int = 0
    since_rewind: int | None = None
    skipped: int = 0
    rewound: int = 0


def watched(state: WatchState, alarmed: bool, config: GovernorConfig) -> WatchState:
    """Return the state after one more observation, with or without an alarm."""
    recent = tuple(number for number in state.alarms if state.observed - number < config.alarm_window_steps)
    return dataclasses.replace(
        state,
        observed=state.observed + 1,
        alarms=(*recent, state.observed) if alarmed else recent,
        clean_steps=0 if alarmed else state.clean_steps + 1,
        candidate_clean_steps=0 if alarmed else state.candidate_clean_steps + 1,
        since_rewind=None if state.since_rewind is None else state.since_rewind + 1,
    )


def decide(state: WatchState, config: GovernorConfig, *, state_is_sound: bool, step_was_taken: bool) -> Action:
    """Return what an alarm leads to.

    A step that can still be stopped is skipped. A state that is damaged (non-finite parameters or buffers), a fault seen only
    after its step was taken, and ``patience`` alarms within the window call for a rewind.
    """
    if not state_is_sound or step_was_taken or len(state.alarms) >= config.patience:
        return Action.REWIND
    return Action.SKIP


def is_level_shift(state: WatchState, config: GovernorConfig) -> bool:
    """Whether every observation since the last rewind was alarming, up to ``patience`` of them.

    A known-good state that shows the fault at once, again and again, is not the one at fault.
    """
    return state.since_rewind is not None and state.since_rewind == len(state.alarms) == config.patience
