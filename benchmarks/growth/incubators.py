"""Incubators compared: what a seed has learnt when it begins to blend in, what it is worth in the end, and what that costs.

On each task the host trains for 30 ticks of 20 steps (of 10 on text) with the task's optimizer and a cosine. One seed, the
task's first blueprint in its middle growth point, germinates at tick 3, incubates for 6 ticks, blends in over 3, holds, and is
fossilised at tick 14. All arms of a repeat share initialisation, data order and this schedule:

    straight 0.3, 1.0   ``straight_through`` with that ``incubation_ratio``
    shadow              ``shadow``
    at once             no incubation: the seed germinates at the tick at which the others begin to blend
    host                no seed

Measured on the decision split in eval mode, just before blending: the relative change of the logits from alpha 0 to the first
step of the ramp and to alpha 1, and the change of the loss at alpha 1, once with the running statistics of BatchNorm, which do
not know the seed yet, and once with those of the data. Then the contribution when the seed is fossilised, and at the end the
metric on the test split. Differences are paired by repeat, with 95 % Student intervals. Cost: process CPU time of a training
step during incubation over one of the host alone, median of the ratios within interleaved rounds.

    python benchmarks/growth/incubators.py [--tasks digits,mnist1d] [--arms LIST] [--seeds 8] [--json PATH]

The results of other tasks that the file holds are kept.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from torch import Tensor

from morphogen import tasks
from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, Stage, measure_contributions
from morphogen.recipes.results import interval
from morphogen.state import TrainingState
from morphogen.tasks import BuiltTask, Split

RESULTS = Path(__file__).parents[1] / "results" / "growth_incubators.json"
TICKS = 30
TICK_STEPS = {"text": 10}
DEFAULT_TICK_STEPS = 20
GERMINATION_TICK, BLENDING_TICK, FOSSIL_TICK = 3, 9, 14
BASE = "straight 0.3"
INCUBATORS: dict[str, dict[str, Any]] = {
    "straight 0.3": {"incubator": "straight_through", "incubation_ratio": 0.3},
    "straight 1.0": {"incubator": "straight_through", "incubation_ratio": 1.0},
    "shadow": {"incubator": "shadow"},
}
ARMS = (*INCUBATORS, "at once", "host")
GATES = GateConfig(min_training_ticks=0, min_blending_ticks=0, min_holding_ticks=0, min_contribution=-1e30)
EVALUATION_BATCH = 1000


@dataclasses.dataclass
class Measured:
    """What one run shows; None where there is nothing to measure.

    Attributes:
        first_jump: |logits at the first alpha of the ramp - logits at 0| / |logits at 0|.
        full_jump: The same at alpha 1.
        loss_change: Loss at alpha 1 minus loss at alpha 0, in nats.
        loss_change_fresh: The same with BatchNorm's statistics taken from the data.
        metric_change: Metric at alpha 1 minus metric at alpha 0.
        contribution: Metric with the seed minus metric without, when it was fossilised.
        decision_metric: On the decision split, at the end.
        test_metric: On the test split, at the end.
    """

    first_jump: float | None = None
    full_jump: float | None = None
    loss_change: float | None = None
    loss_change_fresh: float | None = None
    metric_change: float | None = None
    contribution: float | None = None
    decision_metric: float | None = None
    test_metric: float | None = None


class Run:
    """One arm of one repeat."""

    def __init__(self, task: str, arm: str, seed: int, total_steps: int | None = None) -> None:
        config = GrowthConfig(gates=GATES, **INCUBATORS.get(arm, {}))
        self.task, self.tick_steps = tasks.get(task), TICK_STEPS.get(task, DEFAULT_TICK_STEPS)
        self.built: BuiltTask = self.task.build(seed=seed, config=config)
        self.model: GrowableModel = self.built.model
        self.arm, self.step, self.measured = arm, 0, Measured()
        self.slot = list(self.model.stages())[(len(self.model.stages()) - 1) // 2]
        optimizer = self.built.optimizer
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps or TICKS * self.tick_steps)
        self.state = TrainingState(self.model, optimizer, self.scheduler, newborn_options=self.newborn_options)

    def newborn_options(self, owner: str) -> dict[str, Any]:
        return {"lr": self.state.learning_rates()["host"]}

    def finish(self) -> Measured:
        """Train to the end on the schedule."""
        for tick in range(TICKS):
            if self.arm != "host":
                self.act(tick)
            for _ in range(self.tick_steps):
                self.train_step()
            self.model.sense()
            self.model.tick()
        self.measured.decision_metric = self.metric(self.built.data.decision)
        self.measured.test_metric = self.metric(self.built.data.test)
        return self.measured

    def act(self, tick: int) -> None:
        """Do what the schedule says before the steps of ``tick``."""
        if tick == (BLENDING_TICK if self.arm == "at once" else GERMINATION_TICK):
            self.model.germinate(self.slot, self.task.blueprints[0])
            self.model.advance(self.slot)
        if tick == BLENDING_TICK:
            self.blend()
        stage = self.model.stages()[self.slot]
        if stage is Stage.BLENDING and self.model.slot(self.slot).state.ramp is None:
            assert self.model.advance(self.slot)
        if tick == FOSSIL_TICK:
            decision = self.built.data.decision
            found = measure_contributions(self.model, batches(decision), self.task.per_sample, [self.slot]).slots[self.slot]
            self.measured.contribution = found.value
            self.model.record_contribution(self.slot, found.value, found.error)
            assert self.model.fossilize(self.slot)

    def blend(self) -> None:
        """Let the seed into BLENDING, and measure what alpha does to the output."""
        if self.arm == "at once":
            self.built.optimizer.zero_grad()
            self.gradients()  # the gate asks for a gradient; no step is taken
            self.model.sense()
        decision = self.built.data.decision
        before, before_fresh = self.outputs(decision, None), self.outputs(decision, None, fresh=True)
        assert self.model.advance(self.slot)
        first, full = (self.outputs(decision, alpha) for alpha in (self.model.alphas()[self.slot], 1.0))
        full_fresh = self.outputs(decision, 1.0, fresh=True)
        targets = decision.rows(slice(len(decision)))[1]
        loss, metric = self.task.loss, lambda outputs: self.task.per_sample(outputs, targets).mean()
        self.measured.first_jump = float((first - before).norm() / before.norm())
        self.measured.full_jump = float((full - before).norm() / before.norm())
        self.measured.loss_change = float(loss(full, targets) - loss(before, targets))
        self.measured.loss_change_fresh = float(loss(full_fresh, targets) - loss(before_fresh, targets))
        self.measured.metric_change = float(metric(full) - metric(before))

    def outputs(self, split: Split, alpha: float | None, fresh: bool = False) -> Tensor:
        """Return the outputs on all of ``split``, with the seed at ``alpha`` if it acts.

        In eval mode; ``fresh``: in train mode, on a copy, so that BatchNorm normalises with the data's own statistics (no host
        has dropout).
        """
        alphas = None if alpha is None else {self.slot: alpha}
        model = copy.deepcopy(self.model).train() if fresh else self.model.eval()
        with torch.no_grad():
            found = torch.cat([model(inputs, alphas=alphas) for inputs, _ in batches(split)])
        self.model.train()
        return found

    def metric(self, split: Split) -> float:
        return measure_contributions(self.model, batches(split), self.task.per_sample, ()).metric

    def train_step(self) -> None:
        """Take one optimizer step; the shadow pass, where one is needed, included."""
        self.built.optimizer.zero_grad()
        self.gradients()
        self.built.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def gradients(self) -> None:
        inputs, targets = self.batch()
        self.task.loss(self.model(inputs), targets).backward()
        if self.model.needs_shadow:
            with self.model.shadow():
                self.task.loss(self.model(inputs), targets).backward()

    def batch(self) -> tuple[Tensor, Tensor]:
        train, size = self.built.data.train, self.task.batch_size
        epoch, place = divmod(self.step, len(train) // size)
        if place == 0 or self.step == 0:
            self.order = torch.from_numpy(self.built.streams.numpy("data", epoch).permutation(len(train)))
        return train.rows(self.order[place * size : (place + 1) * size])


def batches(split: Split) -> list[tuple[Tensor, Tensor]]:
    return [split.rows(slice(start, start + EVALUATION_BATCH)) for start in range(0, len(split), EVALUATION_BATCH)]


def main() -> None:
    """Measure, print the tables, and write the results."""
    known = ",".join(name for name in ("digits", "mnist1d", "text") if _is_here(name))
    parser = argparse.ArgumentParser(description="Incubators compared.")
    parser.add_argument("--tasks", default=known, help=f"names, separated by commas (default {known})")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"names, separated by commas; {BASE!r} must be among them")
    parser.add_argument("--seeds", type=int, default=8, help="repeats of each arm, >= 2 (default 8)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds in which steps are timed (default 100)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.json.read_text())["tasks"] if options.json.exists() else {}
    for name in options.tasks.split(","):
        started = time.process_time()
        found = compare(name, options.arms.split(","), options.seeds, options.rounds)
        chosen = "" if options.arms == ",".join(ARMS) else f' --arms "{options.arms}"'
        command = (
            f"python benchmarks/growth/incubators.py --tasks {name} --seeds {options.seeds} --rounds {options.rounds}{chosen}"
        )
        kept[name] = {"command": command, "cpu_seconds": round(time.process_time() - started), "arms": found}
        write(options.json, kept)


def _is_here(name: str) -> bool:
    """Whether the data of a task is on this machine."""
    source = tasks.get(name).source
    return source is None or source.locate() is not None


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results of all tasks, with what they were measured on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "ticks": TICKS, "tasks": results}, indent=1) + "\n")
    print(f"written to {path}", flush=True)


def compare(task: str, arms: Sequence[str], seeds: int, rounds: int) -> dict[str, Any]:
    """Run each of ``arms`` ``seeds`` times on ``task``, print the table, and return it as JSON data."""
    costs = measure_costs(task, rounds)
    runs = {arm: [Run(task, arm, seed).finish() for seed in range(seeds)] for arm in arms}
    print(f"\n{task}, {seeds} repeats; mean [95 %]; d: difference from {BASE}, paired; * marks intervals without 0")
    table: dict[str, Any] = {}
    for arm, found in runs.items():
        row = {name: summary(name, found, runs[BASE]) for name in Measured.__dataclass_fields__}
        table[arm] = {"cost": costs.get(arm), **row}
        print(f"  {arm:13} step {costs[arm]['median']:5.2f} of the host's" if arm in costs else f"  {arm:13}")
        for name, numbers in row.items():
            if numbers is not None:
                print(f"      {name:16} {text_of(numbers['mean'])}   d {text_of(numbers['minus_base'], mark=True)}")
    return table


def summary(name: str, runs: Sequence[Measured], base: Sequence[Measured]) -> dict[str, Any] | None:
    """Return mean and paired difference from the base of one measurement, or None where it does not exist."""
    own = [getattr(run, name) for run in runs]
    if any(value is None for value in own):
        return None
    differences = [value - getattr(run, name) for value, run in zip(own, base, strict=True)]
    return {
        "mean": dataclasses.asdict(interval(own)),
        "minus_base": dataclasses.asdict(interval(differences)),
        "values": [round(value, 6) for value in own],
    }


def text_of(numbers: Mapping[str, Any], mark: bool = False) -> str:
    low, high = numbers["low"], numbers["high"]
    star = "*" if mark and (low > 0 or high < 0) else ""
    return f"{numbers['mean']:8.4f} [{low:.4f}, {high:.4f}]{star}"


def measure_costs(task: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return for each incubator the CPU time of a step over the host's: median and quartiles of the ratios within rounds."""
    steps: dict[str, Callable[[], None]] = {}
    for arm in ("host", BASE, "shadow"):
        run = Run(task, arm, seed=0, total_steps=10**6)
        if arm != "host":
            run.model.germinate(run.slot, run.task.blueprints[0])
            run.model.advance(run.slot)
        steps[arm] = run.train_step
    times: dict[str, list[float]] = {arm: [] for arm in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for round_number in range(rounds + 5):
        shuffle(order)
        for arm in order:
            start = time.process_time()
            for _ in range(3):
                steps[arm]()
            if round_number >= 5:  # the first rounds warm up
                times[arm].append(time.process_time() - start)
    found: dict[str, dict[str, float]] = {}
    for arm in (BASE, "shadow"):
        low, median, high = statistics.quantiles((own / host for own, host in zip(times[arm], times["host"], strict=True)), n=4)
        found[arm] = {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}
    return found


if __name__ == "__main__":
    main()
