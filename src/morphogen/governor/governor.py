"""The governor: watches a run from inside its loop, stops bad steps, and rewinds the whole run."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphogen.errors import CheckpointError, TrainingCollapsed
from morphogen.governor.config import GovernorConfig
from morphogen.governor.detectors import Detector, standard_detectors
from morphogen.governor.events import LevelShiftAccepted, Rollback, StepSkipped
from morphogen.governor.findings import Finding, Observation
from morphogen.governor.verdicts import Action, Verdict, WatchState, decide, is_level_shift, watched
from morphogen.state import Generation, Ring, TrainingState, checkpoint, surgery
from morphogen.state.inventory import all_finite, module_tensors
from morphogen.telemetry.events import Emit, discard

_MAX_REMEMBERED_FINDINGS = 50


class Governor:
    """Watches a :class:`TrainingState` and keeps it out of trouble. Make it when the run is ready to train, after loading.

    Call :meth:`observe` between ``backward`` and ``step``; take the step only if the verdict says so.

    Args:
        state: The run. A rewind puts back every part of it.
        config: Knobs; the defaults need no knowledge of the task.
        detectors: Own detectors to use beside the standard ones.
        emit: Receives ``StepSkipped``, ``Rollback`` and ``LevelShiftAccepted``.

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
        self._ring = Ring(capacity=self.config.generations).with_candidate(0, state.capture(), 0).promoted()
        self._pending: list[tuple[Observation, Tensor]] = []
        self._evidence: collections.deque[tuple[int, Finding]] = collections.deque(maxlen=_MAX_REMEMBERED_FINDINGS)

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
        """One word: "healthy", "suspicious" (an alarm in the window) or "recovering" (rewound, nothing good since)."""
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
            Take the optimizer's and the scheduler's step only if ``verdict.proceed``.

        Raises:
            TrainingCollapsed: The fault came back after ``max_rewinds`` rewinds.
        """
        number = self._watch.observed if step is None else step
        observation = Observation(step=number, loss=0.0, metrics=dict(metrics or {}))
        self._pending.append((observation, self._numbers(loss, grad_norm)))
        if len(self._pending) < self.config.check_every:
            self._watch = dataclasses.replace(self._watch, observed=self._watch.observed + 1)
            return Verdict(step=observation.step, action=Action.PROCEED)
        verdict = self._judge(self._read_pending())
        if verdict.proceed:
            self._snapshot_if_due(observation.step)
        return verdict

    def _numbers(self, loss: Tensor | float, grad_norm: Tensor | float | None) -> Tensor:
        """Return (loss, gradient norm) as one tensor on the loss's device, nothing read; NaN-free "no gradients" is -1."""
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        norm = self._gradient_norm(device) if grad_norm is None else grad_norm
        values = [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in (loss, norm)]
        return torch.stack([value.reshape(()) for value in values])

    def _gradient_norm(self, device: torch.device) -> Tensor | float:
        gradients = [
            parameter.grad
            for optimizer in self._state.optimizers.values()
            for parameter in surgery.parameters_of(optimizer)
            if parameter.grad is not None
        ]
        if not gradients:
            return -1.0
        norms = torch._foreach_norm(gradients)
        return torch.stack([norm.to(device) for norm in norms]).double().norm()

    def _read_pending(self) -> list[Observation]:
        """Read everything observed since the last check, in one transfer."""
        rows = torch.stack([numbers for _, numbers in self._pending]).tolist()
        observations = [
            dataclasses.replace(observation, loss=loss, grad_norm=None if norm == -1.0 else norm)
            for (observation, _), (loss, norm) in zip(self._pending, rows, strict=True)
        ]
        self._pending = []
        return observations

    def _judge(self, observations: Sequence[Observation]) -> Verdict:
        """Judge all pending observations; the last one's step can still be stopped, the others' were taken."""
        last, before = observations[-1], self._watch.observed - (len(observations) - 1)
        self._watch = dataclasses.replace(self._watch, observed=before)
        for observation in observations:
            findings = tuple(
                finding for detector in self._detectors if (finding := detector.inspect(observation)) is not None
            )
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
        if finite and is_level_shift(self._watch, self.config):
            return self._accept_level(observation, findings)
        sound = finite or self._state_is_finite()
        action = decide(self._watch, self.config, state_is_sound=sound, step_was_taken=step_was_taken)
        if action is Action.REWIND:
            return self._rewind(observation, findings)
        self._watch = dataclasses.replace(self._watch, skipped=self._watch.skipped + 1)
        verdict = Verdict(step=observation.step, action=Action.SKIP, findings=findings)
        self._emit(StepSkipped(step=observation.step, reason=verdict.reason, findings=findings))
        return verdict

    def _accept_level(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        for detector in self._detectors:
            detector.forget()
        self._watch = dataclasses.replace(self._watch, alarms=(), rewinds=0, since_rewind=None)
        self._emit(LevelShiftAccepted(step=observation.step, findings=findings))
        return Verdict(step=observation.step, action=Action.PROCEED)

    def _state_is_finite(self) -> bool:
        return all(all_finite(module_tensors(module).tensors.values()) for module in self._state.models.values())

    # -- snapshots and rewinds --------------------------------------------------------------------------------------

    def _snapshot_if_due(self, step: int) -> None:
        """Promote a candidate that passed its probation; take a new one when due. Nothing while anything is suspicious."""
        watch, config, candidate = self._watch, self.config, self._ring.candidate
        if watch.alarms:
            return
        if candidate is not None and watch.candidate_clean_steps >= config.probation_steps:
            if candidate.snapshot.is_finite():
                self._ring = self._ring.promoted()
                self._watch = dataclasses.replace(watch, rewinds=0)
            else:
                self._ring = self._ring.without_candidate()
            candidate = None
        newest = self._ring.generations[-1].observed
        if candidate is None and watch.observed - newest >= config.snapshot_every:
            self._ring = self._ring.with_candidate(step, self._state.capture(), watch.observed)
            self._watch = dataclasses.replace(self._watch, candidate_clean_steps=0)

    def _rewind(self, observation: Observation, findings: tuple[Finding, ...]) -> Verdict:
        count = self._watch.rewinds + 1
        if count > self.config.max_rewinds:
            raise TrainingCollapsed(self._obituary(findings))
        good = self._ring.good
        target = good[max(0, len(good) - count)]
        strategy = self._put_back(target)
        factor = self.config.learning_rate_penalty ** (count - 1)
        if factor != 1.0:
            self._state.scale_learning_rates(factor)
        self._ring = dataclasses.replace(self._ring, generations=good[: good.index(target) + 1])
        self._watch = dataclasses.replace(
            self._watch,
            alarms=(),
            clean_steps=0,
            candidate_clean_steps=0,
            rewinds=count,
            since_rewind=0,
            rewound=self._watch.rewound + 1,
        )
        rollback = Rollback(
            step=observation.step,
            reason=findings[0].message,
            findings=findings,
            from_step=observation.step,
            to_step=target.step,
            parts=tuple(sorted(target.snapshot.parts)),
            optimizer_strategy=strategy,
            learning_rate_factor=factor,
            penalty=self.config.penalty,
            count=count,
        )
        self._emit(rollback)
        return Verdict(step=observation.step, action=Action.REWIND, findings=findings, rollback=rollback)

    def _put_back(self, target: Generation) -> str:
        strategy = self.config.optimizer
        if strategy == "auto":
            strategy = "restore" if target.snapshot.has_optimizer_state else "reset"
        if strategy == "zero_momentum":
            for optimizer in self._state.optimizers.values():
                surgery.zero_momentum(optimizer)
            self._state.restore(target.snapshot, optimizer="keep")
        else:
            self._state.restore(target.snapshot, optimizer=strategy)
        return strategy

    def _obituary(self, findings: Sequence[Finding]) -> str:
        lines = [f"step {step}: {finding.detector}: {finding.message}" for step, finding in self._evidence]
        return "\n  ".join(
            (
                f"training collapsed: {findings[0].message} after {self._watch.observed} observations, and {self._watch.rewinds} rewinds "
                f"(to generations {[generation.step for generation in self._ring.good]}, learning rate lowered) did not help. "
                "Lower the learning rate, clip gradients or look at the data. What was found:",
                *lines[-10:],
            )
        )

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything the governor remembers, snapshots included, into the directory ``path``."""
        directory = Path(path)
        for generation in self._ring.generations:
            checkpoint.write(directory / f"generation-{generation.observed}", generation.snapshot)
        content = json.dumps(
            {
                "watch": dataclasses.asdict(self._watch),
                "generations": [[generation.step, generation.observed, generation.good] for generation in self._ring.generations],
                "detectors": {detector.name: detector.state_dict() for detector in self._detectors},
                "evidence": [[step, dataclasses.asdict(finding)] for step, finding in self._evidence],
            }
        )
        checkpoint.write_synced(directory / "governor.json", content.encode())
        kept = {f"generation-{generation.observed}" for generation in self._ring.generations}
        for old in directory.glob("generation-*"):
            if old.name not in kept:
                checkpoint.remove(old)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what :meth:`save` wrote; the run itself is loaded by ``TrainingState.load``.

        Raises:
            CheckpointError: A file is missing or damaged; the governor is as it was.
        """
        directory = Path(path)
        try:
            saved: dict[str, Any] = json.loads((directory / "governor.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory / 'governor.json'}: cannot be read: {error}.") from error
        generations = tuple(
            Generation(step, checkpoint.read(directory / f"generation-{observed}", {}).snapshot, observed, good)
            for step, observed, good in saved["generations"]
        )
        self._ring = dataclasses.replace(self._ring, generations=generations)
        self._watch = WatchState(**{**saved["watch"], "alarms": tuple(saved["watch"]["alarms"])})
        for detector in self._detectors:
            if detector.name in saved["detectors"]:
                detector.load_state_dict(saved["detectors"][detector.name])
        self._evidence.clear()
        self._evidence.extend((step, Finding(**finding)) for step, finding in saved["evidence"])
