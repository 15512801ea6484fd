"""Watching a run: what an agent is told about it, measured, remembered, and written into frames."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from morphogen.control import Action, Op
from morphogen.envs.choices import Menu
from morphogen.envs.frames import NUM_LAGS, Frames
from morphogen.envs.slot_numbers import write_slots
from morphogen.growth.ablation import ablated_values
from morphogen.growth.accounting import count_flops
from morphogen.growth.lifecycle import ACTING
from morphogen.growth.points import HOST
from morphogen.tasks.training import TaskTraining


@dataclasses.dataclass
class Remembered:
    """Plain numbers; part of the run's state.

    Attributes:
        metrics: On the decision split, from before any training on.
        metric_error: Standard error of the last one.
        all_off: The last one with every acting seed at alpha 0.
        births: Slot -> the metric when its seed was germinated.
        peaks: Slot -> the highest contribution of its seed so far.
        loss: Mean of the training loss over the last tick.
        last_op: What was done before the last tick.
        last_slot: Where; -1 for nowhere.
        skipped: Optimizer steps the governor stopped in the last tick.
        quarantined: Seeds it took out in the last tick.
    """

    metrics: list[float] = dataclasses.field(default_factory=list[float])
    metric_error: float = math.nan
    all_off: float = math.nan
    births: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    peaks: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    loss: float = math.nan
    last_op: int = int(Op.WAIT)
    last_slot: int = -1
    skipped: int = 0
    quarantined: int = 0


class Watch:
    """What an agent is told about one run.

    Args:
        menu: Places of slots and blueprints.
        total_ticks: Decisions of the run.

    Attributes:
        menu: As given.
        seen: What is remembered.
    """

    def __init__(self, menu: Menu, total_ticks: int) -> None:
        """Have seen nothing."""
        self.menu = menu
        self.seen = Remembered()
        self._total_ticks = total_ticks
        self._host_step_flops: int | None = None

    def acted(self, action: Action) -> None:
        """Remember what is about to be executed."""
        seen = self.seen
        seen.last_op = int(action.op)
        seen.last_slot = -1 if action.slot is None else self.menu.slots.index(action.slot)
        if action.op is Op.GERMINATE and action.slot is not None:
            seen.births[action.slot] = seen.metrics[-1]
            seen.peaks.pop(action.slot, None)

    def measure(self, training: TaskTraining) -> float:
        """Measure the decision split: the whole model, and with seeds off, each alone and all at once.

        Contributions are noted where gates read them. Returns the metric.
        """
        model, seen = training.built.model, self.seen
        acting = [name for name, stage in model.stages().items() if stage in ACTING]
        rows = [frozenset[str](), *(frozenset([name]) for name in acting)]
        if len(acting) > 1:
            rows.append(frozenset(acting))
        values_RN = training.flops.run(
            ("measure", training.structure()),
            lambda: ablated_values(model, training.decision_batches(), training.built.task.per_sample, rows),
            share=(len(rows) - 1) / len(rows),  # the intact pass only watches
        )
        count = values_RN.shape[1]
        difference_RN = values_RN[:1] - values_RN
        means: list[float] = values_RN.mean(1).tolist()
        errors = [[math.inf] * len(rows)] * 2
        if count > 1:
            errors = (torch.stack([values_RN.std(1), difference_RN.std(1)]) / math.sqrt(count)).tolist()
        for row, name in enumerate(acting, start=1):
            contribution = means[0] - means[row]
            model.record_contribution(name, contribution, errors[1][row])
            seen.peaks[name] = max(contribution, seen.peaks.get(name, -math.inf))
        seen.metrics.append(means[0])
        seen.metric_error, seen.all_off = errors[0][0], means[-1]
        return means[0]

    def write(self, training: TaskTraining, frames: Frames, row: int = 0) -> None:
        """Write what is known now into one row of ``frames``; what only an environment knows stays 0 or NaN."""
        model, seen = training.built.model, self.seen
        numbers = {
            "episode": 0,
            "tick": len(seen.metrics) - 1,
            "total_ticks": self._total_ticks,
            "loss": seen.loss,
            "metric": seen.metrics[-1],
            "metric_error": seen.metric_error,
            "start_metric": seen.metrics[0],
            "best_metric": max(seen.metrics),
            "all_off_metric": seen.all_off,
            "host_parameters": sum(parameter.numel() for parameter in model.host.parameters()),
            "parameters": model.num_parameters(),
            "relative_flops": training.flops.total / (self._step_flops(training) * max(1, training.cursor.step)),
            "skipped": seen.skipped,
            "quarantined": seen.quarantined,
            "rolled_back": 0.0,
            "last_op": seen.last_op,
            "last_slot": seen.last_slot,
        }
        for lag, metric in zip(range(1, NUM_LAGS + 1), reversed(seen.metrics[:-1]), strict=False):
            numbers[f"metric_{lag}"] = metric
        frames.runs_NG[row] = math.nan
        for name, value in numbers.items():
            frames.run(name)[row] = value
        write_slots(frames, row, model, self.menu, births=seen.births, peaks=seen.peaks)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, copied."""
        return dataclasses.asdict(self.seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what :meth:`state_dict` returned."""
        self.seen = Remembered(**state)

    def _step_flops(self, training: TaskTraining) -> int:
        """Return the FLOPs of one training step of the host alone."""
        if self._host_step_flops is None:
            built = training.built
            inputs = built.data.train.rows(slice(built.task.batch_size))[0]
            self._host_step_flops = max(1, count_flops(built.model, inputs, backward=True)[HOST])
        return self._host_step_flops
