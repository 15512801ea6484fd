"""One arm: a network trained from start to end under the governor, with a policy deciding about its slots.

    for each tick:   train ``tick_steps`` steps, each judged by the governor before it is taken
                     sense gradients, tick the clock, measure the decision split and every acting slot's contribution
                     let the policy act
    at the end:      measure the test split, once

Everything that evolves is in the ``TrainingState`` (rewound by the governor) or in ``ArmProgress`` (never rewound: counts,
and which faults were injected). The batches of a step are a function of (seed, step, rollbacks so far): nothing to save,
and after a rewind the data comes in another order, so that a bad window is not replayed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from morphogen import control, tasks
from morphogen.control import Op, Policy
from morphogen.governor import Governor
from morphogen.governor.faults import Fault, Injections, inject, kind_named
from morphogen.growth import ContributionResult, NewbornPolicy, Stage, measure_contributions
from morphogen.recipes.config import Arm, GrowConfig
from morphogen.recipes.events import ArmFinished, ArmStarted, Decided, FaultInjected, TickMeasured
from morphogen.recipes.flops import FlopMeter
from morphogen.recipes.results import ArmResult
from morphogen.state import TrainingState
from morphogen.tasks import BuiltTask, Split, Task
from morphogen.telemetry.events import Emit, to_json

_EVALUATION_BATCH = 1000


@dataclasses.dataclass
class Cursor:
    """How far training has come; part of the run, so a rewind takes it back."""

    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the step."""
        self.step = state["step"]


@dataclasses.dataclass(frozen=True)
class ArmProgress:
    """What is not rewound.

    Attributes:
        wall_seconds: Training time so far, over all sittings.
        flops: Floating-point operations so far.
        injected: Faults that were injected.
    """

    wall_seconds: float = 0.0
    flops: int = 0
    injected: tuple[str, ...] = ()


