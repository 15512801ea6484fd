"""One episode: a task trained from start to end, with somebody deciding about its slots.

    for each tick:   execute the action
                     train ``tick_steps`` steps; the governor judges their mean loss before the last of them is taken
                     sense gradients, tick the clock, measure the decision split and what every acting seed contributes

A run that the governor rewinds is over at that tick. Everything depends on (task, config, seed, episode, actions) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from morphogen import control
from morphogen.control import Op
from morphogen.envs.chance import Chance
from morphogen.envs.choices import Choices, Menu
from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.frames import LAGS, Frames
from morphogen.envs.slot_numbers import write_slots
from morphogen.errors import EpisodeFailed
from morphogen.governor import Action, Governor, Verdict
from morphogen.governor.faults import Fault, Injections, inject
from morphogen.growth import Contribution, walking
from morphogen.growth.ablation import evaluated
from morphogen.growth.accounting import count_parameters
from morphogen.growth.lifecycle import ACTING
from morphogen.growth.points import HOST
from morphogen.state import RandomStreams
from morphogen.state.inventory import all_finite
from morphogen.tasks import Task
from morphogen.tasks.training import TaskTraining

_NO_FAULTS = contextlib.nullcontext(Injections(()))


@dataclasses.dataclass(frozen=True)
class Measured:
    """The decision split at one moment.

    Attributes:
        metric: Of the whole model.
        error: Its standard error.
        all_off: With every acting seed at alpha 0.
        slots: Contribution of each acting seed.
    """

    metric: float
    error: float
    all_off: float
    slots: dict[str, Contribution]


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a network is made of, as long as no seed comes or goes.

    Attributes:
        seeds: For each slot, how many seeds it has had, and whether there is one.
        host_parameters: How many.
        seed_parameters: Slot -> how many.
        modules: All of them.
    """

    seeds: tuple[tuple[int, bool], ...]
    host_parameters: int
    seed_parameters: dict[str, int]
    modules: tuple[nn.Module, ...]


@dataclasses.dataclass
class Memory:
    """What an episode remembers beside the run itself; plain numbers, part of its state."""

    metrics: list[float] = dataclasses.field(default_factory=list[float])
    births: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    peaks: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    loss: float = math.nan
    last_op: int = int(Op.WAIT)
    last_slot: int = -1
    skipped: int = 0
    quarantined: int = 0
    rolled_back: bool = False
    reason: str = ""  # why
    tick: int = 0


