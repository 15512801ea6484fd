"""One run of one arm of the comparison with gromo: a plain network, gromo's GrowingMLP, or a GrowableModel."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import torch
from gromo.containers.growing_mlp import GrowingMLP
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from morphogen.growth import (
    GateConfig,
    GrowableModel,
    GrowthConfig,
    NewbornConfig,
    NewbornPolicy,
    Sowing,
    Stage,
    measure_contributions,
)
from morphogen.growth.blueprints.widen import gradmax_directions
from morphogen.growth.newborn import cosine
from morphogen.state import RandomStreams, TrainingState, draw_from
from morphogen.tasks import Split, TaskData
from morphogen.tasks.flops import FlopMeter

WIDTHS = (4, 16, 32)
"""Units of the first hidden layer: at the start, after the first growth and after the second."""
SECOND = 24
BATCH, WEIGHT_DECAY = 64, 1e-2
TICKS = 100
"""Ticks of the growth clock in the steps of the scratch arm."""
LINE_SEARCH = (0.1, 0.5, 1.0)
SAMPLE = 4
"""One training example in so many is used for the peer's statistics and line search."""
PATIENCE_TICKS = 3
"""Ticks in HOLDING after which a seed that may not be fossilised is pruned, and another one germinated."""
UNGATED = GrowthConfig(gates=GateConfig(min_training_ticks=1, min_blending_ticks=1, min_contribution=-1.0))
"""The shortest life before a seed acts that has its gradients measured once; kept whatever it contributes."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What grows how.

    Attributes:
        name: In tables.
        width: Units of the first hidden layer at the start.
        peer: gromo's method, or "".
        restart: Whether the peer's learning rate starts anew at each growth.
        seeds: Blueprint, or "".
        options: Of the blueprint.
        rate: Learning rate of newborns.
        growth: Knobs of the GrowableModel.
        blend_ticks: Length of a seed's ramp.
    """

    name: str
    width: int = WIDTHS[0]
    peer: str = ""
    restart: bool = False
    seeds: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    rate: Literal["inherit", "restart", "boost"] = "inherit"
    growth: GrowthConfig = GrowthConfig()
    blend_ticks: int = 3


