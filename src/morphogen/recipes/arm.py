"""One arm: a network trained from start to end under the governor, with a policy deciding about its slots.

    for each tick:   train ``tick_steps`` steps, each judged by the governor before it is taken
                     sense gradients, tick the clock, measure the decision split and what seeds contribute
                     let the policy act; a trained one acts before the first tick too
    at the end:      measure the test split, once

Everything that evolves is in the ``TrainingState`` (rewound by the governor) or in ``ArmProgress`` (never rewound: counts,
and which faults were injected). The batches of a step are a function of (seed, step, rollbacks so far): nothing to save,
and after a rewind the data comes in another order, so that a bad window is not replayed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morphogen import control, tasks
from morphogen.control import Action, Op
from morphogen.envs.learned import LearnedPolicy
from morphogen.governor import Governor
from morphogen.governor.faults import Fault, Injections, inject, kind_named
from morphogen.recipes.config import Arm, GrowConfig
from morphogen.recipes.deciding import Tick, make_decider
from morphogen.recipes.events import ArmFinished, ArmStarted, Decided, FaultInjected, TickMeasured
from morphogen.recipes.results import ArmResult
from morphogen.tasks import BuiltTask, Task
from morphogen.tasks.training import TaskTraining
from morphogen.telemetry.events import Emit, to_json


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
        learned: A trained policy, which decides in the grown arm in place of the config's; not changed.
    """

    def __init__(
        self,
        config: GrowConfig,
        arm: Arm,
        repeat: int,
        emit: Emit,
        task: Task | None = None,
        *,
        learned: LearnedPolicy | None = None,
    ) -> None:
        """Build everything under the repeat's seed."""
        self.config = config
        self.arm: Arm = arm
        self.repeat = repeat
        self._emit = emit
        self.task, slots = task or tasks.get(config.task), None
        learned = None if learned is None or arm != "grown" else learned.on(self.task.name)
        if learned is not None:  # it decides where and as often as in training
            slots, tick_steps = learned.origin.env.slots, learned.origin.env.tick_steps
            self.task = dataclasses.replace(self.task, tick_steps=tick_steps or self.task.tick_steps)
        self.built: BuiltTask = self.task.build(
            config.device, slots, seed=config.seed + repeat, full_size=arm == "reference", config=config.growth, emit=emit
        )
        self.model = self.built.model
        self.total_steps = config.total_steps or self.task.total_steps
        chosen = learned or (config.policy if arm == "grown" else "wait")
        self._decider = make_decider(chosen, self.task, self.built.streams, self._total_ticks)
        self.training = TaskTraining(
            self.built,
            total_steps=self.total_steps,
            newborn=config.newborn,
            extras=self._decider.extras,
            emit=emit,
        )
        self.state, self.cursor = self.training.state, self.training.cursor
        self._decider.prepare(self.training)
        self.governor = Governor(self.state, config.governor, emit=emit)
        self._faults = [Fault.parse(text) for text in config.inject] if arm == "grown" else []
        self.progress = ArmProgress()
        self._last_loss = torch.tensor(torch.nan)
        self._losses: list[Tensor] = []  # of the tick under way
        self._quarantined = 0

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.cursor.step >= self.total_steps

    @property
    def tick(self) -> int:
        """Decisions so far."""
        return -(-self.cursor.step // self.task.tick_steps)

    @property
    def _total_ticks(self) -> int:
        return -(-self.total_steps // self.task.tick_steps)

    def start(self) -> None:
        """Announce the run; call once, before the first tick of a run that is not resumed."""
        slots = tuple(self.model.stages())
        parameters = self.model.num_parameters()
        self._emit(ArmStarted(parameters=parameters, slots=slots, total_steps=self.total_steps))
        self._act(self._decider.begin())

    def run_tick(self) -> None:
        """Train up to the next decision, measure, and let the policy act."""
        started = time.perf_counter()
        skipped, self._quarantined = self.governor.skipped_steps, 0
        self.model.train()
        self._train_to_next_tick()
        self.model.sense()
        self.model.tick()
        tick = Tick(
            tick=self.tick,
            total_ticks=self._total_ticks,
            loss=float(torch.stack(self._losses).mean()) if self._losses else math.nan,
            skipped=self.governor.skipped_steps - skipped,
            quarantined=self._quarantined,
        )
        self._report(self._decider.measure(self.training, tick))
        if not self.done:
            self._act(self._decider.decide(self.training, tick))
        seconds = self.progress.wall_seconds + time.perf_counter() - started
        self.progress = dataclasses.replace(self.progress, wall_seconds=seconds, flops=self.training.flops.total)

    def finish(self) -> ArmResult:
        """Measure the test split and return the result."""
        finished = ArmFinished(
            test_metric=self.training.metric_on(self.built.data.test),
            decision_metric=self.training.metric_on(self.built.data.decision),
            parameters=self.model.num_parameters(),
            train_flops=self.training.flops.total,
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
        self.training.flops.total = self.progress.flops
        return user_data["log_offset"]

    # -- training ---------------------------------------------------------------------------------------------------

    def _train_to_next_tick(self) -> None:
        """Train up to the next decision; a rewind takes the cursor back, and then the next decision is an earlier one."""
        target = self._next_tick()
        self._losses = []
        while self.cursor.step < target:
            if self._train_step():
                self.cursor.step += 1
            else:
                target = self._next_tick()
                self._losses = []

    def _next_tick(self) -> int:
        return min(self.total_steps, (self.cursor.step // self.task.tick_steps + 1) * self.task.tick_steps)

    def _train_step(self) -> bool:
        """Take one step; False if the governor rewound the run, and with it the cursor."""
        with self._faults_at_work() as faults:
            inputs, targets = self.training.batch(self.governor.rollbacks)
            labels = faults.labels(targets)
            loss, logits = self.training.backward(inputs, labels, self.training.structure())
            norm, step = self.training.host_gradient_norm(), self.cursor.step
            verdict = self.governor.observe(loss, grad_norm=norm, logits=logits, labels=labels, step=step)
            self._quarantined += len(verdict.quarantined)
            if verdict.proceed:
                self.training.step()
                self._last_loss = loss  # read once a tick: reading it here would wait for the device in every step
                self._losses.append(loss)
        return verdict.rollback is None

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

    def _act(self, action: Action) -> None:
        if action.op is not Op.WAIT:
            blueprint = action.sowing.blueprint if action.sowing else None
            op = action.op.name.lower()
            self._emit(Decided(tick=self.tick, op=op, slot=action.slot, blueprint=blueprint, reason=action.reason))
        control.execute(self.model, action)
