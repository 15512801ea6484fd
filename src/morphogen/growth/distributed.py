"""One growing model in several processes: the same structure everywhere, and one gradient for its seeds.

``DistributedDataParallel`` knows the parameters that are there when it is made. Seeds are born and removed later, so it is
told to leave them alone (``seed_parameters``), and their gradients are averaged here: at the end of each backward pass that
reaches a seed, by one all-reduce of all of them in the order of the slots. An average of what was averaged before is that
average, so gradients may be accumulated over any number of passes; under ``no_sync`` the host's gradients wait and the seeds'
do not, which changes nothing in the result. Buffers of seeds are the wrapper's, which looks for them before each pass.

The gradients are then those of one process on all samples, but for BatchNorm, which normalises with the samples of its own
process, as ever: convert the host to SyncBatchNorm before it is grown.

Structure is not sent around: every process does the same operations and draws the same seeds. Before each change all processes
compare what they are about to do, and what gates read is averaged over them.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from morphogen.errors import StateMismatch
from morphogen.growth.lifecycle import SlotState, Stage
from morphogen.growth.operators import Seed
from morphogen.growth.slots import SeedSlot
from morphogen.state.processes import exchange_device, group_of

Matter = Literal["structure", "sense", "record_contribution"]
_MATTERS: tuple[Matter, ...] = ("structure", "sense", "record_contribution")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that grow one model together; none means this process alone, and then nothing here costs anything.

    Attributes:
        group: The process group, or None.
        capacity: Numbers in a message; the same for every matter, so that processes that do different things find out
            instead of waiting for each other.
    """

    group: dist.ProcessGroup | None = None
    capacity: int = 0

    @classmethod
    def of(cls, distributed: bool | dist.ProcessGroup, birth: Mapping[str, Any]) -> Processes:
        """Return the processes of a group, or for True all there are.

        Args:
            distributed: As for :class:`GrowableModel`.
            birth: What a model is made from, each with a text that says what it is; "points" has a length.

        Raises:
            StateMismatch: The processes make different models.
        """
        group = group_of(distributed)
        if group is None:
            return cls()
        cls(group, len(birth)).check_same({f"`{name}`": _checksum(repr(value)) for name, value in birth.items()}, {})
        return cls(group, 2 + 3 * len(birth["points"]))

    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        return self  # a copy of the model is a copy in every process; groups cannot be copied

    def __reduce__(self) -> tuple[type[Processes], tuple[()]]:
        return (Processes, ())

    def check_change(
        self, slots: Mapping[str, SeedSlot], changes: Mapping[str, tuple[SlotState, Seed | None]], clock: int, config: object
    ) -> None:
        """Check that all processes are about to have the same clock, states and newborn weights; waits for all of them.

        Args:
            slots: As they are.
            changes: Slot -> the state and seed that it is about to have.
            clock: The clock it is about to be.
            config: Of the model.

        Raises:
            StateMismatch: They are not.
        """
        if self.group is None:
            return
        states = {name: changes[name][0] if name in changes else slot.state for name, slot in slots.items()}
        newborns = {name: seed for name, (_, seed) in changes.items() if seed is not None and seed is not slots[name].seed}
        values = {"the clock": clock, "the config": _checksum(repr(config))}
        values |= {f"slot {name!r}": _checksum(repr(dataclasses.replace(state, history=()))) for name, state in states.items()}
        values |= {f"new weights in slot {name!r}": _checksum(seed.parameters()) for name, seed in newborns.items()}
        here = {f"slot {name!r}": f"{state.stage.name} at alpha {state.alpha}" for name, state in states.items()}
        self.check_same(values, {"the clock": str(clock), **here})

    def check_same(self, values: Mapping[str, int], here: Mapping[str, str]) -> None:
        """Check that all processes have the same numbers; ``here`` says in words what they stand for in this process.

        Raises:
            StateMismatch: With one line for each that differs.
        """
        rows_PV = self._exchange("structure", [float(value) for value in values.values()])
        differs_V = (rows_PV != rows_PV[0]).any(0).tolist()
        different = [
            f"{name}{f' (here {here[name]})' if name in here else ''} would not be the same"
            for name, differs in zip(values, differs_V, strict=False)
            if differs
        ]
        if different:
            raise StateMismatch(
                "a growing model must be the same in all processes. Make it with the same points, config and seed, call the "
                "same operations with the same arguments everywhere, or pass distributed=False.",
                tuple(different),
            )

    def mean(self, matter: Matter, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over the processes, the same in all of them; a NaN or infinity anywhere shows.

        Raises:
            StateMismatch: Another process is at something else.
        """
        return list(values) if self.group is None else self._exchange(matter, values).mean(0).tolist()[: len(values)]

    def average_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace the gradient of each parameter by its mean over the processes, as of now.

        A parameter without a gradient counts as zero where another process has one, and has one afterwards.
        """
        kinds: dict[tuple[torch.device, torch.dtype], list[Parameter]] = collections.defaultdict(list)
        for parameter in parameters:
            kinds[parameter.device, parameter.dtype].append(parameter)
        for alike in kinds.values():
            with torch.no_grad():
                self._average_alike(alike)

    def _average_alike(self, parameters: list[Parameter]) -> None:
        """Average over parameters of one device and dtype; behind their gradients comes how many processes have each."""
        gradients = [parameter.grad for parameter in parameters]
        missing = [index for index, gradient in enumerate(gradients) if gradient is None]
        present = torch.ones(len(parameters), dtype=parameters[0].dtype, device=parameters[0].device)
        present[missing] = 0.0
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.to(p.dtype) for p in parameters]
        flat = torch.cat([*(part.reshape(-1) for part in parts), present]).div_(dist.get_world_size(self.group))
        dist.all_reduce(flat, group=self.group)
        *means, present = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
        for gradient, mean in zip(gradients, means, strict=True):
            if gradient is not None:
                gradient.copy_(mean.view_as(gradient))
        for index in missing:
            if bool(present[index] > 0.0):
                parameters[index].grad = torch.empty_like(parameters[index]).copy_(means[index].view_as(parameters[index]))

    def _exchange(self, matter: Matter, values: Sequence[float]) -> Tensor:
        """Return what each process has, one row for each; the rows may be longer than ``values``."""
        assert self.group is not None and len(values) <= self.capacity
        padding = [0.0] * (self.capacity - len(values))
        message = [float(_MATTERS.index(matter)), *values, *padding]
        mine = torch.tensor(message, dtype=torch.float64, device=exchange_device(self.group))
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everybody, mine, group=self.group)
        rows = torch.stack(everybody).cpu()
        elsewhere = sorted({_MATTERS[int(index)] for index in rows[:, 0].tolist()} - {matter})
        if elsewhere:
            raise StateMismatch(
                f"all processes must do the same with a growing model: this one is at {matter!r}, others are at "
                f"{', '.join(map(repr, elsewhere))}. Call the same operations in the same order everywhere."
            )
        return rows[:, 1:]


