"""A small run that never trained: real events, through the real bus and sink, with the shape of what a recipe emits."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from morphogen.governor.events import Rollback, StepSkipped
from morphogen.governor.findings import Finding
from morphogen.growth.events import GateRefused, StageChanged
from morphogen.growth.lifecycle import Stage
from morphogen.telemetry.bus import EventBus
from morphogen.telemetry.events import Emit, Event, Json
from morphogen.telemetry.jsonl import JsonlSink

STEPS_PER_TICK = 20
RATE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    task: str
    policy: str
    command: str
    config: dict[str, Json]
    versions: dict[str, Json]
    repeats: int
    metric_name: str = "accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmStarted(Event):
    parameters: int
    slots: tuple[str, ...]
    total_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TickMeasured(Event):
    tick: int
    train_loss: float | None
    metric: float | None
    parameters: int
    stages: dict[str, str]
    alphas: dict[str, float]
    learning_rate: float
    governor: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided(Event):
    tick: int
    op: str
    slot: str
    blueprint: str | None
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultInjected(Event):
    fault: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmFinished(Event):
    test_metric: float
    decision_metric: float
    parameters: int
    train_flops: float
    wall_seconds: float
    rollbacks: int
    skipped_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    rows: tuple[dict[str, Json], ...]
    paired_difference: dict[str, Json] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the made-up run does. ``rewinding`` is the clock after a rollback: back at the snapshot, or going on."""

    slots: tuple[str, ...] = ("early", "late")
    repeats: int = 3
    ticks: int = 40
    with_faults: bool = True
    rewinding: bool = True
    difference: tuple[float, float, float] | None = (0.031, 0.012, 0.05)
    finishes: bool = True


_LIVES = {
    0: ((3, "germinated"), (4, "training"), (10, "blending"), (16, "holding"), (22, "fossilized")),
    1: (
        (6, "germinated"), (7, "training"), (12, "blending"), (15, "pruned"), (16, "embargoed"), (20, "resetting"),
        (21, "dormant"), (24, "germinated"), (25, "training"), (31, "blending"), (36, "holding"), (39, "fossilized"),
    ),
}  # fmt: skip
_BLUEPRINTS = ("conv3x3", "squeeze_excite")
_PARAMETERS = {"static": 1_210, "reference": 6_840, "grown": 1_210}
_CEILINGS = {"static": 0.90, "reference": 0.955, "grown": 0.94}


