"""Training a built task: its batches, its schedule, its newborns, what it cost, and all of it as one ``TrainingState``.

Who trains decides what is watched and when: the loop belongs to the recipe or the environment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from morphogen.growth import ContributionResult, NewbornPolicy, measure_contributions
from morphogen.growth.accounting import count_flops
from morphogen.growth.lifecycle import ACTING
from morphogen.growth.newborn import NewbornConfig, cosine
from morphogen.growth.points import HOST
from morphogen.growth.slots import SeedSlot
from morphogen.growth.walking import named_parameters
from morphogen.state import TrainingState, surgery_newborns
from morphogen.tasks.base import BuiltTask
from morphogen.tasks.data import Split
from morphogen.tasks.flops import FlopMeter
from morphogen.telemetry.events import Emit, discard

_EVALUATION_BATCH = 1000
_BLOCK_BYTES = 2**20
_known_flops: dict[Hashable, tuple[object, dict[Hashable, int]]] = {}
"""What the steps of a task cost, for all runs of this process; with what the key knows by ``id``, so that it lives."""


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


class TaskTraining:
    """A built task with all that training it changes.

    The batches of a step are a function of (streams, step, ``shuffle``): nothing to save, and whoever counts rollbacks in
    ``shuffle`` gets the data in another order after a rewind, so that a bad window is not replayed.

    Args:
        built: The task; its optimizer gets a cosine schedule to zero.
        total_steps: Length of the run.
        newborn: Optimisation of newborn seeds.
        closed_form: Compute the rate of each step anew, where torch's scheduler goes from one to the next: four times as fast,
            and rounded otherwise.
        extras: Further parts of the run.
        emit: Receives events of the state.

    Attributes:
        built: As given.
        total_steps: As given.
        cursor: Steps taken.
        newborn: Sets the learning rates of seeds.
        state: The whole run.
        flops: Of training, and of scoring seeds.
    """

    def __init__(
        self,
        built: BuiltTask,
        *,
        total_steps: int,
        newborn: NewbornConfig,
        closed_form: bool = False,
        extras: Mapping[str, Any] | None = None,
        emit: Emit = discard,
    ) -> None:
        """Make schedule, newborn policy and state."""
        self.built = built
        self.total_steps = total_steps
        self.cursor = Cursor()
        self._scheduler = None if closed_form else CosineAnnealingLR(built.optimizer, total_steps)
        self._all_alike = newborn.learning_rate == "inherit" and newborn.learning_rate_scale == 1.0 and not newborn.warmup_steps
        surgery_newborns.note_initial_rates(built.optimizer)
        self.newborn = NewbornPolicy(newborn, built.model, built.optimizer, total_steps)
        self.state = TrainingState(
            built.model,
            built.optimizer,
            self._scheduler,
            extras={"cursor": self.cursor, "newborn": self.newborn, **(extras or {})},
            newborn_options=self.newborn.options,
            emit=emit,
        )
        self.flops = FlopMeter(_flops_known_of(built))
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._epoch_batches = len(built.data.train) // built.task.batch_size
        self._block_batches = max(1, _BLOCK_BYTES // _batch_bytes(built))
        self._gathered: tuple[tuple[int, int, int], list[tuple[Tensor, Tensor]]] | None = None

    @property
    def done(self) -> bool:
        """Whether every step was taken."""
        return self.cursor.step >= self.total_steps

    def batch(self, shuffle: int = 0) -> tuple[Tensor, Tensor]:
        """Return the batch of the present step: shuffled anew each epoch, and with each ``shuffle``."""
        epoch, place = divmod(self.cursor.step, self._epoch_batches)
        block, within = divmod(place, self._block_batches)
        key = (epoch, shuffle, block)
        if self._gathered is None or self._gathered[0] != key:
            self._gathered = (key, self._gather(epoch, shuffle, block))
        return self._gathered[1][within]

    def backward(self, inputs: Tensor, targets: Tensor, structure: Hashable | None) -> tuple[Tensor, Tensor]:
        """Set all gradients for one batch, and return its loss and outputs, detached.

        Args:
            inputs: Of the batch.
            targets: Of the batch.
            structure: What :meth:`structure` returns now, to count what it costs; None leaves that to the caller.
        """
        if structure is None:
            return self._backward(inputs, targets)
        return self.flops.run(("train", structure), lambda: self._backward(inputs, targets))

    def step(self) -> None:
        """Let optimizer, schedule and newborn policy take their step; the cursor is the caller's."""
        self.built.optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()
            self.newborn.step()
            return
        factor = cosine((self.cursor.step + 1) / self.total_steps)
        if self._all_alike:
            surgery_newborns.follow_initial_rates(self.built.optimizer, factor)
            self.newborn.count()
        else:
            surgery_newborns.follow_initial_rate(self.built.optimizer, HOST, factor)
            self.newborn.step()

    def structure(self) -> Hashable:
        """Return what the cost of a step depends on, for this task: which seeds are computed, and how."""
        model = self.built.model
        slots = tuple(_structure_of(model.slot(name)) for name in model.stages())
        return slots, tuple(model.host_changes.record.changes.items())

    def step_flops(self, *, backward: bool = True) -> dict[str, int]:
        """Return owner -> FLOPs for one batch now: "host", and each slot. Shadow passes are not among them.

        Counted once for each kind of seed in a slot, not for each structure, of which there are as many as combinations.

        Args:
            backward: One training step; else one forward pass in eval mode.
        """
        model, size = self.built.model, self.built.task.batch_size
        keys = {name: (backward, *_structure_of(model.slot(name))) for name in model.stages()}
        keys[HOST] = (backward, *model.host_changes.record.changes.items())
        return self.flops.parts(keys, lambda: count_flops(model, self.built.data.train.rows(slice(size))[0], backward=backward))

    def host_gradient_norm(self) -> Tensor:
        """Return the norm of the host's gradients alone: seeds come and go, and an incubating one is not the host's fault."""
        parameters = named_parameters(self.built.model.host)
        gradients = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def measure(self, slots: Sequence[str]) -> ContributionResult:
        """Return the metric on the decision split and the contributions of ``slots``, which are noted where gates read them."""
        model = self.built.model
        measured = self.flops.run(
            ("measure", self.structure(), tuple(slots)),
            lambda: measure_contributions(model, self.decision_batches(), self.built.task.per_sample, slots),
            share=len(slots) / (len(slots) + 1),  # the intact pass only watches
        )
        for name, contribution in measured.slots.items():
            model.record_contribution(name, contribution.value, contribution.error)
        return measured

    def decision_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the decision split in order."""
        return [*_batches(self.built.data.decision)]

    def metric_on(self, split: Split) -> float:
        """Return the metric on ``split``, with the model as it is."""
        return measure_contributions(self.built.model, _batches(split), self.built.task.per_sample, ()).metric

    def _backward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        task, model = self.built.task, self.built.model
        self.built.optimizer.zero_grad()
        outputs = model(inputs)
        loss = task.loss(outputs, targets)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        if model.needs_shadow:
            with model.shadow():
                task.loss(model(inputs), targets).backward()  # pyright: ignore[reportUnknownMemberType]
        return loss.detach(), outputs.detach()

    def _gather(self, epoch: int, shuffle: int, block: int) -> list[tuple[Tensor, Tensor]]:
        """Return some successive batches of one epoch: to gather their rows at once takes a tenth of the time."""
        train, size = self.built.data.train, self.built.task.batch_size
        last = self._epoch_batches * size
        rows = slice(block * self._block_batches * size, min((block + 1) * self._block_batches * size, last))
        inputs, targets = train.rows(self._shuffled(epoch, shuffle)[rows])
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def _shuffled(self, epoch: int, shuffle: int) -> Tensor:
        """Return the order of the training samples in one epoch; the present one is kept."""
        if self._order is None or self._order[0] != (epoch, shuffle):
            train = self.built.data.train
            order = self.built.streams.numpy("data", epoch, shuffle).permutation(len(train))
            self._order = ((epoch, shuffle), torch.from_numpy(order).to(train.inputs.device))
        return self._order[1]


def _flops_known_of(built: BuiltTask) -> dict[Hashable, int]:
    """Return the counts of this task in this process: of the host it makes of its data, and what its slots may hold."""
    task, inputs = built.task, built.data.train.inputs
    data = (inputs.shape[1:], inputs.dtype, inputs.device.type, built.data.num_classes)
    key = (id(task.make_host), id(task.points), id(task.objective), task.batch_size, data)
    return _known_flops.setdefault(key, ((task.make_host, task.points, task.objective), {}))[1]


def _structure_of(slot: SeedSlot) -> tuple[Hashable, ...]:
    state, acts = slot.state, slot.state.stage in ACTING
    if slot.mix == "off":
        return slot.name, acts
    mix = "acting" if acts else slot.mix
    return slot.name, acts, mix, state.blueprint, repr(sorted(state.options.items())), state.operator, state.frozen


def _batch_bytes(built: BuiltTask) -> int:
    inputs = built.data.train.inputs
    return built.task.batch_size * inputs[0].numel() * inputs.element_size()


def _batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(split), _EVALUATION_BATCH):
        yield split.rows(slice(start, start + _EVALUATION_BATCH))
