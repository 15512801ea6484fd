"""What the governor answers, and the pure rules by which it decides."""

from __future__ import annotations

import dataclasses
import enum

from morphogen.governor.config import GovernorConfig
from morphogen.governor.events import Rollback
from morphogen.governor.findings import Finding

_LONGEST_WINDOW = 3


class Action(enum.Enum):
    """What happens to the step that was observed."""

    PROCEED = "proceed"
    SKIP = "skip"
    REWIND = "rewind"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Penalty:
    """What a fault costs whoever caused it, for the bookkeeping of a trainer of policies.

    Attributes:
        step: Step at which the fault was seen; the punished action is one taken before.
        amount: As configured.
        owner: The part of the model at fault, such as a slot; None for the whole run.
        reason: The finding's message.
        ends_episode: Whether the run as it was is gone (rewound), so that a transition ends there and then.
    """

    step: int
    amount: float
    owner: str | None
    reason: str
    ends_episode: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one observation.

    Attributes:
        step: The observation's number.
        action: PROCEED: take the step. SKIP: do not; parameters, optimizer and running statistics are as before the batch,
            and gradient scalers have ended the step. REWIND: do not; the run is at an earlier state.
        findings: Why. When proceeding, warnings and what was quarantined, if anything.
        rollback: What was rewound, for a REWIND.
        quarantined: Parts of the model that were taken out, by owner; their gradients are gone with them.
        penalties: One for the rewind, one for each part that was taken out.
    """

    step: int
    action: Action
    findings: tuple[Finding, ...] = ()
    rollback: Rollback | None = None
    quarantined: tuple[str, ...] = ()
    penalties: tuple[Penalty, ...] = ()

    @property
    def proceed(self) -> bool:
        """Whether to take the optimizer's step (and the scaler's and the scheduler's)."""
        return self.action is Action.PROCEED

    @property
    def reason(self) -> str:
        """The findings as one line."""
        return "; ".join(finding.message for finding in self.findings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchState:
    """What the governor remembers between observations, detectors and snapshots aside.

    Attributes:
        observed: Observations so far.
        alarms: Numbers of the alarming observations within the alarm window.
        doubts: Numbers of those after which the state itself may not be what it should be: all but steps that were skipped
            for one bad batch and left nothing behind. Warnings are among them.
        suspicious_steps: Observations in a row with an alarm in the window.
        position: Clean observations on the way to the present state; a rewind takes it back.
        fault_position: Furthest position at which a fault led to a rewind; -1 before the first.
        candidate_clean_steps: Clean observations in a row since the present candidate snapshot was taken.
        window_alarms: Of the latest observations in the bad window (see :func:`is_in_bad_window`), how many in a row alarmed.
        passing_over: Whether the latest observation was in the bad window, so that no step was taken after it.
        window_damaged: Whether the state was damaged while it passed through the bad window, though no step was taken there.
        rewinds: Rewinds since the run last got past ``fault_position`` and stayed clean.
        moments_reset: Whether the latest rewind reset moments and no step was taken since.
        since_rewind: Observations since the last rewind; None before the first.
        skipped: Steps skipped in all.
        rewound: Rewinds in all.
    """

    observed: int = 0
    alarms: tuple[int, ...] = ()
    doubts: tuple[int, ...] = ()
    suspicious_steps: int = 0
    position: int = 0
    fault_position: int = -1
    candidate_clean_steps: int = 0
    window_alarms: int = 0
    passing_over: bool = False
    window_damaged: bool = False
    rewinds: int = 0
    moments_reset: bool = False
    since_rewind: int | None = None
    skipped: int = 0
    rewound: int = 0


def watched(state: WatchState, alarmed: bool, config: GovernorConfig, doubtful: bool | None = None) -> WatchState:
    """Return the state after one more observation.

    Args:
        state: Before it.
        alarmed: Whether it was an alarm.
        config: Has the window.
        doubtful: Whether it casts doubt on the state of the run; by default every alarm does.
    """
    doubtful = alarmed if doubtful is None else doubtful
    alarms = _recent(state.alarms, alarmed, state.observed, config)
    return dataclasses.replace(
        state,
        observed=state.observed + 1,
        alarms=alarms,
        doubts=_recent(state.doubts, doubtful, state.observed, config),
        suspicious_steps=state.suspicious_steps + 1 if alarms else 0,
        position=state.position if alarmed else state.position + 1,
        candidate_clean_steps=0 if doubtful else state.candidate_clean_steps + (not alarmed),
        window_alarms=state.window_alarms if alarmed else 0,
        passing_over=False,
        since_rewind=None if state.since_rewind is None else state.since_rewind + 1,
    )


def _recent(numbers: tuple[int, ...], is_one: bool, observed: int, config: GovernorConfig) -> tuple[int, ...]:
    kept = tuple(number for number in numbers if observed - number < config.alarm_window_steps)
    return (*kept, observed) if is_one else kept


def is_out_of_patience(state: WatchState, config: GovernorConfig) -> bool:
    """Whether there are enough alarms in the window to rewind: one more after each rewind that did not help, to be surer.

    A damaged state alarms at every observation while its steps are skipped; noisy data does so now and then.
    """
    return len(state.alarms) >= min(config.alarm_window_steps, config.patience + state.rewinds)


def decide(state: WatchState, config: GovernorConfig, *, state_is_sound: bool, step_was_taken: bool) -> Action:
    """Return what an alarm leads to.

    A step that can still be stopped is skipped. A state that is damaged, a fault seen only after its step was taken, and too
    many alarms within the window call for a rewind.
    """
    if not state_is_sound or step_was_taken or is_out_of_patience(state, config):
        return Action.REWIND
    return Action.SKIP


def is_in_bad_window(state: WatchState, config: GovernorConfig) -> bool:
    """Whether the run is back at the batches that led to a fault which came back when they were trained on again.

    Where a rewind takes the data back too, the same batches come again. The first rewind trains on them, as the fault may have
    had nothing to do with them; from the second on they are passed over: from ``skip_window_steps`` before the fault to
    ``alarm_window_steps`` after it, and on while they alarm, for up to three times ``skip_window_steps`` more.
    """
    if state.rewinds < 2 or state.fault_position < 0 or not config.skip_window_steps:
        return False
    first = state.fault_position - config.skip_window_steps
    last = state.fault_position + config.alarm_window_steps
    if state.window_alarms:  # not past the fault yet
        last += _LONGEST_WINDOW * config.skip_window_steps
    return first <= state.position < last


def passed_over(state: WatchState, alarmed: bool, damaged: bool, config: GovernorConfig) -> WatchState:
    """Return the state after an observation in the bad window, whose step is skipped whatever it shows."""
    after = watched(state, False, config)
    return dataclasses.replace(
        after,
        passing_over=True,
        window_alarms=state.window_alarms + 1 if alarmed else 0,
        window_damaged=state.window_damaged or damaged,
    )


def is_level_shift(state: WatchState, config: GovernorConfig, lasted_steps: int, known_steps: int) -> bool:
    """Whether what alarms is the data and not the run.

    Either the fault has shown since the first observation after a rewind, until patience ran out: a known-good state that
    shows it at once, again and again, is not the one at fault. Or it has shown all through the end of the bad window, where
    no step was taken, and goes on after it. Or alarms have come and gone for as long as a probation.

    Args:
        state: After the present alarm.
        config: Has the patience.
        lasted_steps: Of the present finding: the fault may have shown in observations that were no alarms.
        known_steps: Clean steps that set the limit of the present finding. Those since the rewind may have been damaged ones:
            what was known before it must have been enough to judge by.
    """
    if state.suspicious_steps > max(config.probation_steps, config.alarm_window_steps):
        return True
    if state.window_alarms >= config.alarm_window_steps:
        return True
    if state.since_rewind is None or not is_out_of_patience(state, config):
        return False
    known_before = known_steps - state.since_rewind + len(state.alarms)
    return known_before >= config.explosion.min_steps and state.since_rewind <= lasted_steps + len(state.alarms) - 1


def after_rewind(state: WatchState, position: int, moments_reset: bool = False) -> WatchState:
    """Return the state after a rewind to a snapshot that was taken at ``position``, with moments restored or reset."""
    return dataclasses.replace(
        state,
        alarms=(),
        doubts=(),
        suspicious_steps=0,
        window_alarms=0,
        passing_over=False,
        window_damaged=False,
        position=position,
        fault_position=max(state.fault_position, state.position),
        candidate_clean_steps=0,
        rewinds=state.rewinds + 1,
        moments_reset=moments_reset,
        since_rewind=0,
        rewound=state.rewound + 1,
    )


def after_acceptance(state: WatchState) -> WatchState:
    """Return the state after a change of level was accepted: nothing of what alarmed counts any more."""
    return dataclasses.replace(state, alarms=(), doubts=(), suspicious_steps=0, window_alarms=0, since_rewind=None)


def after_promotion(state: WatchState, position: int) -> WatchState:
    """Return the state after a snapshot taken at ``position`` proved good: past the last fault, its rewinds are forgiven."""
    return dataclasses.replace(state, rewinds=0) if position > state.fault_position else state


def is_watching_closely(state: WatchState, config: GovernorConfig) -> bool:
    """Whether each step must be judged before it is taken, whatever ``check_every``: while suspicious or just rewound.

    Also where batches are to be passed over.
    """
    is_just_rewound = state.since_rewind is not None and state.since_rewind < config.alarm_window_steps
    return bool(state.alarms or state.doubts) or is_just_rewound or is_in_bad_window(state, config)
