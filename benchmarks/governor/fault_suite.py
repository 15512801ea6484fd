"""The runs of the benchmark: healthy ones, and settled ones that meet a fault or a benign event."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import healthy
from cartpole import ppo_run
from tasks import Run, Task, digits_run, imbalanced_run, likelihood_excess, mnist1d_run, regression_run, sequence_run
from traces import Record, Recorder, read_index, write_file, write_index
from training import train

from morphogen.governor.faults import KINDS, Fault, Schedule
from morphogen.state import RandomStreams, Snapshot, reset_moments

TASKS: dict[str, Task] = {
    "digits": Task(digits_run),
    "imbalance": Task(imbalanced_run, has_world=True),
    "sequence": Task(sequence_run, settle_steps=400, has_world=True),
    "regression": Task(regression_run, excess=likelihood_excess, has_world=True),
    "ppo": Task(ppo_run, settle_steps=1500),
    "mnist1d": Task(mnist1d_run, settle_steps=400, tuned=False),
}
AFTER_STEPS = 120
LEAD_STEPS = 4
"""The snapshot is taken so long before the fault: sensors that compare with the step before have one to compare with."""
TUNE_SEEDS, HELD_OUT_SEEDS = (0, 1), (5, 6, 7)
HEALTHY_SEEDS = {"tune": (10, 11), "held_out": (14, 15)}


@dataclasses.dataclass(frozen=True)
class Event:
    """Something mild that a good detector lets pass; a fault of little strength, or moments that are reset."""

    kind: str | None
    strength: float = 1.0
    steps: int = 1


WEAK: dict[str, float] = {
    "bad_batch": 10.0, "noise_batch": 3.0, "output_scale": 5.0, "weight_noise": 0.5, "layer_scale": 3.0,
    "gradient_scale": 100.0, "gradient_noise": 10.0, "lr_spike": 10.0, "lr_high": 4.0, "second_moment_scale": 1e-3,
    "momentum_scale": 10.0, "weight_growth": 1.01, "weight_drift": 0.03, "sign_flip": 0.3, "head_bias": 5.0,
    "dead_units": 0.5, "head_decay": 0.98, "weight_shrink": 0.99, "buffers_poisoned": 100.0, "buffers_drift": 1.1,
    "buffers_shrunk": 0.9,
}  # fmt: skip
"""Strengths at which faults are harder to see, and often do no harm; scored apart."""
BENIGN: dict[str, Event] = {
    "odd_batch": Event("bad_batch", 2.0),
    "mislabelled_batch": Event("label_shuffle"),
    "rate_doubled": Event("lr_high", 2.0, 5),
    "weight_noise_1_percent": Event("weight_noise", 0.01),
    "moments_reset": Event(None),
}


Job = tuple[str, Callable[[Path], list[Record]]]


def record_all(cache: Path, quick: bool) -> list[Record]:
    """Record into ``cache`` what is not there yet, and return the records of everything asked for."""
    cache.mkdir(parents=True, exist_ok=True)
    known = read_index(cache)
    records: list[Record] = []
    started = time.perf_counter()
    for file, record in (*_fault_jobs(quick), *_healthy_jobs(quick)):
        there = [old for old in known if old.file == file]
        if not there:
            there = record(cache)
            known += there
            write_index(cache, known)
            print(f"{time.perf_counter() - started:6.0f} s  {file}: {len(there)} traces", file=sys.stderr, flush=True)
        records += there
    return records


def _fault_jobs(quick: bool) -> Iterator[Job]:
    splits = {"tune": TUNE_SEEDS[: 1 if quick else None], "held_out": HELD_OUT_SEEDS[: 1 if quick else None]}
    for name, task in TASKS.items():
        for split, seeds in splits.items():
            for seed in seeds:
                suite = _Suite(name, task, seed, split if task.tuned else "never_tuned")
                yield suite.file, suite.record


def _healthy_jobs(quick: bool) -> Iterator[Job]:
    for name, kind in healthy.KINDS.items():
        for split, seeds in HEALTHY_SEEDS.items():
            for seed in seeds[: 1 if quick else None]:
                yield _healthy_job(name, kind, seed, split if kind.tuned else "never_tuned")


def _healthy_job(name: str, kind: healthy.Healthy, seed: int, split: str) -> Job:
    file = f"healthy-{name}-{seed}.npz"

    def record(cache: Path) -> list[Record]:
        run = kind.build(seed)
        recorder, before = Recorder(run), run.evaluate()
        train(run, recorder, range(kind.steps))
        after = run.evaluate()
        write_file(cache / file, {"all": recorder.observations})
        numbers: dict[str, Any] = {"eval_loss": after, "twin_loss": after, "initial_loss": before}
        role = "shift" if kind.shift_step else "healthy"
        start = kind.shift_step
        return [Record(role=role, split=split, task=name, kind=name, seed=seed, file=file, key="all", start=start, **numbers)]

    return file, record


@contextlib.contextmanager
def unfit_left_out() -> Iterator[None]:
    """Pass over a kind of fault that cannot happen to this run."""
    try:
        yield
    except ValueError as error:
        if "must fit the run" not in str(error):
            raise


class _Suite:
    """All faults and events on one settled run; each starts from the same snapshot."""

    def __init__(self, name: str, task: Task, seed: int, split: str) -> None:
        self.name, self.task, self.seed, self.split = name, task, seed, split
        self.start = task.settle_steps
        self.file = f"faults-{name}-{seed}.npz"

    def record(self, cache: Path) -> list[Record]:
        """Record the run up to the fault, its healthy twin, and every fault and event that fits it."""
        run = self.task.build(self.seed)
        recorder, initial = Recorder(run), run.evaluate()
        train(run, recorder, range(self.start - LEAD_STEPS))
        settled = run.state.capture()
        train(run, recorder, range(self.start - LEAD_STEPS, self.start))
        traces = {"before": recorder.observations, "twin": self._after(run, settled, None, None)}
        twin_loss = run.evaluate()
        same: dict[str, Any] = {"task": self.name, "split": self.split, "seed": self.seed, "file": self.file}
        same |= {"prefix": "before", "start": self.start, "twin_loss": twin_loss, "initial_loss": initial}
        records = [Record(role="healthy", kind=f"{self.name}, settled", key="twin", eval_loss=twin_loss, **same)]
        for role, kind, fault, event in self._meetings():
            weak = role == "fault" and fault is not None and fault.strength is not None
            key = f"{'weak ' if weak else ''}{role} {kind}"
            with unfit_left_out():
                traces[key] = self._after(run, settled, fault, event)
                loss = run.evaluate()
                excess = self.task.excess(loss, twin_loss) if math.isfinite(loss) else math.inf
                steps = fault.duration_steps if fault else 1
                family = KINDS[kind].family if role == "fault" else ""
                result = {"family": family, "lasted_steps": steps, "eval_loss": loss, "excess": excess, "weak": weak}
                records.append(Record(role=role, kind=kind, key=key, **same, **result))
        write_file(cache / self.file, traces)
        return records

    def _meetings(self) -> Iterator[tuple[str, str, Fault | None, Event | None]]:
        for kind in KINDS:
            yield "fault", kind, Fault(self.start, kind), None
            if kind in WEAK:
                yield "fault", kind, Fault(self.start, kind, strength=WEAK[kind]), None
        for name, event in BENIGN.items():
            fault = Fault(self.start, event.kind, event.steps, event.strength) if event.kind else None
            yield "benign", name, fault, event

    def _after(self, run: Run, settled: Snapshot, fault: Fault | None, event: Event | None) -> list[Any]:
        """Go on from the snapshot, with a fault or an event, and return what was seen from ``start`` on."""
        run.state.restore(settled)
        recorder = Recorder(run)
        train(run, recorder, range(self.start - LEAD_STEPS, self.start))
        if event is not None and event.kind is None:
            for optimizer in run.state.optimizers.values():
                reset_moments(optimizer)
        chance = RandomStreams(self.seed).torch("fault", fault.kind if fault else "none")
        schedule = Schedule([fault] if fault else [], run.state, chance)
        train(run, recorder, range(self.start, self.start + AFTER_STEPS), schedule)
        return recorder.observations[LEAD_STEPS:]
