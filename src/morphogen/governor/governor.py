"""The governor: watches a run from inside its loop, stops bad steps, and rewinds the whole run."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from morphogen.errors import CheckpointError, TrainingCollapsed
from morphogen.governor import files
from morphogen.governor.config import GovernorConfig, ProbeConfig, SensorConfig
from morphogen.governor.consensus import Consensus
from morphogen.governor.detectors import Detector, standard_detectors
from morphogen.governor.events import Collapsed, LevelShiftAccepted, PartQuarantined, Rollback, StepSkipped, Warned
from morphogen.governor.evidence import (
    damaged_in_window,
    damaged_snapshot,
    passed_over_batch,
    penalty_of,
    quarantined_part,
)
from morphogen.governor.findings import Finding, Observation
from morphogen.governor.gradients import end_skipped_step, is_routine_overflow, is_seeking_scale
from morphogen.governor.keeper import Keeper
from morphogen.governor.quarantine import quarantine_faulty
from morphogen.governor.report import GovernorReport, GovernorSummary, Timeline
from morphogen.governor.sensors import SIGNALS, Reading, Sensors, observation_of
from morphogen.governor.structure import StructureGuard
from morphogen.governor.verdicts import (
    Action,
    Verdict,
    WatchState,
    after_acceptance,
    after_promotion,
    after_rewind,
    decide,
    is_in_bad_window,
    is_level_shift,
    is_watching_closely,
    passed_over,
    watched,
)
from morphogen.state import TrainingState, surgery
from morphogen.telemetry.events import Emit, Event, discard


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that was measured and not judged yet."""

    step: int
    reading: Reading
    metrics: Mapping[str, float]


