"""One run of one arm of the comparison: what is trained, how long, and at which learning rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphogen import tasks
from morphogen.errors import TrainingCollapsed
from morphogen.growth import Sowing, Stage
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.config import Arm, GrowConfig
from morphogen.tasks import Task, TaskData
from morphogen.tasks.hosts import conv1d_host
from morphogen.telemetry.events import Event

POLICIES = ("heuristic", "periodic", "random")
"""Arms that grow, by the policy that decides."""
CONTROLS = ("static", "full", "full_equal_flops", "static_final")
ARMS = (*CONTROLS, *POLICIES)


def _wide_mnist1d(data: TaskData) -> nn.Module:
    """Three convolutions of 27 channels, 4,951 parameters: about the size of that of MNIST-1D's authors."""
    return conv1d_host((27, 27, 27), data.num_classes, kernels=(5, 3, 3))


WIDE = {"mnist1d": _wide_mnist1d}
"""Plain networks of the size that one would choose without growth, where the literature names one."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything a run depends on.

    Attributes:
        task: Name of the task.
        arm: One of ``ARMS``, or "wide" or "wide_equal_flops".
        learning_rate: At the start.
        seed: Of host, data order and seeds.
        total_steps: Length of the run.
        fossils: Slot -> what is built in from the start, for "static_final".
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    total_steps: int
    fossils: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Text that is equal for equal runs."""
        return repr(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    Attributes:
        test: Metric on the test split.
        decision: Metric on the decision split.
        parameters: At the end.
        flops: Of training, failed seeds and their scoring included.
        fossils: Slot -> blueprint of what was kept.
        rollbacks: Rewinds by the governor.
        collapsed: The governor gave up; the rest is of the network at the last state that had proved good.
    """

    test: float
    decision: float
    parameters: int
    flops: int
    fossils: tuple[tuple[str, str], ...]
    rollbacks: int
    collapsed: bool = False


def run(spec: Spec) -> Outcome:
    """Train one arm from start to end, in one thread."""
    torch.set_num_threads(1)
    task = dataclasses.replace(tasks.get(spec.task), learning_rate=spec.learning_rate)
    kind: Arm = "grown" if spec.arm in POLICIES else "static"
    if spec.arm.startswith("full"):
        kind = "reference"
    elif spec.arm == "static_final":
        kind, task = "reference", dataclasses.replace(task, reference=_sowings(task, dict(spec.fossils)))
    elif spec.arm.startswith("wide"):
        task = dataclasses.replace(task, make_host=WIDE[spec.task])
    policy = spec.arm if spec.arm in POLICIES else "wait"
    config = GrowConfig(task=spec.task, policy=policy, seed=spec.seed, repeats=1, total_steps=spec.total_steps)
    arm = ArmRun(config, kind, 0, _ignore, task=task)
    arm.start()
    collapsed = False
    while not (arm.done or collapsed):
        try:
            arm.run_tick()
        except TrainingCollapsed:
            collapsed = True
    result = arm.finish()
    return Outcome(
        test=result.test_metric,
        decision=result.decision_metric,
        parameters=result.parameters,
        flops=result.train_flops,
        fossils=_kept(arm),
        rollbacks=result.rollbacks,
        collapsed=collapsed,
    )


def _kept(arm: ArmRun) -> tuple[tuple[str, str], ...]:
    """Return slot -> blueprint of the seeds that act at the end, whether fossilised in time or not."""
    slots = {name: arm.model.slot(name).state for name in arm.model.stages()}
    acting = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    return tuple((name, state.blueprint or "") for name, state in slots.items() if state.stage in acting)


def _sowings(task: Task, fossils: dict[str, str]) -> dict[str, Sowing]:
    known = {sowing.blueprint: sowing for sowing in task.blueprints}
    return {slot: known[blueprint] for slot, blueprint in fossils.items()}


def _ignore(event: Event) -> Any:
    """Events are of no use here."""