class Episode:
    """A task trained from start to end.

    Args:
        task: What to train on.
        config: How long, and under which governor.
        seed: Of the environment.
        number: Of the episode in the environment.
        inject: Faults to put into the run, written ``kind@step``.

    Attributes:
        menu: What choices mean.
        training: The run.
        governor: Its watchdog.
        memory: What else evolves.
    """

    @torch.enable_grad()  # whoever plays may have turned it off: PPO does while it acts
    def __init__(self, task: Task, config: GrowthEnvConfig, seed: int, number: int, inject: Sequence[str] = ()) -> None:
        """Build the run and measure it once, untrained."""
        streams = RandomStreams(seed).child("episode", number)
        self.task, self.config, self.seed, self.number = task, config, seed, number
        built = task.build(config.device, config.slots, seed=streams.integer("run"), fused=True, config=config.growth)
        self.model = built.model.train()
        self.menu = menu_of(task, config)
        self.total_steps = config.total_steps or task.total_steps
        self.tick_steps = config.tick_steps or task.tick_steps
        self.training = TaskTraining(built, total_steps=self.total_steps, newborn=config.newborn, closed_form=True)
        self.governor = Governor(self.training.state, config.governor)
        self._judges_outputs = self.total_ticks >= config.governor.collapse.min_steps  # else nothing is ever made of them
        self._faults = [Fault.parse(text) for text in inject]
        self._fault_streams = streams.child("fault")
        self._chance = Chance(streams.integer("chance"), built.data.train.inputs.device)
        self._host_step_flops = max(1, self.training.step_flops()[HOST])
        self._seen: Structure | None = None
        self.memory = Memory()
        with self._chance.at_work():
            self._measured = self._measure()
        self.memory.metrics.append(self._measured.metric)

    @property
    def total_ticks(self) -> int:
        """Decisions of an episode."""
        return -(-self.total_steps // self.tick_steps)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to decide."""
        return self.memory.rolled_back or self.memory.tick >= self.total_ticks

    @torch.enable_grad()
    def step(self, choices: Choices) -> None:
        """Execute an action and train up to the next decision.

        Raises:
            SlotError: The action was masked; nothing was changed.
            EpisodeFailed: What was trained is of no use any more.
        """
        with self._chance.at_work():
            self._step(choices)

    def _step(self, choices: Choices) -> None:
        action, memory = self.menu.action(choices), self.memory
        control.execute(self.model, action)
        memory.last_op = int(action.op)
        memory.last_slot = -1 if action.slot is None else self.menu.slots.index(action.slot)
        if action.op is Op.GERMINATE and action.slot is not None:
            memory.births[action.slot] = self._measured.metric
            memory.peaks.pop(action.slot, None)
        self._train_tick()
        if not memory.rolled_back:
            self._check_finite()
        self.model.sense()
        self.model.tick()
        memory.tick += 1
        self._measured = self._measure()
        memory.metrics.append(self._measured.metric)

    def test_metric(self) -> float:
        """Return the metric on the test split."""
        return self.training.metric_on(self.training.built.data.test)

    def write(self, frames: Frames, row: int) -> None:
        """Write what is known now into one row of ``frames``."""
        memory, measured, structure = self.memory, self._measured, self._structure()
        numbers = {
            "episode": self.number,
            "tick": memory.tick,
            "total_ticks": self.total_ticks,
            "loss": memory.loss,
            "metric": measured.metric,
            "metric_error": measured.error,
            "start_metric": memory.metrics[0],
            "best_metric": max(memory.metrics),
            "all_off_metric": measured.all_off,
            "host_parameters": structure.host_parameters,
            "parameters": structure.host_parameters + sum(structure.seed_parameters.values()),
            "relative_flops": self._relative_flops(),
            "skipped": memory.skipped,
            "quarantined": memory.quarantined,
            "rolled_back": float(memory.rolled_back),
            "last_op": memory.last_op,
            "last_slot": memory.last_slot,
            "test_metric": self.test_metric() if self.over and self.config.measure_test else math.nan,
        }
        numbers |= zip(LAGS, memory.metrics[-2::-1], strict=False)
        frames.write_run(row, numbers)
        births, peaks = memory.births, memory.peaks
        write_slots(frames, row, self.model, self.menu, births=births, peaks=peaks, parameters=structure.seed_parameters)

    # -- training and measuring -------------------------------------------------------------------------------------

    def _train_tick(self) -> None:
        """Train up to the next decision, and note what the governor did."""
        training, memory, skipped = self.training, self.memory, self.governor.skipped_steps
        cursor = training.cursor
        # A shadow pass is counted as it is run; all else adds up.
        structure = training.structure() if self.model.needs_shadow else None
        step_flops = 0 if structure else sum(training.step_flops().values())
        last = min(self.tick_steps, self.total_steps - cursor.step) - 1
        losses: list[Tensor] = []
        memory.quarantined = 0
        for place in range(last + 1):
            with self._faults_at_work() if self._faults else _NO_FAULTS as faults:
                inputs, targets = training.batch()
                labels = faults.labels(targets)
                loss, outputs = training.backward(inputs, labels, structure)
                training.flops.total += step_flops
                losses.append(loss)
                verdict = self._judged(losses, outputs, labels) if place == last else None
                if verdict is not None and _is_fatal(verdict):
                    memory.rolled_back, memory.reason = True, verdict.reason
                    break
                if verdict is None or verdict.proceed:
                    training.step()
            cursor.step += 1
        memory.skipped = self.governor.skipped_steps - skipped

    def _judged(self, losses: list[Tensor], outputs: Tensor, labels: Tensor) -> Verdict:
        mean = torch.stack(losses).mean()
        norm, step = self.training.host_gradient_norm(), self.training.cursor.step
        logits = outputs if self._judges_outputs else None
        verdict = self.governor.observe(mean, grad_norm=norm, logits=logits, labels=labels, step=step)
        self.memory.loss = float(mean)
        self.memory.quarantined = len(verdict.quarantined)
        return verdict

    def _check_finite(self) -> None:
        """Look at what acts on the outputs: the governor looks before steps, and sees what the last one did a tick late."""
        seeds = (slot.seed for slot in map(self.model.slot, self.model.stages()) if slot.state.stage in ACTING)
        modules = [self.model.host, *(seed for seed in seeds if seed is not None)]
        tensors = [tensor.detach() for module in modules for tensor in walking.tensors(module) if tensor.is_floating_point()]
        if not all_finite(tensors):
            largest = get_total_norm(tensors, norm_type=math.inf)
            raise EpisodeFailed(f"a weight or buffer is {float(largest)} after step {self.training.cursor.step}")

    def _measure(self) -> Measured:
        """Measure the whole model, and with seeds off: each alone, and all at once; gates are told."""
        model, training = self.model, self.training
        acting = [name for name, stage in model.stages().items() if stage in ACTING]
        rows = [frozenset[str](), *(frozenset([name]) for name in acting)]
        if len(acting) > 1:
            rows.append(frozenset(acting))
        with self._evaluating():
            values_RN = evaluated(model, training.decision_batches(), self.task.per_sample, rows)
        count = values_RN.shape[1]
        if acting:  # the intact pass only watches
            forward = sum(training.step_flops(backward=False).values())
            training.flops.total += (len(rows) - 1) * forward * count // self.task.batch_size
        difference_RN = values_RN[:1] - values_RN
        statistics = torch.stack([values_RN.mean(1), values_RN.std(1), difference_RN.std(1)]) if count > 1 else None
        if statistics is None:
            means, stds, errors = values_RN.mean(1).tolist(), [math.inf] * len(rows), [math.inf] * len(rows)
        else:
            means, stds, errors = statistics.tolist()
        root = math.sqrt(count)
        slots = {name: Contribution(means[0] - means[row], errors[row] / root) for row, name in enumerate(acting, start=1)}
        for name, contribution in slots.items():
            model.record_contribution(name, contribution.value, contribution.error)
            self.memory.peaks[name] = max(contribution.value, self.memory.peaks.get(name, -math.inf))
        return Measured(means[0], stds[0] / root, means[-1], slots)

    def _relative_flops(self) -> float:
        """Return FLOPs so far over those of the host alone, at least those of one step."""
        return self.training.flops.total / (self._host_step_flops * max(1, self.training.cursor.step))

    @contextlib.contextmanager
    def _evaluating(self) -> Generator[None]:
        """Within the block the model is in eval mode."""
        modules = self._structure().modules
        for module in modules:  # modules look through their tables at each assignment: five times as slow
            vars(module)["training"] = False
        try:
            yield
        finally:
            for module in modules:
                vars(module)["training"] = True

    def _structure(self) -> Structure:
        """Return the structure of the model, looked at anew where a seed has come or gone."""
        states = [slot.state for slot in map(self.model.slot, self.model.stages())]
        seeds = tuple((state.germination, state.has_seed) for state in states)
        if self._seen is None or self._seen.seeds != seeds:
            parameters = count_parameters(self.model)
            self._seen = Structure(seeds, parameters.pop(HOST), parameters, tuple(self.model.modules()))
        return self._seen

    @contextlib.contextmanager
    def _faults_at_work(self) -> Generator[Injections]:
        """Put the faults due in this step into it."""
        step = self.training.cursor.step
        due = [fault for fault in self._faults if fault.is_at_work(step)]
        if not due:
            yield Injections(())
            return
        try:
            with contextlib.ExitStack() as stack:
                at_work = (inject(f.kind, self.training.state, generator=self._fault_streams.torch(step)) for f in due)
                yield Injections(tuple(stack.enter_context(injection) for injection in at_work))
        except ValueError as error:  # it does not fit this network, or it was too much for whoever met it
            raise EpisodeFailed(f"with {', '.join(map(str, due))} injected: {error}") from error

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves, as plain data: the files of a checkpoint, and the memory."""
        with tempfile.TemporaryDirectory() as folder, self._chance.at_work():
            self.governor.save(Path(folder) / "governor")
            self.training.state.save(Path(folder) / "run")
            files = _read_files(Path(folder))
        return {
            "seed": self.seed,
            "number": self.number,
            "inject": [f"{fault.kind}@{fault.step}" for fault in self._faults],
            "files": files,
            "memory": dataclasses.asdict(self.memory),
            "measured": dataclasses.asdict(self._measured),
            "flops": self.training.flops.total,
        }

    @classmethod
    def from_state(cls, task: Task, config: GrowthEnvConfig, state: dict[str, Any]) -> Episode:
        """Return the episode that :meth:`state_dict` was asked of.

        Raises:
            CheckpointError: It does not fit the task or the config.
        """
        episode = cls(task, config, state["seed"], state["number"], state["inject"])
        with tempfile.TemporaryDirectory() as folder, episode._chance.at_work():
            _write_files(Path(folder), state["files"])
            episode.training.state.load(Path(folder) / "run")
            episode.governor.load(Path(folder) / "governor")
        episode.memory = Memory(**state["memory"])
        measured = dict(state["measured"])
        slots = {name: Contribution(**numbers) for name, numbers in measured.pop("slots").items()}
        episode._measured = Measured(**measured, slots=slots)
        episode.training.flops.total = state["flops"]
        return episode


def _is_fatal(verdict: Verdict) -> bool:
    """Whether a run was rewound, or stopped before a step that is not finite: what came before the step is sound then."""
    stopped = verdict.action is Action.SKIP and any(finding.non_finite for finding in verdict.findings)
    return stopped or verdict.rollback is not None


def menu_of(task: Task, config: GrowthEnvConfig) -> Menu:
    """Return what choices mean in ``task``.

    Raises:
        ValueError: The task does not fit the places of the layout.
    """
    return Menu(tuple(task.points) if config.slots is None else config.slots, task.blueprints, config.layout)


def _read_files(folder: Path) -> dict[str, Any]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in paths}


def _write_files(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.tobytes())