ARMS = (
    Arm("narrow"),
    Arm("scratch", width=WIDTHS[-1]),
    *(
        Arm(f"gromo {peer}{' restart' * restart}", peer=peer, restart=restart)
        for restart, peer in itertools.product((False, True), ("tiny", "gradmax", "zeros"))
    ),
    *(Arm(f"widen {init}", seeds="widen", options=(("init", init),)) for init in ("zero_out", "net2net", "gradmax")),
    Arm("widen ungated", seeds="widen", growth=UNGATED, blend_ticks=1),
    Arm("widen shadow", seeds="widen", growth=GrowthConfig(incubator="shadow")),
    Arm("widen boost", seeds="widen", rate="boost"),
    Arm("widen boost ungated", seeds="widen", rate="boost", growth=UNGATED, blend_ticks=1),
    Arm("mlp", seeds="mlp", options=(("expansion", 1),)),
    Arm("glu", seeds="glu", options=(("expansion", 1),)),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run came to. Accuracies in [0, 1]; ``failed`` counts seeds pruned."""

    decision: float
    test: float
    parameters: int
    flops: int
    growth_flops: int
    width: int
    failed: int
    cpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything a run depends on.

    Attributes:
        arm: What grows how.
        data: The splits.
        rate: Learning rate at the start.
        seed: Of weights, data order and seeds.
        total_steps: Where the cosine ends.
        unit_steps: Steps of the scratch arm, which time of growth and ticks are measured in.
        budget: FLOPs at which the run stops.
    """

    arm: Arm
    data: TaskData
    rate: float
    seed: int
    total_steps: int
    unit_steps: int
    budget: float = math.inf


class Run:
    """A network trained for so many steps; as it is, without growth."""

    def __init__(self, spec: Spec) -> None:
        self.arm, self.data, self.rate, self.budget = spec.arm, spec.data, spec.rate, spec.budget
        self.total_steps, self.unit_steps = spec.total_steps, spec.unit_steps
        self.streams = RandomStreams(spec.seed)
        self.meter, self.growth = FlopMeter(), FlopMeter()
        self.taken = self.failed = 0
        self.batches = self.shuffled()
        with draw_from(self.streams.torch("host")):
            sizes = (self.data.train.inputs[0].numel(), self.arm.width, SECOND, self.data.num_classes)
            self.layers = [nn.Linear(before, after) for before, after in itertools.pairwise(sizes)]
        self.model, self.optimizer, self.scheduler = self.build()

    def build(self) -> tuple[nn.Module, Optimizer, LRScheduler]:
        """Return the network with its optimizer."""
        model = self.plain()
        optimizer = AdamW(model.parameters(), self.rate, weight_decay=WEIGHT_DECAY)
        return model, optimizer, CosineAnnealingLR(optimizer, self.total_steps)

    def plain(self) -> nn.Module:
        """Return the layers as a network whose first two are one submodule."""
        first, second, head = self.layers
        pair = nn.Sequential(first, nn.SELU(), second)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), pair=pair, activation=nn.SELU(), head=head))

    def run(self) -> Outcome:
        """Train to the end."""
        started = time.process_time()
        tick_steps = max(1, self.unit_steps // TICKS)
        while self.taken < self.total_steps and self.flops < self.budget:
            self.decide()
            self.train(min(tick_steps, self.total_steps - self.taken))
        self.close()
        decision, test = (self.accuracy(split) for split in (self.data.decision, self.data.test))
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        seconds = time.process_time() - started
        return Outcome(decision, test, parameters, self.flops, self.growth.total, self.width(), self.failed, seconds)

    @property
    def flops(self) -> int:
        """What was spent so far."""
        return self.meter.total + self.growth.total

    def train(self, num_steps: int) -> None:
        """Take so many steps."""
        self.model.train()
        key = ("train", self.structure())
        for inputs, targets in itertools.islice(self.batches, num_steps):
            self.meter.run(key, lambda x=inputs, y=targets: self.backward(x, y))
            self.optimizer.step()
            self.scheduler.step()
            self.stepped()
        self.taken += num_steps

    def backward(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        if isinstance(self.model, GrowableModel) and self.model.needs_shadow:
            with self.model.shadow():
                nn.functional.cross_entropy(self.model(inputs), targets).backward()

    def shuffled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches, shuffled anew each epoch, whole ones only."""
        train = self.data.train
        for epoch in itertools.count():
            order = torch.from_numpy(self.streams.numpy("data", epoch).permutation(len(train)))
            yield from (train.rows(chosen) for chosen in order[: len(train) - len(train) % BATCH].split(BATCH))

    def accuracy(self, split: Split) -> float:
        self.model.eval()
        with torch.no_grad():
            return float(hits(self.model(split.inputs), split.targets).mean())

    def step_flops(self) -> int:
        """Return what a step costs now."""
        before = self.meter.total
        self.model.train()
        self.meter.run(("train", self.structure()), lambda: self.backward(*next(self.batches)))
        return self.meter.total - before

    def structure(self) -> Hashable:
        """Return what the cost of a step depends on."""
        return self.width()

    def width(self) -> int:
        """Return the units of the first hidden layer."""
        return self.layers[0].out_features

    def decide(self) -> None:
        """Grow if it is time."""

    def stepped(self) -> None:
        """Note that a step was taken."""

    def close(self) -> None:
        """Do what is left at the end."""


class Peer(Run):
    """A GrowingMLP, grown as gromo's tutorial does."""

    model: GrowingMLP

    def build(self) -> tuple[nn.Module, Optimizer, LRScheduler]:
        sizes = {"in_features": self.layers[0].in_features, "out_features": self.data.num_classes}
        with draw_from(self.streams.torch("peer")):  # its weights are replaced
            self.model = GrowingMLP(**sizes, hidden_size=self.arm.width, number_hidden_layers=2, device=torch.device("cpu"))
        more = SECOND - self.arm.width  # a GrowingMLP starts with layers of one width
        self.model.layers[1].layer_out_extension(torch.zeros(more, self.arm.width), torch.zeros(more))
        self.model.layers[2].layer_in_extension(torch.zeros(self.data.num_classes, more))
        with torch.no_grad():
            for theirs, ours in zip(self.model.layers, self.layers, strict=True):
                theirs.weight.copy_(ours.weight)
                theirs.bias.copy_(ours.bias)
        return self.model, *self.rebuilt(0)

    def rebuilt(self, since: int) -> tuple[Optimizer, LRScheduler]:
        """Return a new optimizer; its cosine began ``since``, at a step of the run, and leads to the run's end."""
        optimizer = AdamW(self.model.parameters(), self.rate, weight_decay=WEIGHT_DECAY)
        span, offset = max(1, self.total_steps - since), self.taken - since
        return optimizer, LambdaLR(optimizer, lambda step: cosine(min(1.0, (step + offset) / span)))

    def width(self) -> int:
        return self.model.layers[0].out_features

    def decide(self) -> None:
        for event, wanted in enumerate(WIDTHS[1:], start=1):
            units = wanted - self.width()
            if self.taken >= event * self.unit_steps // 5 and units > 0:
                self.growth.run((event, units), lambda units=units: self.grow(units))
                self.optimizer, self.scheduler = self.rebuilt(self.taken if self.arm.restart else 0)

    def grow(self, units: int) -> None:
        """Add so many units, or as many as its thresholds let pass."""
        layer = self.model.layers[1]
        if self.arm.peer == "zeros":
            with draw_from(self.streams.torch("growth", self.taken)):
                layer.create_layer_extensions(units, output_extension_init="kaiming", input_extension_init="zeros")
            self.model.currently_updated_layer_index = 0
            self.apply(1.0, units)
            return
        self.statistics()
        if self.arm.peer == "tiny":
            self.model.compute_optimal_updates(maximum_added_neurons=units)
        else:
            settings = {"use_covariance": False, "alpha_zero": True, "use_projection": False, "ignore_singular_values": True}
            self.model.compute_optimal_updates(maximum_added_neurons=units, compute_delta=False, **settings)
            layer.normalize_optimal_updates(normalization_type="gradmax_normalization")
        self.model.reset_computation()
        self.model.dummy_select_update()
        factor = min(LINE_SEARCH, key=self.extended_loss) if self.arm.peer == "tiny" else 1.0
        self.apply(factor)

    def statistics(self) -> None:
        """Gather what an update is computed from."""
        self.model.eval()
        self.model.set_growing_layers(index=0)
        self.model.init_computation()
        for start in range(0, len(self.sample), BATCH):
            inputs, targets = self.sample.rows(slice(start, start + BATCH))
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(inputs), targets, reduction="sum").backward()
            self.model.update_computation()

    def extended_loss(self, factor: float) -> float:
        """Return the loss with the extension at this scale."""
        self.model.set_scaling_factor(factor)
        with torch.no_grad():
            outputs = self.model.extended_forward(self.sample.inputs)
            return float(nn.functional.cross_entropy(outputs, self.sample.targets))

    @property
    def sample(self) -> Split:
        """Training examples of which statistics are made."""
        return self.data.train.part(slice(len(self.data.train) // SAMPLE))

    def apply(self, factor: float, units: int | None = None) -> None:
        self.model.set_growing_layers(index=0)
        self.model.set_scaling_factor(factor)
        self.model.currently_updated_layer_index = 0
        self.model.apply_change(extension_size=units)


class Seeds(Run):
    """A GrowableModel with two slots at the pair of layers, one for each growth."""

    model: GrowableModel

    def build(self) -> tuple[nn.Module, Optimizer, LRScheduler]:
        example = self.data.train.inputs[:2]
        points = {"first": "pair", "second": "pair"}
        self.model = GrowableModel(self.plain(), points, example, config=self.arm.growth, seed=self.streams.integer("growth"))
        groups = [{"params": [p for _, p in owned], "owner": owner} for owner, owned in self.model.owners().items()]
        optimizer = AdamW(groups, self.rate, weight_decay=WEIGHT_DECAY)
        scheduler = CosineAnnealingLR(optimizer, self.total_steps)
        config = NewbornConfig(learning_rate=self.arm.rate)
        self.newborn = NewbornPolicy(config, self.model, optimizer, self.total_steps)
        extras = {"newborn": self.newborn}
        self.state = TrainingState(self.model, optimizer, scheduler, extras=extras, newborn_options=self.newborn.options)
        self.done: set[str] = set()
        return self.model, optimizer, scheduler

    def structure(self) -> Hashable:
        slots = [self.model.slot(name) for name in self.model.stages()]
        return self.width(), *((slot.mix, slot.state.blueprint) for slot in slots)

    def stepped(self) -> None:
        self.newborn.step()

    def decide(self) -> None:
        if self.taken:
            self.model.sense()
            self.model.tick()
        for event, (name, stage) in enumerate(self.model.stages().items(), start=1):
            if name in self.done:
                continue
            if stage is Stage.DORMANT and self.taken >= event * self.unit_steps // 5:
                options = self.options(WIDTHS[event] - WIDTHS[event - 1])
                self.model.germinate(name, Sowing(blueprint=self.arm.seeds, options=options, blend_ticks=self.arm.blend_ticks))
                self.model.advance(name)
            elif stage in (Stage.TRAINING, Stage.BLENDING):
                self.model.advance(name)
            elif stage is Stage.HOLDING:
                self.judge(name)
        if self.arm.rate == "inherit":
            self.merge()

    def judge(self, name: str) -> None:
        """Make a seed permanent if it is of use; prune it if it was not for a while."""
        split, measured = self.data.decision, measure_contributions
        found = self.growth.run(
            ("judge", self.structure()), lambda: measured(self.model, [(split.inputs, split.targets)], hits, [name])
        ).slots[name]
        self.model.record_contribution(name, found.value, found.error)
        if self.model.fossilize(name).passed:
            self.done.add(name)
        elif self.model.slot(name).state.ticks_in_stage >= PATIENCE_TICKS:
            self.model.prune(name, reason="of no use")
            self.failed += 1

    def options(self, units: int) -> dict[str, Any]:
        """Return the options of the next seed."""
        options = dict(self.arm.options)
        if self.arm.seeds != "widen":
            return options
        options["units"] = units
        if options.get("init") == "gradmax":
            pair = self.model.host.get_submodule("pair")
            options["directions"] = self.growth.run(
                ("directions", self.structure()), lambda: gradmax_directions(pair, self.one_loss, units=units)
            )
        return options

    def one_loss(self) -> Tensor:
        """Return the loss on as many training examples as the peer's statistics are made of."""
        inputs, targets = self.data.train.rows(slice(len(self.data.train) // SAMPLE))
        return nn.functional.cross_entropy(self.model(inputs), targets)

    def close(self) -> None:
        self.merge()

    def merge(self) -> None:
        """Fold fossils into the host; one behind another seed has to wait for that one."""
        for name, stage in self.model.stages().items():
            if stage is Stage.FOSSILIZED and self.arm.seeds == "widen":
                self.model.merge(name)
            elif self.model.slot(name).state.has_seed:
                break


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 for each sample that is classified rightly, else 0."""
    return (outputs.argmax(-1) == targets).float()


def make(spec: Spec) -> Run:
    """Return the run that a spec describes."""
    kind = Peer if spec.arm.peer else Seeds if spec.arm.seeds else Run
    return kind(spec)