class Governor:
    """Watches a :class:`TrainingState` and keeps it out of trouble. Make it when the run is ready to train, after loading.

    Call :meth:`observe` between ``backward`` and ``step``; take the step only if the verdict says so. With gradient
    accumulation call it once for each optimizer step, with the loss of the whole.

    Args:
        state: The run. A rewind puts back every part of it.
        config: Knobs; the defaults need no knowledge of the task.
        detectors: Own detectors to use beside the standard ones, each with a name of its own.
        probe: Returns a number that should not rise, such as the loss of a fixed batch in eval mode; called without gradients
            every ``probe_every`` steps, it must leave the run as it is. It finds what the training loss hides.
        distributed: Whether all processes come to one verdict, by one small all-reduce at each check: True for all processes
            of ``torch.distributed`` where it is initialised, or a process group. Each process needs its own governor.
        emit: Receives ``StepSkipped``, ``Rollback``, ``LevelShiftAccepted``, ``PartQuarantined``, ``Warned`` and
            ``Collapsed``.

    Raises:
        ValueError: Two detectors have the same name, or the config names an unknown owner.
        StateMismatch: A parameter or moment is not finite: there is nothing to rewind to.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> governor = Governor(TrainingState(model, optimizer))
        >>> loss = model(torch.ones(1, 2)).square().mean()
        >>> loss.backward()
        >>> governor.observe(loss).proceed
        True
    """

    def __init__(
        self,
        state: TrainingState,
        config: GovernorConfig | None = None,
        *,
        detectors: Sequence[Detector] = (),
        probe: Callable[[], Tensor | float] | None = None,
        distributed: bool | dist.ProcessGroup = True,
        emit: Emit = discard,
    ) -> None:
        """Watch ``state`` and take the first snapshot, which is trusted: nothing has been trained yet, or it was loaded."""
        self.config = config or GovernorConfig()
        self._state = state
        self._detectors = (*standard_detectors(self.config), *detectors)
        self._emit_event = emit
        self._watch = WatchState()
        self._pending: list[_Pending] = []
        self._timeline = Timeline()
        names = [detector.name for detector in self._detectors]
        if len(set(names)) < len(names):
            raise ValueError(f"`detectors` must have names that differ, from the standard ones too, got {names}. Rename one.")
        if probe is None and (
            self.config.probe != ProbeConfig() or self.config.sensors.probe_every != SensorConfig().probe_every
        ):
            raise ValueError(
                "`probe` must be given for its settings to have an effect, got None. Pass a function that returns a loss."
            )
        for owner in () if isinstance(self.config.optimizer, str) else self.config.optimizer:
            state.group_of(owner)
        self._consensus = Consensus.of(distributed)
        self._consensus.check_same("config", zlib.crc32(self.config.model_dump_json().encode()))
        self._keeper = Keeper(state, self.config, self._detectors, self._consensus)
        self._guard = StructureGuard(state)
        self._sensors = Sensors(state, self.config.sensors, probe=probe)
        self._note_generations()

    @property
    def rollbacks(self) -> int:
        """Rewinds so far."""
        return self._watch.rewound

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps stopped so far."""
        return self._watch.skipped

    @property
    def status(self) -> str:
        """One word: "healthy", "suspicious" (an alarm in the window) or "recovering" (rewound, not past the fault yet)."""
        if self._watch.alarms or self._watch.doubts:
            return "suspicious"
        return "recovering" if self._watch.rewinds else "healthy"

    def report(self) -> GovernorReport:
        """Return what happened so far, to print, or to save as text or as an HTML page: ``report().save("report.html")``."""
        watch = self._watch
        summary = GovernorSummary(
            observations=watch.observed,
            skipped_steps=watch.skipped,
            rewinds=watch.rewound,
            status=self.status,
            detectors=tuple(detector.name for detector in self._detectors),
            config=self.config.model_dump(mode="json"),
        )
        return GovernorReport(self._timeline.history(), summary)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def observe(
        self,
        loss: Tensor | float,
        *,
        grad_norm: Tensor | float | None = None,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> Verdict:
        """Judge the step about to be taken. Call after ``backward`` (and after ``unscale_``), before ``step``.

        Args:
            loss: The loss of this step, a scalar.
            grad_norm: Global gradient norm if it is known, as ``clip_grad_norm_`` returns it; else it is computed.
            logits: Outputs of the model for this batch, (..., C), for the detection of collapse; see
                :func:`~morphogen.governor.outputs.output_signals`.
            labels: Class numbers belonging to ``logits``: tells a batch of few classes from a collapse.
            metrics: Further numbers for own detectors; the highest of all processes counts, each must give the same.
            step: The caller's own step number, used in verdicts and events; by default observations are counted.

        Returns:
            Take the step of the optimizer, the gradient scaler (``step`` and ``update``) and the scheduler only if
            ``verdict.proceed``.

        Raises:
            TrainingCollapsed: The fault came back after ``max_rewinds`` rewinds; the run is at the oldest good snapshot.
            StateMismatch: A parameter, its gradient, its moments and the groups do not belong together any more.
            ValueError: ``loss`` or ``grad_norm`` is not one number.
        """
        if self._guard.check() and not self._keeper.can_rewind():
            self._restart_snapshots()
        number = self._watch.observed + len(self._pending) if step is None else step
        reading = self._sensors.measure(loss, grad_norm=grad_norm, logits=logits, labels=labels)
        self._pending.append(_Pending(number, reading, dict(metrics or {})))
        if len(self._pending) < self.config.check_every and not is_watching_closely(self._watch, self.config):
            verdict = Verdict(step=number, action=Action.PROCEED)
        else:
            verdict = self._judge(last_was_taken=False)
        if verdict.proceed and self._watch.moments_reset:
            self._watch = dataclasses.replace(self._watch, moments_reset=False)
            for optimizer in self._state.optimizers.values():
                surgery.soften_first_step(optimizer)
        return verdict

    def flush(self) -> Verdict:
        """Judge the steps that were taken and not looked at yet, where ``check_every`` is above 1; at the end of a run."""
        if not self._pending:
            return Verdict(step=self._watch.observed, action=Action.PROCEED)
        return self._judge(last_was_taken=True)

    def step(self, closure: Callable[[], Tensor], *, optimizer: str = "", step: int | None = None) -> Verdict:
        """Compute a loss, judge it and take the optimizer's step if it may be taken; for optimizers that need a closure.

        Args:
            closure: Clears gradients, computes the loss, calls ``backward`` and returns the loss.
            optimizer: Name of the optimizer to step, where the state has several.
            step: As in :meth:`observe`.
        """
        with torch.enable_grad():
            first: list[Tensor] = [closure()]
        verdict = self.observe(first[0], step=step)
        if verdict.proceed:
            self._state.optimizers[optimizer].step(lambda: float((first.pop() if first else closure()).detach()))
        return verdict

    # -- judging ----------------------------------------------------------------------------------------------------

    def _read_pending(self) -> list[Observation]:
        """Read everything observed since the last check, in one transfer."""
        if not self._pending:
            return []
        device = self._pending[-1].reading.values.device
        numbers = iter(torch.cat([pending.reading.values.to(device) for pending in self._pending]).tolist())
        rows = [{name: next(numbers) for name in pending.reading.names} | dict(pending.metrics) for pending in self._pending]
        where = {"observations": self._watch.observed, "newest snapshot": self._keeper.ring.generations[-1].observed}
        rows = self._consensus.worst(rows, ("loss", "grad_norm", *SIGNALS), where)
        return [observation_of(pending.step, row) for pending, row in zip(self._pending, rows, strict=True)]

    def _judge(self, last_was_taken: bool) -> Verdict:
        """Judge all that is pending; only the last step can still be stopped, and not even that if it was taken."""
        observations, end = self._read_pending(), self._watch.observed + len(self._pending)
        self._pending = []
        verdict = Verdict(step=observations[-1].step, action=Action.PROCEED)
        for observation in observations:
            was_taken = last_was_taken or observation is not observations[-1]
            verdict = self._judge_one(observation, was_taken)
            if verdict.rollback is not None:  # what came after it was observed, too
                self._watch = dataclasses.replace(self._watch, observed=end)
                return verdict
        return self._kept(observations[-1], verdict) if verdict.proceed else verdict

    def _judge_one(self, observation: Observation, was_taken: bool) -> Verdict:
        self._timeline.record_loss(self._watch.observed + 1, observation.step, observation.loss)
        if is_routine_overflow(observation.loss, observation.grad_norm, self._state.scalers):
            findings = self._inspected(observation)
            self._watch = dataclasses.replace(self._watch, observed=self._watch.observed + 1)
            # A step that was taken was left out by the scaler itself.
            return Verdict(step=observation.step, action=Action.PROCEED) if was_taken else self._skip(observation, findings)
        if is_in_bad_window(self._watch, self.config) and not was_taken:
            return self._pass_over(observation)
        if self._watch.window_damaged:
            return self._rewind(observation, (damaged_in_window(),))
        quarantined: tuple[str, ...] = ()
        if not was_taken and not _isolated_is_finite(observation):
            observation, quarantined = self._quarantine(observation)
        findings = self._inspected(observation)
        alarms = tuple(finding for finding in findings if not finding.warning)
        if alarms:
            verdict = self._react(observation, alarms, was_taken)
        else:
            self._watch = watched(self._watch, False, self.config, doubtful=bool(findings))
            if findings:
                self._emit(Warned(step=observation.step, findings=findings))
            else:
                for detector in self._detectors:
                    detector.accept(observation)
            verdict = Verdict(step=observation.step, action=Action.PROCEED, findings=findings)
        return self._with_quarantined(verdict, quarantined) if quarantined else verdict

    def _pass_over(self, observation: Observation) -> Verdict:
        """Skip a batch of the bad window; look at it all the same, as only what is in the state can damage the run there."""
        alarms = [finding for finding in self._inspected(observation) if not finding.warning]
        moved = self._watch.passing_over and observation.signals.get("update", 0.0) != 0.0  # without a step
        damaged = moved or self._is_damaged(alarms, was_taken=False)
        self._watch = passed_over(self._watch, moved or bool(alarms), damaged, self.config)
        return self._skip(observation, (passed_over_batch(self._watch),))

    def _inspected(self, observation: Observation) -> tuple[Finding, ...]:
        found = (detector.inspect(observation) for detector in self._detectors)
        return tuple(finding for finding in found if finding is not None)

    def _react(self, observation: Observation, findings: tuple[Finding, ...], was_taken: bool) -> Verdict:
        finite = not any(finding.non_finite for finding in findings)
        sound = not self._is_damaged(findings, was_taken)
        harmless = sound and not finite and not was_taken  # nothing of one bad batch is left behind
        self._watch = watched(self._watch, True, self.config, doubtful=not harmless)
        lasted = max(finding.lasted_steps for finding in findings)
        known = min(finding.window_steps for finding in findings)
        if finite and sound and is_level_shift(self._watch, self.config, lasted, known):
            return self._accept_level(observation, findings)
        action = decide(self._watch, self.config, state_is_sound=sound, step_was_taken=was_taken)
        return self._rewind(observation, findings) if action is Action.REWIND else self._skip(observation, findings)

    def _is_damaged(self, findings: Sequence[Finding], was_taken: bool) -> bool:
        """Whether the run is damaged and not the batch alone; what a step not taken left in the buffers does not count."""
        if any(finding.in_state for finding in findings):
            return True
        if not any(finding.non_finite for finding in findings):
            return False
        if not was_taken:
            self._sensors.buffers.put_back()
        return self._keeper.live_damage()

    def _skip(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        self._watch = dataclasses.replace(self._watch, skipped=self._watch.skipped + 1)
        self._sensors.buffers.put_back()
        end_skipped_step(self._state.scalers, overflowed=any(finding.non_finite for finding in findings))
        verdict = Verdict(step=observation.step, action=Action.SKIP, findings=findings)
        self._emit(StepSkipped(step=observation.step, reason=verdict.reason, findings=findings))
        return verdict

    def _accept_level(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        for detector in self._detectors:
            detector.forget()
        self._watch = after_acceptance(self._watch)
        self._emit(LevelShiftAccepted(step=observation.step, findings=findings))
        return Verdict(step=observation.step, action=Action.PROCEED, findings=findings)

    def _quarantine(self, observation: Observation) -> tuple[Observation, tuple[str, ...]]:
        """Take out isolated parts that are not finite, and forget what they put into the gradient norm that was given."""
        seeking = is_seeking_scale(self._state.scalers)
        owners = quarantine_faulty(self._state.models, self._consensus, by_gradient=not seeking)
        if owners and observation.grad_norm is not None and not math.isfinite(observation.grad_norm):
            measured = self._sensors.gradient_norm()
            observation = dataclasses.replace(observation, grad_norm=measured)
        return observation, tuple(owners)

    def _with_quarantined(self, verdict: Verdict, owners: tuple[str, ...]) -> Verdict:
        findings = tuple(quarantined_part(owner) for owner in owners)
        amount = self.config.quarantine_penalty
        for owner, finding in zip(owners, findings, strict=True):
            self._emit(PartQuarantined(step=verdict.step, owner=owner, findings=(finding,), penalty=amount))
        penalties = tuple(
            penalty_of(verdict.step, amount, finding, owner) for owner, finding in zip(owners, findings, strict=True)
        )
        return dataclasses.replace(
            verdict,
            findings=verdict.findings + findings,
            quarantined=owners,
            penalties=verdict.penalties + penalties,
        )

    # -- snapshots and rewinds --------------------------------------------------------------------------------------

    def _kept(self, observation: Observation, proceed: Verdict) -> Verdict:
        """Promote a candidate that passed its probation; take a new one when due. Nothing while anything is in doubt."""
        keeper, candidate = self._keeper, self._keeper.ring.candidate
        if self._watch.doubts:
            return proceed
        if candidate is not None and self._watch.candidate_clean_steps >= self.config.probation_steps:
            damage = keeper.candidate_damage()
            if damage:
                return self._rewind(observation, (damaged_snapshot(damage),))
            position = keeper.memories[keeper.promote().observed].position
            self._watch = after_promotion(self._watch, position)
            candidate = None
            self._note_generations()
        newest = keeper.ring.generations[-1].observed
        if candidate is None and self._watch.observed - newest >= self.config.snapshot_every:
            keeper.take(observation.step, self._watch.observed, self._watch.position)
            self._watch = dataclasses.replace(self._watch, candidate_clean_steps=0)
            self._note_generations()
        return proceed

    def _rewind(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        count = self._watch.rewinds + 1
        is_last = count > self.config.max_rewinds
        rewound = self._keeper.rewind(min(count, self.config.max_rewinds), for_good=is_last)
        self._sensors.start_anew()
        self._pending = []
        if is_last:
            self._collapse(observation, findings, rewound.target.step)
        self._watch = after_rewind(self._watch, rewound.memory.position, rewound.recovered.moments_reset)
        rollback = Rollback(
            step=observation.step,
            reason=findings[0].message,
            findings=findings,
            from_step=observation.step,
            to_step=rewound.target.step,
            parts=rewound.recovered.parts,
            optimizer_strategy=rewound.recovered.strategy,
            learning_rate_factor=rewound.learning_rate_factor,
            penalty=self.config.penalty,
            count=count,
        )
        self._emit(rollback)
        self._note_generations()
        penalty = penalty_of(observation.step, self.config.penalty, findings[0])
        return Verdict(step=observation.step, action=Action.REWIND, findings=findings, rollback=rollback, penalties=(penalty,))

    def _collapse(self, observation: Observation, findings: tuple[Finding, ...], to_step: int) -> None:
        reason, rewinds = findings[0].message, self._watch.rewinds
        self._emit(Collapsed(step=observation.step, reason=reason, findings=findings, to_step=to_step, rewinds=rewinds))
        self._note_generations()
        report = self.report()
        latest = report.history.findings.latest[-10:]
        message = "\n  ".join(
            (
                f"training collapsed: {reason} after {self._watch.observed} observations, and {rewinds} rewinds, each further "
                f"back or with a lower learning rate, did not help. The run is at the snapshot of step {to_step}. Lower the "
                "learning rate, clip gradients or look at the data. What was found:",
                *(f"step {entry.step}: {entry.finding.detector}: {entry.finding.message}" for entry in latest),
            )
        )
        raise TrainingCollapsed(message, findings, report)

    def _emit(self, event: Event) -> None:
        self._timeline.record(self._watch.observed, event)
        self._emit_event(event)

    def _restart_snapshots(self) -> None:
        watch = self._watch
        self._keeper.restart(watch.observed, watch.observed, watch.position)
        message = "the structure of the run changed: its snapshots could not be put back over it, and were dropped"
        self._emit(Warned(step=watch.observed, findings=(Finding(detector="structure", message=message, value=0.0),)))
        self._note_generations()

    def _note_generations(self) -> None:
        self._timeline.record_generations(self._watch.observed, self._keeper.ring.generations)

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything the governor remembers, snapshots included, into the directory ``path``.

        Raises:
            CheckpointError: The disk refused; what was there before still loads.
        """
        record = files.Record(
            watch=self._watch,
            generations=self._keeper.ring.generations,
            memories=self._keeper.memories,
            detectors=self._keeper.memory(0).detectors,
            sensors=self._sensors.state_dict(),
            pending=self._read_pending(),
            timeline=self._timeline.state_dict(),
        )
        files.write(Path(path), record)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what :meth:`save` wrote; the run itself is loaded by ``TrainingState.load``.

        Raises:
            CheckpointError: A file is missing or damaged; the governor is as it was.
        """
        record = files.read(Path(path))
        timeline = Timeline()
        try:
            timeline.load_state_dict(record.timeline)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{os.fspath(path)}: its timeline is damaged: {error}. Use another checkpoint.") from error
        self._load_detectors(record, path)
        self._timeline = timeline
        self._sensors.load_state_dict(record.sensors)
        self._keeper.ring = dataclasses.replace(self._keeper.ring, generations=record.generations)
        self._watch, self._keeper.memories = record.watch, dict(record.memories)
        self._pending = [_as_pending(observation) for observation in record.pending]

    def _load_detectors(self, record: files.Record, path: str | os.PathLike[str]) -> None:
        """Give each detector its saved state; one that was not there starts anew. All or nothing."""
        before = self._keeper.memory(0).detectors
        try:
            for detector in self._detectors:
                detector.load_state_dict(record.detectors.get(detector.name, before[detector.name]))
        except (KeyError, TypeError, ValueError) as error:
            for detector in self._detectors:
                detector.load_state_dict(before[detector.name])
            raise CheckpointError(
                f"{os.fspath(path)}: the state of a detector does not fit: {type(error).__name__}: {error}. "
                "Use the detectors that were in use when it was saved."
            ) from error


def _as_pending(observation: Observation) -> _Pending:
    numbers = {"loss": observation.loss, **observation.signals}
    if observation.grad_norm is not None:
        numbers["grad_norm"] = observation.grad_norm
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    return _Pending(observation.step, Reading(tuple(numbers), values), observation.metrics)


def _isolated_is_finite(observation: Observation) -> bool:
    return math.isfinite(observation.signals.get("isolated_grad_norm", 0.0))