class ArmRun:
    """One arm of one repeat, from its first step or from a checkpoint.

    Args:
        config: The job.
        arm: Which of the three networks.
        repeat: Number of the repeat.
        emit: Receives every event of model, governor and run.
        task: What to train on; by default the config's.
    """

    def __init__(self, config: GrowConfig, arm: Arm, repeat: int, emit: Emit, task: Task | None = None) -> None:
        """Build everything under the repeat's seed."""
        self.config = config
        self.arm: Arm = arm
        self.repeat = repeat
        self._emit = emit
        self.task = task or tasks.get(config.task)
        self.built: BuiltTask = self.task.build(
            config.device, seed=config.seed + repeat, full_size=arm == "reference", config=config.growth, emit=emit
        )
        self.model = self.built.model
        self.total_steps = config.total_steps or self.task.total_steps
        self.cursor = Cursor()
        self._policy_stream = self.built.streams.numpy("policy")
        self._scheduler = CosineAnnealingLR(self.built.optimizer, self.total_steps)
        self.newborn = NewbornPolicy(config.newborn, self.model, self.built.optimizer, self.total_steps)
        self.state = TrainingState(
            self.model,
            self.built.optimizer,
            self._scheduler,
            extras={"cursor": self.cursor, "policy": self._policy_stream, "newborn": self.newborn},
            newborn_options=self.newborn.options,
            emit=emit,
        )
        self.governor = Governor(self.state, config.governor, emit=emit)
        self._policy: Policy = control.make(config.policy if arm == "grown" else "wait", self.task.blueprints)
        self._faults = [Fault.parse(text) for text in config.inject] if arm == "grown" else []
        self._flops = FlopMeter()
        self.progress = ArmProgress()
        self._last_loss = torch.tensor(torch.nan)
        self._order: tuple[tuple[int, int], Tensor] | None = None

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.cursor.step >= self.total_steps

    @property
    def tick(self) -> int:
        """Decisions so far."""
        return -(-self.cursor.step // self.task.tick_steps)

    def start(self) -> None:
        """Announce the run; call once, before the first tick of a run that is not resumed."""
        slots = tuple(self.model.stages())
        parameters = self.model.num_parameters()
        self._emit(ArmStarted(parameters=parameters, slots=slots, total_steps=self.total_steps))

    def run_tick(self) -> None:
        """Train up to the next decision, measure, and let the policy act."""
        started = time.perf_counter()
        self.model.train()
        self._train_to_next_tick()
        self.model.sense()
        self.model.tick()
        measured = self._measure()
        self._report(measured.metric)
        if not self.done:
            self._decide(measured.metric)
        seconds = self.progress.wall_seconds + time.perf_counter() - started
        self.progress = dataclasses.replace(self.progress, wall_seconds=seconds, flops=self._flops.total)

    def finish(self) -> ArmResult:
        """Measure the test split and return the result."""
        finished = ArmFinished(
            test_metric=self._metric_on(self.built.data.test),
            decision_metric=self._metric_on(self.built.data.decision),
            parameters=self.model.num_parameters(),
            train_flops=self._flops.total,
            wall_seconds=self.progress.wall_seconds,
            rollbacks=self.governor.rollbacks,
            skipped_steps=self.governor.skipped_steps,
        )
        self._emit(finished)
        numbers = {name: value for name, value in vars(finished).items() if name != "step"}
        return ArmResult(arm=self.arm, repeat=self.repeat, **numbers)

    def save(self, directory: Path, log_offset: int) -> None:
        """Write everything needed to go on bit-identically into ``directory``."""
        self.governor.save(directory / "governor")
        user_data = to_json({"progress": self.progress, "log_offset": log_offset})
        self.state.save(directory / "run", user_data=user_data)

    def load(self, directory: Path) -> int:
        """Take back what :meth:`save` wrote; returns the length of the event log at that moment, in bytes."""
        user_data: Any = self.state.load(directory / "run")
        self.governor.load(directory / "governor")
        saved: dict[str, Any] = user_data["progress"]
        injected = tuple(saved["injected"])
        self.progress = ArmProgress(wall_seconds=saved["wall_seconds"], flops=saved["flops"], injected=injected)
        self._flops.total = self.progress.flops
        return user_data["log_offset"]

    # -- training ---------------------------------------------------------------------------------------------------

    def _train_to_next_tick(self) -> None:
        """Train up to the next decision; a rewind takes the cursor back, and then the next decision is an earlier one."""
        target = self._next_tick()
        while self.cursor.step < target:
            if self._train_step():
                self.cursor.step += 1
            else:
                target = self._next_tick()

    def _next_tick(self) -> int:
        return min(self.total_steps, (self.cursor.step // self.task.tick_steps + 1) * self.task.tick_steps)

    def _train_step(self) -> bool:
        """Take one step; False if the governor rewound the run, and with it the cursor."""
        with self._faults_at_work() as faults:
            inputs, targets = self._batch()
            labels = faults.labels(targets)
            loss, logits = self._flops.run(("train", self._structure()), lambda: self._backward(inputs, labels))
            norm, step = self._host_gradient_norm(), self.cursor.step
            verdict = self.governor.observe(loss, grad_norm=norm, logits=logits, labels=labels, step=step)
            if verdict.proceed:
                self.built.optimizer.step()
                self._scheduler.step()
                self.newborn.step()
                self._last_loss = loss  # read once a tick: reading it here would wait for the device in every step
        return verdict.rollback is None

    def _backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.built.optimizer.zero_grad()
        outputs = self.model(inputs)
        loss = self.task.loss(outputs, targets)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        if self.model.needs_shadow:
            with self.model.shadow():
                self.task.loss(self.model(inputs), targets).backward()  # pyright: ignore[reportUnknownMemberType]
        return loss.detach(), outputs.detach()

    def _host_gradient_norm(self) -> Tensor:
        """Return the norm of the host's gradients alone: seeds come and go, and an incubating one is not the host's fault."""
        gradients = [parameter.grad for parameter in self.model.host.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return the batch of the present step: shuffled anew each epoch, and after each rollback."""
        train, size = self.built.data.train, self.task.batch_size
        per_epoch = len(train) // size
        epoch, place = divmod(self.cursor.step, per_epoch)
        order = self._shuffled(epoch, self.governor.rollbacks)
        chosen = order[place * size : (place + 1) * size]
        return train.rows(chosen)

    def _shuffled(self, epoch: int, rollbacks: int) -> Tensor:
        """Return the order of the training samples in one epoch; the present one is kept."""
        if self._order is None or self._order[0] != (epoch, rollbacks):
            train = self.built.data.train
            order = self.built.streams.numpy("data", epoch, rollbacks).permutation(len(train))
            self._order = ((epoch, rollbacks), torch.from_numpy(order).to(train.inputs.device))
        return self._order[1]

    def _structure(self) -> Hashable:
        """What the cost of a step depends on: which seeds are computed, and how."""
        slots = (self.model.slot(name) for name in self.model.stages())
        return tuple((slot.mix, slot.state.blueprint, slot.state.operator) for slot in slots)

    @contextlib.contextmanager
    def _faults_at_work(self) -> Generator[Injections]:
        """Put the faults due in this step into it, unless they were in it before a rewind."""
        step, due = self.cursor.step, list[Fault]()
        for fault in self._faults:
            text = f"{fault.kind}@{step}"
            if fault.is_at_work(step) and text not in self.progress.injected:
                due.append(fault)
                injected = (*self.progress.injected, text)
                self.progress = dataclasses.replace(self.progress, injected=injected)
                if step == fault.step:
                    self._emit(FaultInjected(fault=fault.kind, detail=kind_named(fault.kind).description))
        with contextlib.ExitStack() as stack:
            at_work = (inject(fault.kind, self.state, generator=self.built.streams.torch("fault", step)) for fault in due)
            yield Injections(tuple(stack.enter_context(injection) for injection in at_work))

    # -- measuring and deciding -------------------------------------------------------------------------------------

    def _measure(self) -> ContributionResult:
        """Measure the decision split; contributions of seeds on trial are noted where gates and policy read them."""
        on_trial = [name for name, stage in self.model.stages().items() if stage in (Stage.BLENDING, Stage.HOLDING)]
        batches = _batches(self.built.data.decision)
        measured = self._flops.run(
            ("measure", self._structure()),
            lambda: measure_contributions(self.model, batches, self.task.per_sample, on_trial),
            share=len(on_trial) / (len(on_trial) + 1),  # the intact pass only watches
        )
        for name, contribution in measured.slots.items():
            self.model.record_contribution(name, contribution.value, contribution.error)
        return measured

    def _metric_on(self, split: Split) -> float:
        return measure_contributions(self.model, _batches(split), self.task.per_sample, ()).metric

    def _report(self, metric: float) -> None:
        event = TickMeasured(
            tick=self.tick,
            train_loss=float(self._last_loss),
            metric=metric,
            parameters=self.model.num_parameters(),
            stages=self.model.stages(),
            alphas=self.model.alphas(),
            learning_rate=self.state.learning_rates()["host"],
            governor=self.governor.status,
        )
        self._emit(event)

    def _decide(self, metric: float) -> None:
        views = control.view_slots(self.model)
        total_ticks = -(-self.total_steps // self.task.tick_steps)
        observation = control.Observation(tick=self.tick, total_ticks=total_ticks, metric=metric, slots=views)
        action = self._policy.act(observation, control.action_mask(views), self._policy_stream)
        if action.op is not Op.WAIT:
            blueprint = action.sowing.blueprint if action.sowing else None
            op = action.op.name.lower()
            self._emit(Decided(tick=self.tick, op=op, slot=action.slot, blueprint=blueprint, reason=action.reason))
        control.execute(self.model, action)


def _batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(split), _EVALUATION_BATCH):
        yield split.rows(slice(start, start + _EVALUATION_BATCH))