class GradientAverage:
    """Averages the gradients of seeds over the processes at the end of each backward pass that reaches one of them.

    A deep copy does so for the copied slots.

    Args:
        processes: Which.
        slots: Name -> slot, in an order that is the same in all processes.
    """

    def __init__(self, processes: Processes, slots: nn.ModuleDict) -> None:
        """Watch the seeds that are there."""
        self._processes = processes
        self._slots = slots
        self._task = -1
        for _, seed in self._seeds():
            self.watch(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientAverage:
        return GradientAverage(self._processes, copy.deepcopy(self._slots, memo))  # copies of parameters have no hooks

    def watch(self, seed: Seed) -> None:
        """Average the gradients of this seed too."""
        if self._processes.group is None:
            return
        for parameter in seed.parameters():
            trainable = parameter.requires_grad
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._on_gradient)
            parameter.requires_grad_(trainable)

    def _seeds(self) -> Iterator[tuple[SlotState, Seed]]:
        for slot in cast("Iterable[SeedSlot]", self._slots.values()):
            if slot.seed is not None:
                yield slot.state, slot.seed

    def _on_gradient(self, parameter: Tensor) -> None:
        task = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if task != self._task:  # the first gradient of this pass; a checkpointed block may make a pass of its own inside it
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # pyright: ignore[reportPrivateUsage]

    def _average(self) -> None:
        self._task = -1
        seeds = [seed for state, seed in self._seeds() if state.stage is not Stage.GERMINATED]
        self._processes.average_gradients([p for seed in seeds for p in seed.parameters() if p.requires_grad])


def seed_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a growable model that are its seeds'."""
    return [name for name, _ in model.named_parameters() if name.startswith("slots.")]


def _checksum(of: str | Iterable[Tensor]) -> int:
    if isinstance(of, str):
        return zlib.crc32(of.encode())
    value = 0
    for tensor in of:
        value = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value
