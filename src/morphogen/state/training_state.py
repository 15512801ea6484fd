"""A training run as one object: capture, restore, adopt, reshape, verify, save, load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from morphogen.errors import CheckpointError, StateMismatch
from morphogen.state import (
    checkpoint,
    extras as extra_kinds,
    inventory,
    restoring,
    surgery,
    surgery_grafts,
    surgery_options,
    trees,
)
from morphogen.state.diagnosis import diagnose, diagnose_structure
from morphogen.state.events import MomentsDropped, OptimizerReset
from morphogen.state.generators import STREAM_TYPES, read_global_generators, reseed_stream, write_global_generators
from morphogen.state.parts import Parts, first_names, section, tensors_of
from morphogen.state.records import encode_optimizer
from morphogen.state.schedules import kind_of
from morphogen.state.snapshot import BufferPool, Snapshot, Tables
from morphogen.state.streams import RandomStreams
from morphogen.state.topology import DynamicModel, Grafting
from morphogen.telemetry.events import Emit, Json, discard

RestoreStrategy = Literal["restore", "reset", "keep"]
AdoptStrategy = Literal["reset", "copy", "rescale", "adaptive"]


class TrainingState:
    """All parts of a training run, so that nothing can change one without the rest.

    Everything happens in place: each Parameter, buffer and group keeps its identity through every operation.

    Args:
        model: The module, or a dict of modules by name.
        optimizer: The optimizer, or a dict, or None.
        scheduler: Learning-rate scheduler, a dict of them, or None.
        scaler: ``torch.amp.GradScaler``, a dict of them, or None.
        extras: Whatever else belongs to the run, by name: modules (EMA), tensors (recurrent state), generators, objects
            with ``state_dict`` and ``load_state_dict`` (normalisers, data cursors).
        newborn_options: Owner -> optimizer options of the group made for it when the model grows.
        snapshot_location: "device" keeps snapshots beside the tensors; "host" puts those of CUDA tensors into pinned
            memory.
        emit: Receives events.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> snapshot = state.capture()
        >>> _ = model.weight.data.zero_()
        >>> state.restore(snapshot)
        >>> bool((model.weight != 0).any())
        True
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        extras: Mapping[str, object] | None = None,
        *,
        newborn_options: Callable[[str], Mapping[str, Any]] | None = None,
        snapshot_location: Literal["device", "host"] = "device",
        emit: Emit = discard,
    ) -> None:
        """Name the parts and check that they belong together; nothing is copied."""
        self._parts = Parts.of(model, optimizer, scheduler, scaler, extras)
        self._newborn_options = newborn_options or _no_options
        location = _choice("snapshot_location", snapshot_location, ("device", "host"))
        self._pool = BufferPool(pinned=location == "host")
        self._emit = emit
        self._follows_topology = True
        self._remembered: dict[int, tuple[Parameter, str]] = {}
        self._known: dict[int, str] = {}
        self._name(self._parts.parameters())
        for module in self._parts.models.values():
            if isinstance(module, DynamicModel):
                module.on_topology_change(self._follow_topology)

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The models by name; a single one has the empty name."""
        return self._parts.models

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by name; a single one has the empty name."""
        return self._parts.optimizers

    @property
    def scalers(self) -> Mapping[str, Any]:
        """The gradient scalers by name; a single one has the empty name."""
        return self._parts.scalers

    def capture(self, *, reuse: bool = True) -> Snapshot:
        """Return a snapshot of every part. Shares no memory with the run; draws nothing; changes nothing.

        Args:
            reuse: Buffers of snapshots that were dropped are filled again, so capturing in a loop soon allocates nothing.
                False: they are made anew, and their memory is free once the snapshot is dropped; for many runs in a process.

        Raises:
            StateMismatch: A parameter of an optimizer belongs to no model (see :meth:`verify`).
            TypeError: The state of a part holds something that is not data.
        """
        parts = self._parts
        loose: trees.TensorTable = {}
        live: Tables = {"tensors": parts.tensor_extras()}
        meta: dict[str, Any] = {"model": {}, "optimizer": {}}
        found, modules = parts.found(), parts.modules()
        for part, inside in found.items():
            live[part] = inside.tensors
            meta["model"][part] = {
                "aliases": inside.aliases,
                "topology": _topology(modules[part], part, loose),
                **inventory.module_flags(inside, part, loose),
            }
        names = self._name(parts.parameters(tensors_of(found)))
        for part, optimizer in parts.optimizers.items():
            name = section("optimizer", part)
            meta["optimizer"][part], live[name] = encode_optimizer(surgery.read(optimizer, names), loose, name)
        for what, group in (("scheduler", parts.schedulers), ("scaler", parts.scalers)):
            meta[what] = {
                part: {"kind": kind_of(value), "state": trees.encode(value.state_dict(), loose, f"{what}.{part}")}
                for part, value in group.items()
            }
        meta["extras"] = {
            name: trees.encode(extra_kinds.read_extra(parts.extras[name]), loose, f"extras.{name}")
            for name in parts.extras_of("stream", "state")
        }
        meta["generators"] = trees.encode(read_global_generators(), loose, "generators")
        return (self._pool if reuse else self._pool.without_reuse()).snapshot(live, loose, meta)

    def restore(self, snapshot: Snapshot, optimizer: RestoreStrategy = "restore") -> None:
        """Put the run back to ``snapshot``, in place, all or nothing; gradients are cleared.

        Args:
            snapshot: Taken from this run, or read from its checkpoint. It is not changed and can be restored any number
                of times.
            optimizer: "restore" puts back moments, groups, learning rates, schedule and scaler: on a CPU the run goes on
                bit-identically. "reset" forgets moments and steps and leaves groups, learning rates and schedule as they
                are now. "keep" leaves the optimizer alone: its moments then belong to weights that are gone.

        Raises:
            StateMismatch: The snapshot does not fit, with one line for each problem; the run is as it was.
            ValueError: ``optimizer`` is not one of the three.
        """
        _choice("optimizer", optimizer, ("restore", "reset", "keep"))
        parts, whole = self._parts, optimizer == "restore"
        if whole and parts.optimizers and not snapshot.has_optimizer_state:
            raise StateMismatch('the snapshot holds no optimizer state. Pass optimizer="reset" to start it anew.')
        records = restoring.optimizer_records(snapshot) if whole else {}
        planned = restoring.plan(parts, snapshot, records, adopting=not whole)
        with self._all_or_nothing() as undo:
            restoring.write_extras(parts, snapshot, ("stream", "state"), undo)
            restoring.commit_topology(parts, planned, undo)
            found = parts.found() if planned.changes else planned.found
            regrouped = restoring.write_flags(found, snapshot, ("frozen", "evaluating", "extra_state"), undo)
            tensors = tensors_of(found)
            copies, parameters = restoring.tensor_copies(parts, tensors, snapshot), parts.parameters(tensors)
            for part, record in records.items():
                target = parts.optimizers[part]
                copies += surgery.write(target, record, parameters, parts.schedulers_of(target))
            if whole:
                restoring.load_each(parts.schedulers, snapshot.meta.get("scheduler", {}), snapshot.loose)
                restoring.load_each(parts.scalers, snapshot.meta.get("scaler", {}), snapshot.loose)
            elif planned.changes or regrouped:
                self.reshape()
            if optimizer == "reset":
                self._reset_optimizers()
            inventory.copy_all(copies)
        if "generators" in snapshot.meta:
            write_global_generators(trees.decode(snapshot.meta["generators"], snapshot.loose))
        self._start_afresh(parameters)

    def adopt(self, snapshot: Snapshot, optimizer: AdoptStrategy = "reset") -> None:
        """Take over another run's weights, buffers, structure, scaler and normalisers; keep this run's chance and rates.

        Groups, per-group learning rates and schedule stay this run's; generators are not touched; gradients are cleared.
        Which parameters are frozen is part of the structure: the optimizers' membership follows it.

        Args:
            snapshot: Of a run with the same parts; parameters are matched by name.
            optimizer: What happens to moments and steps. "reset": forgotten. "copy": cloned as they are. "rescale":
                cloned, first moments times (source learning rate / own learning rate), so that the velocity does not
                jump. "adaptive": for each parameter, rescaled where the two rates are within a factor of ten and the
                moments fit and are finite, else reset.

        Raises:
            StateMismatch: Names, shapes or optimizers differ; the run is as it was.
            ValueError: ``optimizer`` is not one of the four.
        """
        _choice("optimizer", optimizer, ("reset", "copy", "rescale", "adaptive"))
        parts = self._parts
        records = restoring.optimizer_records(snapshot) if optimizer != "reset" else {}
        planned = restoring.plan(parts, snapshot, {}, adopting=True)
        with self._all_or_nothing() as undo:
            restoring.write_extras(parts, snapshot, ("state",), undo)
            restoring.commit_topology(parts, planned, undo)
            found = parts.found() if planned.changes else planned.found
            regrouped = restoring.write_flags(found, snapshot, ("frozen", "extra_state"), undo)
            if planned.changes or regrouped:
                self.reshape()
            tensors = tensors_of(found)
            copies, parameters = restoring.tensor_copies(parts, tensors, snapshot), parts.parameters(tensors)
            moments = {} if optimizer == "reset" else restoring.adopted_moments(parts, parameters, records, optimizer)
            self._reset_optimizers()
            for part, adopted in moments.items():
                copies += surgery.write_state(parts.optimizers[part], adopted.state, parameters)
            restoring.load_each(parts.scalers, snapshot.meta.get("scaler", {}), snapshot.loose)
            inventory.copy_all(copies)
        for part, adopted in moments.items():
            surgery.rescale_moments(parts.optimizers[part], adopted.ratios)
        self._start_afresh(parameters)

    def follow_streams(self, snapshot: Snapshot) -> None:
        """Draw from now on what the run of ``snapshot`` would: its streams and the global generators go on as it left them."""
        with self._all_or_nothing() as undo:
            restoring.write_extras(self._parts, snapshot, ("stream",), undo)
        if "generators" in snapshot.meta:
            write_global_generators(trees.decode(snapshot.meta["generators"], snapshot.loose))

    def reseed(self, seed: int) -> None:
        """Put every stream of this run, each by its name, to a new beginning below ``seed``.

        An extra that belongs to the run and is no generator, such as environments, begins anew if it has a ``reseed`` method
        that takes a seed; else it stays. The global generators are not touched.
        """
        streams = RandomStreams(seed)
        for name in self._parts.extras_of("stream"):
            extra = self._parts.extras[name]
            if isinstance(extra, STREAM_TYPES):
                reseed_stream(extra, streams, name)
            else:
                reseed = getattr(extra, "reseed", None)
                if callable(reseed):
                    reseed(streams.integer(name))

    def reshape(self) -> None:
        """Re-derive every optimizer's membership from who owns which parameter; moments of parameters that stay are kept.

        Moments of parameters that grew grow with them; those of a parameter of another shape are dropped, which an event says.
        Runs by itself whenever a :class:`DynamicModel` changes. Call it after changing ``requires_grad`` by hand.

        Raises:
            StateMismatch: An optimizer or scheduler cannot follow; nothing was changed.
        """
        owners = self._parts.owners()
        modules = self._parts.modules().values()
        grafts = [graft for module in modules if isinstance(module, Grafting) for graft in module.grafts()]
        with self._all_or_nothing():
            dropped = surgery_grafts.grow_moments(self.optimizers.values(), grafts)
            for part, optimizer in self.optimizers.items():
                dropped |= surgery_grafts.drop_misshapen(optimizer)
                options = {owner: self._newborn_options(owner) for owner in owners[part]}
                schedulers = self._parts.schedulers_of(optimizer)
                surgery.sync_groups(optimizer, owners[part], options=options, schedulers=schedulers)
        names = self._name(self._parts.parameters())
        for parameter, reason in dropped.items():
            self._emit(MomentsDropped(parameter=names.get(id(parameter), "?"), reason=reason))

    def verify(self) -> None:
        """Check that the parts belong together and are finite.

        Raises:
            StateMismatch: With one line for each *orphaned* parameter (stepped by an optimizer but in no model, as after
                ``load_state_dict(assign=True)``), *untracked* one (trainable but in no optimizer), *duplicated* one
                (stepped twice), *misshapen* moment or gradient, and each *non-finite* parameter, buffer or moment, by name.
        """
        problems = self.problems()
        if problems:
            raise StateMismatch("the training state is not sound.", tuple(problems))

    def problems(self, *, structure_only: bool = False) -> list[str]:
        """Return the lines of :meth:`verify`, none if all is well; ``structure_only`` leaves out what reads the values."""
        remembered = {key: name for key, (_, name) in self._remembered.items()}
        names = remembered | self._name(self._parts.parameters())
        return diagnose_structure(self._parts, names) if structure_only else diagnose(self._parts, names)

    def learning_rates(self) -> dict[str, float]:
        """Return the present learning rate of each owner (groups without an owner: ``group0``, ``group1``, ...)."""
        rates: dict[str, float] = {}
        for part, optimizer in self.optimizers.items():
            for owner, rate in surgery.group_rates(optimizer).items():
                rates[f"{part}.{owner}" if part else owner] = rate
        return rates

    def group_of(self, owner: str) -> tuple[Optimizer, list[Parameter]]:
        """Return the optimizer and the parameters of an owner named as in :meth:`learning_rates`.

        Raises:
            ValueError: There is no such owner; the message lists them.
        """
        for part, optimizer in self.optimizers.items():
            for name, members in surgery.group_members(optimizer).items():
                if (f"{part}.{name}" if part else name) == owner:
                    return optimizer, members
        raise ValueError(
            f"`owner` must be one of {', '.join(self.learning_rates())}, got {owner!r}. Name an optimizer's group."
        )

    def set_base_rate(self, learning_rate: float, optimizer: str = "") -> None:
        """Make ``learning_rate`` the base rate of an optimizer's first group; see :mod:`morphogen.state.surgery_options`."""
        chosen = self.optimizers[optimizer]
        surgery_options.set_base_rate(chosen, learning_rate, self._parts.schedulers_of(chosen))

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply every learning rate by ``factor``, for good: schedules go on from, and return to, the scaled rates."""
        for optimizer in self.optimizers.values():
            surgery.scale_learning_rates(optimizer, factor, self._parts.schedulers_of(optimizer))

    def save(self, path: str | os.PathLike[str], *, user_data: Json = None) -> None:
        """Write a ``v2_full_parameters`` checkpoint directory; what was at ``path`` stays whole until the new one is.

        Args:
            path: A directory, made if missing.
            user_data: JSON data to keep beside the state, returned by :meth:`load`.

        Raises:
            CheckpointError: It could not be written; what was at ``path`` still loads.
        """
        checkpoint.write(path, self.capture(), user_data=user_data)

    def load(self, path: str | os.PathLike[str]) -> Json:
        """Read a checkpoint, check all of it, and only then put the run back to it, all or nothing.

        A ``v1_policy_only`` checkpoint, or a bare ``state_dict`` file (``.safetensors``, or ``.pt`` read with
        ``weights_only=True``), holds weights only: moments are reset and an :class:`OptimizerReset` event says so.

        Returns:
            The ``user_data`` given to :meth:`save`, else None.

        Raises:
            CheckpointError: The file is missing, damaged, of an unknown version or does not fit; it names the file and
                the reason, and the run is as it was.
        """
        loaded = checkpoint.read(path, self._parts.modules())
        bare = self.optimizers and not loaded.snapshot.has_optimizer_state
        try:
            self.restore(loaded.snapshot, "reset" if bare else "restore")
        except StateMismatch as error:
            raise CheckpointError(f"{os.fspath(path)}: does not fit this run: {error}") from error
        if bare:
            reason = f"{loaded.version} holds weights and no optimizer state"
            self._emit(OptimizerReset(path=os.fspath(path), reason=reason))
        return loaded.user_data

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Any:
        """Undo what was done to optimizers, schedules and structure if the block fails; tensors are copied last in it."""
        with contextlib.ExitStack() as undo:
            follows, self._follows_topology = self._follows_topology, False
            try:
                restoring.remember_optimizers(self._parts, undo)
                yield undo
                undo.pop_all()
            finally:
                undo.close()
                self._follows_topology = follows

    def _follow_topology(self) -> Callable[[], None] | None:
        """Reshape after a change of structure; return what takes that back, should another follower refuse."""
        if not self._follows_topology:
            return None
        with contextlib.ExitStack() as undo:
            restoring.remember_optimizers(self._parts, undo)
            self.reshape()
            return undo.pop_all().close

    def _name(self, parameters: Mapping[str, Parameter]) -> dict[int, str]:
        """Name each live parameter, and remember for :meth:`verify` the names of those an optimizer still holds."""
        names = first_names(parameters)
        if names == self._known:
            return names
        live = {id(parameter): parameter for parameter in parameters.values()}
        held = {id(p) for optimizer in self.optimizers.values() for p in surgery.parameters_of(optimizer)}
        kept = {key: value for key, value in self._remembered.items() if key in held}
        self._remembered = kept | {key: (live[key], name) for key, name in names.items()}
        self._known = names
        return names

    def _reset_optimizers(self) -> None:
        for optimizer in self.optimizers.values():
            surgery.reset_moments(optimizer)

    def _start_afresh(self, parameters: Mapping[str, Parameter]) -> None:
        """Nothing of a step that was under way may leak into the next one."""
        self._name(parameters)
        restoring.ready_scalers(self._parts)
        for parameter in parameters.values():
            parameter.grad = None


def _topology(module: nn.Module, part: str, loose: trees.TensorTable) -> Json:
    return trees.encode(module.topology(), loose, f"{part}.topology") if isinstance(module, DynamicModel) else None


def _no_options(owner: str) -> Mapping[str, Any]:
    return {}


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}. Choose one of these words.")
    return value
