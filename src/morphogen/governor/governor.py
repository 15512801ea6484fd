"""The governor: watches a run from inside its loop, stops bad steps, and rewinds the whole run."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from morphogen.errors import CheckpointError, StateMismatch, TrainingCollapsed
from morphogen.governor import files
from morphogen.governor.config import GovernorConfig
from morphogen.governor.detectors import Detector, standard_detectors
from morphogen.governor.events import LevelShiftAccepted, Rollback, StepSkipped
from morphogen.governor.findings import Finding, Observation
from morphogen.governor.gradients import end_skipped_step, gradient_norm, is_routine_overflow
from morphogen.governor.recovery import Memory, live_damage, put_back, snapshot_damage
from morphogen.governor.verdicts import (
    Action,
    Verdict,
    WatchState,
    after_promotion,
    after_rewind,
    decide,
    is_level_shift,
    is_watching_closely,
    watched,
)
from morphogen.state import Ring, TrainingState
from morphogen.telemetry.events import Emit, discard

_MAX_REMEMBERED_FINDINGS = 50
_NO_GRADIENTS = -1.0


class Governor:
    """Watches a :class:`TrainingState` and keeps it out of trouble. Make it when the run is ready to train, after loading.

    Call :meth:`observe` between ``backward`` and ``step``; take the step only if the verdict says so.

    Args:
        state: The run. A rewind puts back every part of it.
        config: Knobs; the defaults need no knowledge of the task.
        detectors: Own detectors to use beside the standard ones, each with a name of its own.
        emit: Receives ``StepSkipped``, ``Rollback`` and ``LevelShiftAccepted``.

    Raises:
        ValueError: Two detectors have the same name.
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
        emit: Emit = discard,
    ) -> None:
        """Watch ``state`` and take the first snapshot, which is trusted: nothing has been trained yet, or it was loaded."""
        self.config = config or GovernorConfig()
        self._state = state
        self._detectors = (*standard_detectors(self.config), *detectors)
        self._emit = emit
        self._watch = WatchState()
        self._pending: list[tuple[Observation, Tensor]] = []
        self._evidence: collections.deque[tuple[int, Finding]] = collections.deque(maxlen=_MAX_REMEMBERED_FINDINGS)
        names = [detector.name for detector in self._detectors]
        if len(set(names)) < len(names):
            raise ValueError(f"`detectors` must have names that differ, from the standard ones too, got {names}. Rename one.")
        first = state.capture()
        damage = snapshot_damage(state, first, None)
        if damage:
            raise StateMismatch("the run must be finite when a governor starts to watch it.", tuple(damage))
        self._memories: dict[int, Memory] = {0: self._memory()}
        self._ring = Ring(capacity=self.config.generations).with_candidate(0, first, 0).promoted()

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
        if self._watch.alarms:
            return "suspicious"
        return "recovering" if self._watch.rewinds else "healthy"

    def observe(
        self,
        loss: Tensor | float,
        *,
        grad_norm: Tensor | float | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> Verdict:
        """Judge the step about to be taken. Call after ``backward`` (and after ``unscale_``), before ``step``.

        Args:
            loss: The loss of this step, a scalar.
            grad_norm: Global gradient norm if it is known, as ``clip_grad_norm_`` returns it; else it is computed.
            metrics: Further numbers for own detectors.
            step: The caller's own step number, used in verdicts and events; by default observations are counted.

        Returns:
            Take the step of the optimizer, the gradient scaler (``step`` and ``update``) and the scheduler only if
            ``verdict.proceed``.

        Raises:
            TrainingCollapsed: The fault came back after ``max_rewinds`` rewinds.
            ValueError: ``loss`` or ``grad_norm`` is not one number.
        """
        number = self._watch.observed if step is None else step
        observation = Observation(step=number, loss=0.0, metrics=dict(metrics or {}))
        self._pending.append((observation, self._numbers(loss, grad_norm)))
        if len(self._pending) < self.config.check_every and not is_watching_closely(self._watch, self.config):
            self._watch = dataclasses.replace(self._watch, observed=self._watch.observed + 1)
            return Verdict(step=observation.step, action=Action.PROCEED)
        observations = self._read_pending()
        self._pending = []
        verdict = self._judge(observations)
        return self._kept(observations[-1]) if verdict.proceed else verdict

    def _numbers(self, loss: Tensor | float, grad_norm: Tensor | float | None) -> Tensor:
        """Return (loss, gradient norm) as one tensor on the loss's device, nothing read."""
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        norm = gradient_norm(self._state.optimizers.values(), device) if grad_norm is None else grad_norm
        values = {"loss": loss, "grad_norm": _NO_GRADIENTS if norm is None else norm}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"`{name}` must be one number, got a tensor of shape {tuple(value.shape)}. Reduce it first.")
        tensors = [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in values.values()]
        return torch.stack([tensor.reshape(()) for tensor in tensors])

    def _read_pending(self) -> list[Observation]:
        """Read everything observed since the last check, in one transfer."""
        if not self._pending:
            return []
        device = self._pending[-1][1].device
        rows = torch.stack([numbers.to(device) for _, numbers in self._pending]).tolist()
        return [
            dataclasses.replace(observation, loss=loss, grad_norm=None if norm == _NO_GRADIENTS else norm)
            for (observation, _), (loss, norm) in zip(self._pending, rows, strict=True)
        ]

    def _judge(self, observations: Sequence[Observation]) -> Verdict:
        """Judge all pending observations; the last one's step can still be stopped, the others' were taken."""
        last, before = observations[-1], self._watch.observed - (len(observations) - 1)
        self._watch = dataclasses.replace(self._watch, observed=before)
        for observation in observations:
            found = (detector.inspect(observation) for detector in self._detectors)
            findings = tuple(finding for finding in found if finding is not None)
            if is_routine_overflow(observation.loss, observation.grad_norm, self._state.scalers):
                self._watch = dataclasses.replace(self._watch, observed=self._watch.observed + 1)
                if observation is last:
                    return self._skip(observation, findings)
                continue  # the scaler itself left that step out
            self._watch = watched(self._watch, bool(findings), self.config)
            if findings:
                self._evidence.extend((observation.step, finding) for finding in findings)
                self._watch = dataclasses.replace(self._watch, observed=before + len(observations))
                return self._react(observation, findings, step_was_taken=observation is not last)
            for detector in self._detectors:
                detector.accept(observation)
        return Verdict(step=last.step, action=Action.PROCEED)

    def _react(self, observation: Observation, findings: tuple[Finding, ...], step_was_taken: bool) -> Verdict:
        finite = not any(finding.non_finite for finding in findings)
        lasted = max(finding.lasted_steps for finding in findings)
        if finite and is_level_shift(self._watch, self.config, lasted):
            return self._accept_level(observation, findings)
        sound = finite or not live_damage(self._state, self._ring.good[-1].snapshot)
        action = decide(self._watch, self.config, state_is_sound=sound, step_was_taken=step_was_taken)
        return self._rewind(observation, findings) if action is Action.REWIND else self._skip(observation, findings)

    def _skip(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        self._watch = dataclasses.replace(self._watch, skipped=self._watch.skipped + 1)
        end_skipped_step(self._state.scalers, overflowed=any(finding.non_finite for finding in findings))
        verdict = Verdict(step=observation.step, action=Action.SKIP, findings=findings)
        self._emit(StepSkipped(step=observation.step, reason=verdict.reason, findings=findings))
        return verdict

    def _accept_level(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        for detector in self._detectors:
            detector.forget()
        self._watch = dataclasses.replace(self._watch, alarms=(), suspicious_steps=0, since_rewind=None)
        self._emit(LevelShiftAccepted(step=observation.step, findings=findings))
        return Verdict(step=observation.step, action=Action.PROCEED)

    # -- snapshots and rewinds --------------------------------------------------------------------------------------

    def _kept(self, observation: Observation) -> Verdict:
        """Promote a candidate that passed its probation; take a new one when due. Nothing while anything is suspicious."""
        proceed = Verdict(step=observation.step, action=Action.PROCEED)
        candidate = self._ring.candidate
        if self._watch.alarms:
            return proceed
        if candidate is not None and self._watch.candidate_clean_steps >= self.config.probation_steps:
            damage = snapshot_damage(self._state, candidate.snapshot, self._ring.good[-1].snapshot)
            if damage:
                finding = _damage_finding(damage)
                self._evidence.append((observation.step, finding))
                return self._rewind(observation, (finding,))
            self._ring = self._ring.promoted()
            self._watch = after_promotion(self._watch, self._memories[candidate.observed].position)
            candidate = None
        newest = self._ring.generations[-1].observed
        if candidate is None and self._watch.observed - newest >= self.config.snapshot_every:
            self._ring = self._ring.with_candidate(observation.step, self._state.capture(), self._watch.observed)
            self._memories[self._watch.observed] = self._memory()
            self._watch = dataclasses.replace(self._watch, candidate_clean_steps=0)
            self._forget_dropped()
        return proceed

    def _memory(self) -> Memory:
        return Memory(self._watch.position, {detector.name: detector.state_dict() for detector in self._detectors})

    def _forget_dropped(self) -> None:
        kept = {generation.observed for generation in self._ring.generations}
        self._memories = {observed: memory for observed, memory in self._memories.items() if observed in kept}

    def _rewind(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        count = self._watch.rewinds + 1
        if count > self.config.max_rewinds:
            raise TrainingCollapsed(self._obituary(findings))
        good = self._ring.good
        target = good[max(0, len(good) - count)]
        recovered = put_back(self._state, target.snapshot, self.config.optimizer)
        # Learning rates that were not put back still carry the penalties of earlier rewinds.
        penalties = count - 1 if recovered.strategy == "restore" else min(1, count - 1)
        factor = self.config.learning_rate_penalty**penalties
        if factor != 1.0:
            self._state.scale_learning_rates(factor)
        memory = self._memories[target.observed]
        for detector in self._detectors:
            if detector.name in memory.detectors:
                detector.load_state_dict(memory.detectors[detector.name])
            else:
                detector.forget()
        self._ring = dataclasses.replace(self._ring, generations=good[: good.index(target) + 1])
        self._watch = after_rewind(self._watch, memory.position)
        self._forget_dropped()
        rollback = Rollback(
            step=observation.step,
            reason=findings[0].message,
            findings=findings,
            from_step=observation.step,
            to_step=target.step,
            parts=recovered.parts,
            optimizer_strategy=recovered.strategy,
            learning_rate_factor=factor,
            penalty=self.config.penalty,
            count=count,
        )
        self._emit(rollback)
        return Verdict(step=observation.step, action=Action.REWIND, findings=findings, rollback=rollback)

    def _obituary(self, findings: Sequence[Finding]) -> str:
        lines = [f"step {step}: {finding.detector}: {finding.message}" for step, finding in self._evidence]
        return "\n  ".join(
            (
                f"training collapsed: {findings[0].message} after {self._watch.observed} observations, and "
                f"{self._watch.rewinds} rewinds (generations left: {[kept.step for kept in self._ring.good]}, learning rate "
                "lowered) did not help. Lower the learning rate, clip gradients or look at the data. What was found:",
                *lines[-10:],
            )
        )

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything the governor remembers, snapshots included, into the directory ``path``.

        Raises:
            CheckpointError: The disk refused; what was there before still loads.
        """
        record = files.Record(
            watch=self._watch,
            generations=self._ring.generations,
            memories=self._memories,
            detectors=self._memory().detectors,
            pending=self._read_pending(),
            evidence=self._evidence,
        )
        files.write(Path(path), record)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what :meth:`save` wrote; the run itself is loaded by ``TrainingState.load``.

        Raises:
            CheckpointError: A file is missing or damaged; the governor is as it was.
        """
        record = files.read(Path(path))
        self._load_detectors(record, path)
        self._ring = dataclasses.replace(self._ring, generations=record.generations)
        self._watch, self._memories = record.watch, dict(record.memories)
        self._pending = [(observation, _as_tensor(observation)) for observation in record.pending]
        self._evidence.clear()
        self._evidence.extend(record.evidence)

    def _load_detectors(self, record: files.Record, path: str | os.PathLike[str]) -> None:
        """Give each detector its saved state; one that was not there starts anew. All or nothing."""
        before = self._memory().detectors
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


def _as_tensor(observation: Observation) -> Tensor:
    norm = _NO_GRADIENTS if observation.grad_norm is None else observation.grad_norm
    return torch.tensor([observation.loss, norm], dtype=torch.float64)


def _damage_finding(damage: Sequence[str]) -> Finding:
    return Finding(
        detector="snapshot",
        message=f"not finite in a snapshot on probation: {', '.join(damage[:3])}{' and more' if len(damage) > 3 else ''}",
        value=float("nan"),
        non_finite=True,
    )