class _Arm:
    """One arm in one repeat, tick by tick."""

    def __init__(self, plan: Plan, arm: str, repeat: int, bus: EventBus) -> None:
        self.plan, self.arm, self.repeat = plan, arm, repeat
        self.train_step = 0
        self.draw = random.Random(f"{arm} {repeat}")
        self.emit: Emit = bus.scoped(lambda: {"arm": arm, "repeat": repeat, "train_step": self.train_step})
        self.slots = plan.slots if arm == "grown" else ()
        self.stages = dict.fromkeys(self.slots, "dormant")
        self.since = dict.fromkeys(self.slots, 0)
        self.parameters = _PARAMETERS[arm]

    def run(self) -> dict[str, Json]:
        total = self.plan.ticks * STEPS_PER_TICK
        self.emit(ArmStarted(parameters=self.parameters, slots=self.slots, total_steps=total))
        for tick in range(1, self.plan.ticks + 1):
            if self.arm == "grown" and self.plan.with_faults and tick == self.plan.ticks // 2 and self.repeat == 0:
                self.fail()
            self.train_step += STEPS_PER_TICK
            self.grow(tick)
            self.measure(tick)
        test = _CEILINGS[self.arm] + self.draw.gauss(0, 0.006)
        flops = self.parameters * total * 6.0 * 64
        self.emit(
            ArmFinished(
                test_metric=test,
                decision_metric=test + 0.004,
                parameters=self.parameters,
                train_flops=flops,
                wall_seconds=7.5,
                rollbacks=0,
                skipped_steps=0,
            )  # fmt: skip
        )
        return {"mean": test, "parameters": self.parameters, "train_flops": flops}

    def fail(self) -> None:
        """A NaN that is skipped, then a spike that makes the run go back three ticks."""
        self.train_step += 5
        self.emit(FaultInjected(fault="nan", detail="loss of one batch"))
        finding = Finding(detector="non_finite", value=float("nan"), threshold=0.0, window_steps=1, message="loss is nan")
        self.emit(StepSkipped(step=self.train_step, reason="non-finite loss", findings=(finding,)))
        self.train_step += 8
        self.emit(FaultInjected(fault="spike", detail="weights times 8"))
        self.train_step += 4
        start = self.train_step
        finding = Finding(detector="explosion", value=41.25, threshold=6.0, window_steps=50, message="41 MADs above")
        end = start - 60
        self.train_step = end if self.plan.rewinding else start
        parts = ("model", "optimizer", "scheduler", "generators")
        self.emit(
            Rollback(
                step=start,
                from_step=start,
                to_step=end,
                reason="loss exploded",
                findings=(finding,),
                parts=parts,
                optimizer_strategy="restore",
                learning_rate_factor=0.5,
                penalty=0.25,
                count=1,
            )  # fmt: skip
        )

    def grow(self, tick: int) -> None:
        for index, slot in enumerate(self.slots):
            stage = dict(_LIVES.get(index, ())).get(tick)
            if stage is None:
                self.emit(Decided(tick=tick, op="wait", slot=slot, blueprint=None, reason="nothing to do"))
                if self.stages[slot] == "training" and tick % 2:
                    reasons = (f"gradient share {tick / 100} below 0.50", "4 of 5 ticks trained")
                    self.emit(GateRefused(tick=tick, slot=slot, gate=Stage.BLENDING, reasons=reasons))
            else:
                self.change(tick, slot, stage)

    def change(self, tick: int, slot: str, stage: str) -> None:
        is_birth = stage == "germinated"
        op = {"germinated": "germinate", "pruned": "prune", "fossilized": "fossilize"}.get(stage, "advance")
        blueprint = _BLUEPRINTS[(self.repeat + tick) % 2] if is_birth else None
        reason = "contribution -0.8 points" if stage == "pruned" else "metric has levelled"
        self.emit(Decided(tick=tick, op=op, slot=slot, blueprint=blueprint, reason=reason))
        spent = tick - self.since[slot]
        change = StageChanged(
            tick=tick, slot=slot, previous=Stage[self.stages[slot].upper()], stage=Stage[stage.upper()],
            ticks_in_previous=spent, reason=f"{op} asked",
            blueprint=blueprint,
        )  # fmt: skip
        self.emit(change)
        self.stages[slot], self.since[slot] = stage, tick
        self.parameters += {"germinated": 930, "pruned": -930}.get(stage, 0)

    def measure(self, tick: int) -> None:
        share = self.train_step / (self.plan.ticks * STEPS_PER_TICK)
        metric = 0.1 + (_CEILINGS[self.arm] - 0.1) * (1 - 2.0 ** (-9 * share)) + self.draw.gauss(0, 0.008)
        alphas = {
            slot: {"blending": min((tick - self.since[slot] + 1) / 6, 1.0), "holding": 1.0, "fossilized": 1.0}.get(stage, 0.0)
            for slot, stage in self.stages.items()
        }
        self.emit(
            TickMeasured(
                tick=tick,
                train_loss=2.3 * 2.0 ** (-4 * share) + self.draw.random() * 0.05,
                metric=None if tick == 1 else metric,
                parameters=self.parameters,
                stages=dict(self.stages),
                alphas=alphas,
                learning_rate=RATE,
                governor="healthy",
            )  # fmt: skip
        )


def _ticking() -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) * 0.05


def play(path: Path, plan: Plan) -> Path:
    """Write the log of ``plan`` into the directory ``path`` and return it."""
    bus = EventBus([JsonlSink(path / "events.jsonl")], clock=_ticking())
    bus.emit(
        RunStarted(
            task="digits",
            policy="heuristic",
            command="morphogen grow --task digits --seed 7 --repeats 3",
            config={"task": "digits", "seed": 7, "governor": {"check_every": 8}},
            versions={"torch": "2.13.0"},
            repeats=plan.repeats,
        )  # fmt: skip
    )
    rows: list[dict[str, Json]] = []
    for arm in ("static", "reference", "grown"):
        ends = [_Arm(plan, arm, repeat, bus).run() for repeat in range(plan.repeats)]
        mean = sum(float(str(end["mean"])) for end in ends) / len(ends)
        rows.append({
            **ends[0], "arm": arm, "repeats": plan.repeats, "mean": mean, "low": mean - 0.008, "high": mean + 0.008,
            "wall_seconds": 22.5, "rollbacks": int(arm == "grown" and plan.with_faults),
        })  # fmt: skip
    if plan.finishes:
        paired: dict[str, Json] | None = None
        if plan.difference is not None:
            paired = {**dict(zip(("mean", "low", "high"), plan.difference, strict=True)), "repeats": plan.repeats}
        bus.emit(RunFinished(rows=tuple(rows), paired_difference=paired))
    bus.close()
    return path


@pytest.fixture
def played(tmp_path: Path) -> Callable[..., Path]:
    """Make the run directory of a plan: ``played(repeats=2, with_faults=False)``."""
    count = itertools.count()

    def make(**changes: object) -> Path:
        directory = tmp_path / f"run{next(count)}"
        directory.mkdir()
        return play(directory, dataclasses.replace(Plan(), **changes))

    return make
