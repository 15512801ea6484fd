"""A task: data, host, loss, metric, growth points, optimizer, and the full-size reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, GrowthConfig, GrowthPoint, Sowing, with_fossils
from morphogen.state import RandomStreams, draw_from
from morphogen.tasks.data import TaskData
from morphogen.tasks.devices import resolve_device
from morphogen.tasks.objectives import Classification, Objective
from morphogen.tasks.sources import Source
from morphogen.telemetry.events import Emit, discard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One problem to train on, as plain data and functions. Everything is built under the caller's seed.

    Attributes:
        name: What ``tasks.get`` is given.
        summary: One line.
        load: Returns the three splits, always the same.
        make_host: Builds the small host for the data, which knows the number of classes or symbols.
        points: Growth points in the order of actions: slot -> submodule.
        blueprints: What may be sown, best first.
        reference: Slot -> blueprint of the full-size reference: all growth built in from the start.
        batch_size: Training samples in a step.
        total_steps: Length of a run.
        tick_steps: Training steps between decisions.
        learning_rate: Of AdamW at the start; a cosine takes it to zero over the run.
        weight_decay: Of AdamW, for host and seeds alike.
        objective: Loss and metric.
        source: Files that :attr:`load` needs; None for data that is generated or comes with a dependency.
    """

    name: str
    summary: str
    load: Callable[[], TaskData]
    make_host: Callable[[TaskData], nn.Module]
    points: Mapping[str, GrowthPoint]
    blueprints: tuple[Sowing, ...]
    reference: Mapping[str, Sowing]
    batch_size: int
    total_steps: int
    tick_steps: int
    learning_rate: float
    weight_decay: float
    objective: Objective = Classification()
    source: Source | None = None

    @property
    def metric_name(self) -> str:
        """What the objective calls its metric."""
        return self.objective.metric_name

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar that training minimises."""
        return self.objective.loss(outputs, targets)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one value for each sample, shape (N,), larger for better outputs; the metric is its mean."""
        return self.objective.per_sample(outputs, targets)

    def build(
        self,
        device: torch.device | str = "cpu",
        slots: Sequence[str] | None = None,
        *,
        seed: int = 0,
        full_size: bool = False,
        fused: bool | None = None,
        config: GrowthConfig | None = None,
        emit: Emit = discard,
    ) -> BuiltTask:
        """Return data, model and optimizer, ready to train.

        Args:
            device: Checked before anything is built.
            slots: Which growth points to use, in this order; by default all.
            seed: Root of the run's random streams; host and data order depend on it, the splits do not.
            full_size: Build the reference's growth in from the start, fossilised.
            fused: As in ``torch.optim.AdamW``: faster, and otherwise rounded.
            config: Knobs of growth.
            emit: Receives the model's events.

        Raises:
            ValueError: The device is not here; ``slots`` is empty, names a point twice or an unknown one.
        """
        where = resolve_device(device)
        chosen = self._chosen(slots)
        streams = RandomStreams(seed).child(self.name)
        data = self.load().to(where)
        with draw_from(streams.torch("host")):
            host = self.make_host(data)
        model = GrowableModel(
            host.to(where),
            {name: self.points[name] for name in chosen},
            data.train.rows(slice(2))[0],
            config=config,
            seed=streams.integer("growth"),
            emit=emit,
        )
        if full_size:
            fossils = {name: self.reference[name] for name in chosen if name in self.reference}
            model.plan_topology(with_fossils(model.topology(), fossils)).commit()
        groups = [{"params": [p for _, p in owned], "owner": owner} for owner, owned in model.owners().items()]
        optimizer = torch.optim.AdamW(groups, self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        return BuiltTask(self, data, model, optimizer, streams)

    def _chosen(self, slots: Sequence[str] | None) -> list[str]:
        chosen = list(self.points) if slots is None else list(slots)
        unknown = [name for name in chosen if name not in self.points]
        if not chosen or unknown or len(set(chosen)) != len(chosen):
            raise ValueError(
                f"`slots` must name growth points of {self.name}, each once, at least one of {', '.join(self.points)}; "
                f"got {chosen}. Leave it out to use all."
            )
        return chosen


@dataclasses.dataclass(frozen=True)
class BuiltTask:
    """A task made concrete: what a recipe trains.

    Attributes:
        task: What was built.
        data: The splits, on the device.
        model: The host with its slots.
        optimizer: AdamW over everything trainable.
        streams: The run's random streams.
    """

    task: Task
    data: TaskData
    model: GrowableModel
    optimizer: torch.optim.Optimizer
    streams: RandomStreams
