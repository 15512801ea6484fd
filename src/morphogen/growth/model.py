"""GrowableModel: any module, with slots in which seeds germinate, train, blend in, are fossilised or pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth import lifecycle, sensing
from morphogen.growth.caches import guard_caches
from morphogen.growth.compiling import uncompiled
from morphogen.growth.config import GrowthConfig
from morphogen.growth.distributed import GradientAverage, Processes, seed_parameters
from morphogen.growth.events import GateRefused
from morphogen.growth.export import exported
from morphogen.growth.gates import GateResult, Reading, gate_into
from morphogen.growth.germination import built_seed, example_like
from morphogen.growth.host_changes import HostChanges, PlannedHost
from morphogen.growth.lifecycle import ACTING, LIVE, NEXT_STAGE, Operator, SlotState, Sowing, Stage
from morphogen.growth.merging import check_kept, edited, outputs_on, plan_merge
from morphogen.growth.operators import Seed
from morphogen.growth.points import HOST as HOST, GrowthPoint, sites_of
from morphogen.growth.probing import Example
from morphogen.growth.ramps import Curve
from morphogen.growth.shadow import ShadowPasses
from morphogen.growth.slots import AlphaOverrides, SeedSlot, alpha_overrides
from morphogen.growth.structure import Follower, Followers, PlannedStructure, same_seed
from morphogen.growth.topology import read_host, read_topology, topology_of
from morphogen.growth.walking import named_parameters
from morphogen.state import RandomStreams
from morphogen.state.surgery_grafts import Graft
from morphogen.telemetry.events import Emit, Json, discard

_ISOLATED = LIVE - ACTING


class GrowableModel(nn.Module):
    """A host with slots. The host's code, ``state_dict`` keys and checkpoints stay as they are.

    Slots are attached to the outputs of submodules by forward hooks. Every operation is a transaction: it happened whole, or
    the model is as it was. Whoever called :meth:`on_topology_change` (a ``TrainingState``) follows each change of structure
    inside the transaction.

    Args:
        host: The module to grow; used in place, not copied.
        points: Slot -> name of a submodule (or :class:`GrowthPoint`). The order given is the order of actions.
        example_input: A tensor, a tuple of arguments or a dict of keyword arguments for one forward pass, with which the
            points are probed; nothing of the host, its buffers, modes or random streams is touched.
        config: Knobs.
        seed: Root of the random streams from which seeds are initialised.
        emit: Receives events.
        distributed: Whether all processes grow one model together (see ``distributed.py``): True for all processes of
            ``torch.distributed`` where it is initialised, or a process group. Each process does the same operations.

    Raises:
        SlotError: A point does not exist, is not called once, or returns no tensor of its layout; the host is lazy or
            belongs to another GrowableModel.
        StateMismatch: The processes make different models.
        ValueError: ``points`` is empty, or a slot's name is not an identifier.

    Example:
        >>> import torch
        >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = GrowableModel(host, points={"early": "1"}, example_input=torch.zeros(2, 4))
        >>> _ = model.germinate("early", blueprint="low_rank")
        >>> model.stages()["early"].name
        'GERMINATED'
    """

    def __init__(
        self,
        host: nn.Module,
        points: Mapping[str, str | GrowthPoint],
        example_input: Example,
        *,
        config: GrowthConfig | None = None,
        seed: int = 0,
        emit: Emit = discard,
        distributed: bool | dist.ProcessGroup = True,
    ) -> None:
        """Probe the points and attach a dormant slot to each."""
        super().__init__()
        self.clock = 0
        self._streams = RandomStreams(seed)
        self._example = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example_input)
        self._shadow_passes = ShadowPasses(self._streams.child("shadow"))
        self.followers = Followers(emit)
        self.host_changes = HostChanges()
        sites = sites_of(host, points, example_input)
        self.host = host
        self.slots = nn.ModuleDict({name: SeedSlot(name, site) for name, site in sites.items()})
        self.config = config or GrowthConfig()
        for slot in self._slots().values():
            host.get_submodule(slot.site.path).register_forward_hook(slot.on_output)
        guard_caches(host, self._slots())
        self._processes = Processes.of(distributed, {"points": sites, "seed": seed, "config": self.config})
        self._gradient_average = GradientAverage(self._processes, self.slots)

    def forward(self, *args: Any, alphas: AlphaOverrides | None = None, **kwargs: Any) -> Any:
        """Return the host's output on these arguments, seeds mixed in.

        Args:
            *args: For the host.
            alphas: For this call alone, alpha of some slots that hold a blended seed: a number, or a tensor (N,) with one
                value per sample. 0 ablates the slot.
            **kwargs: For the host.
        """
        if alphas is None:
            return self.host(*args, **kwargs)
        return self._with_alphas(alphas, args, kwargs)

    @property
    def needs_shadow(self) -> bool:
        """Whether a seed learns in :meth:`shadow` alone: one is in TRAINING, and ``config.incubator`` is "shadow"."""
        return self._config.incubator == "shadow" and any(slot.mix == "shadow" for slot in self._slots().values())

    def shadow(self) -> AbstractContextManager[None]:
        """Return a block in which passes show the network with its incubating seeds at work, and train these alone.

        Run the batch again in it and call ``backward``. Each seed in TRAINING acts at its alpha_target, on its feature
        detached. All else is constant: no other ``.grad`` is touched, no other buffer written to (BatchNorm normalises as in
        any pass), inputs are detached, and the global generators are as before afterwards. In eval mode without gradients it
        shows what blending would do. Hooks of yours on the host run. What lies outside the model does take gradients. A
        compiled model runs uncompiled. A seed whose residual is not finite is left out, with NaN for a gradient. Only forward
        and backward passes belong in the block.

        Raises:
            ValueError: Seeds incubate, but ``config.incubator`` is not "shadow".
            SlotError: No seed is in TRAINING, or a shadow pass is under way already, in this or another thread.

        Example:
            >>> import torch
            >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> model = GrowableModel(host, {"early": "1"}, torch.zeros(2, 4), config=GrowthConfig(incubator="shadow"))
            >>> _ = model.germinate("early", "low_rank"), model.advance("early")
            >>> x = torch.ones(2, 4)
            >>> model(x).square().mean().backward()
            >>> if model.needs_shadow:
            ...     with model.shadow():
            ...         model(x).square().mean().backward()
            >>> max(float(p.grad.abs().max()) for _, p in model.owners()["early"]) > 0
            True
        """
        return self._shadow_passes.run(self, self.host, self._slots(), self.clock)

    @property
    def config(self) -> GrowthConfig:
        """Knobs; assign another config to change them from now on."""
        return self._config

    @config.setter
    def config(self, config: GrowthConfig) -> None:
        self._shadow_passes.check_none()
        self._config = config
        for slot in self._slots().values():
            slot.configure(config)

    # -- what there is ----------------------------------------------------------------------------------------------

    def slot(self, name: str) -> SeedSlot:
        """Return the slot called ``name``; SlotError lists the names."""
        slots = self._slots()
        if name not in slots:
            raise SlotError(f"`slot` must be one of {', '.join(slots)}, got {name!r}. Name a growth point of this model.")
        return slots[name]

    def stages(self) -> dict[str, Stage]:
        """Return the stage of each slot, in the order of the points."""
        return {name: slot.state.stage for name, slot in self._slots().items()}

    def alphas(self) -> dict[str, float]:
        """Return alpha of each slot."""
        return {name: slot.state.alpha for name, slot in self._slots().items()}

    def num_parameters(self) -> int:
        """Return the parameters owned by the host and by every seed, whatever their ``requires_grad``."""
        return sum(parameter.numel() for parameter in self.parameters())

    def owners(self) -> dict[str, list[tuple[str, Parameter]]]:
        """Return owner ("host" or a slot with a seed) -> its (name, parameter) pairs, gates included."""
        owned: dict[str, list[tuple[str, Parameter]]] = {HOST: []}
        for name, slot in self._slots().items():
            if slot.seed is not None:
                owned[name] = []
        for name, parameter in named_parameters(self):
            owner = name.split(".")[1] if name.startswith("slots.") else HOST
            owned[owner].append((name, parameter))
        return owned

    def isolated(self) -> dict[str, list[tuple[str, Parameter]]]:
        """Return what :meth:`owners` does of the seeds in incubation alone, which do not act on the outputs."""
        isolated = [name for name, stage in self.stages().items() if stage in _ISOLATED]
        owned = self.owners() if isolated else {}
        return {name: owned[name] for name in isolated if name in owned}

    # -- operations -------------------------------------------------------------------------------------------------

    def germinate(
        self,
        slot: str,
        blueprint: str | Sowing,
        *,
        operator: Operator = "add",
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> SlotState:
        """Put a new seed into a dormant slot and return the slot's state.

        The output does not change, and nothing is drawn from any stream but the seed's own.

        Args:
            slot: A dormant slot.
            blueprint: A name in the registry, or a :class:`Sowing` that also says how the seed will blend in.
            operator: "add", "scale" or "gate"; not with a Sowing, which has its own.
            seed: Root seed of the initialisation; by default the model's stream for this slot and germination.
            options: Keyword arguments of the blueprint; not with a Sowing.

        Raises:
            SlotError: The slot is unknown or not dormant, or the seed does not fit the feature.
            ValueError: Blueprint, operator, layout or option is wrong, with the choices.
        """
        if isinstance(blueprint, Sowing) and (options is not None or operator != "add"):
            raise ValueError("`operator` and `options` must be left out with a Sowing, which has both. Put them there.")
        target = self.slot(slot)
        if isinstance(blueprint, Sowing):
            sowing = blueprint
        else:
            sowing = Sowing(blueprint=blueprint, operator=operator, options=options or {})
        state = self._checked(slot, lambda: lifecycle.germinated(target.state, sowing, self.clock))
        streams = self._streams if seed is None else RandomStreams(seed)
        self._change({slot: (state, self._built(target, state, streams))})
        return state

    def advance(self, slot: str) -> GateResult:
        """Move a seed one stage on if its gate lets it, and return the gate's result; refused, nothing changes.

        Raises:
            SlotError: The slot has no seed that can advance.
        """
        target = self.slot(slot)
        after = self._checked(slot, lambda: lifecycle.advanced(target.state, self.clock))
        return self._through_gate(slot, NEXT_STAGE[target.state.stage], after)

    def fossilize(self, slot: str) -> GateResult:
        """Make a holding seed permanent if the gate lets it, and return the gate's result. Moments are kept.

        With ``freeze_fossils`` its parameters are frozen and leave the optimizer.

        Raises:
            SlotError: The slot is not holding.
        """
        target = self.slot(slot)
        after = self._checked(slot, lambda: lifecycle.fossilized(target.state, self.clock, self.config.freeze_fossils))
        return self._through_gate(slot, Stage.FOSSILIZED, after)

    def set_alpha_target(
        self, slot: str, target: float, *, over: int = 5, curve: Curve = "sigmoid", steepness: float = 12.0
    ) -> SlotState:
        """Ramp alpha of a blending or holding seed to ``target`` over ``over`` ticks; cancels a scheduled prune."""
        state = self.slot(slot).state
        return self._move(
            slot,
            self._checked(
                slot,
                lambda: lifecycle.retargeted(state, self.clock, target, over=over, curve=curve, steepness=steepness),
            ),
        )

    def prune(self, slot: str, *, over: int = 0, reason: str = "pruned") -> SlotState:
        """Remove a live seed now, or after ramping its alpha to zero over ``over`` ticks; its moments go with it."""
        state = self.slot(slot).state
        return self._move(slot, self._checked(slot, lambda: lifecycle.pruned(state, self.clock, over, reason)))

    def quarantine(self, owner: str, reason: str) -> None:
        """Remove a seed in incubation that is at fault: nothing else of the model changes. Its slot cools down.

        Raises:
            SlotError: There is no seed in incubation in that slot.
        """
        if owner not in self.isolated():
            raise SlotError(f"`owner` must be a slot with a seed in incubation, got {owner!r}. Prune seeds that act by hand.")
        self.prune(owner, reason=f"quarantined: {reason}")

    def excise(self, slot: str, *, reason: str = "excised") -> SlotState:
        """Cut a fossil out, by hand: no policy does this."""
        state = self.slot(slot).state
        return self._move(slot, self._checked(slot, lambda: lifecycle.excised(state, self.clock, reason)))

    def merge(self, slot: str) -> SlotState:
        """Fold a fossil into the host's own parameters, and free the slot at once; return the slot's state.

        The model computes the same as before, in train and eval mode, up to rounding. Foldable are, with operator "add",
        "low_rank" on a submodule that is or ends in Linear or Conv, "norm" with running statistics also on one that ends in a
        normalisation, and "widen" (see ``merging.py``). A parameter that grows stays the same object; its moments grow with
        it. Gradients of changed parameters are dropped: merge between steps.

        Raises:
            SlotError: The slot holds no fossil, or one that cannot be folded here, with the reason; nothing was changed.
        """
        target, example = self.slot(slot), self._example_like_host()
        state = self._checked(slot, lambda: lifecycle.merged(target.state, self.clock))
        edit = plan_merge(self.host, target, self._slots(), self._processes.group is not None)
        before = outputs_on(self, example)

        def check() -> None:
            check_kept(slot, before, outputs_on(self, example))

        self._change({slot: (state, None)}, host=edited(self.host, self.host_changes, edit, check))
        return state

    def tick(self) -> dict[str, Stage]:
        """Advance the one clock: ramps, dwell times, cooldowns. Seeds in incubation that are not finite are pruned.

        Returns:
            Slots whose stage changed -> the new stage.
        """
        clock, before = self.clock + 1, self.stages()
        changes: dict[str, tuple[SlotState, Seed | None]] = {}
        for name, slot in self._slots().items():
            state = lifecycle.ticked(slot.state, clock, self.config)
            finite = slot.sensors.finite
            if state.stage is Stage.TRAINING and finite is not None and finite.value == 0.0:
                state = lifecycle.pruned(state, clock, 0, "quarantined: not finite")
            changes[name] = (state, slot.seed if state.has_seed else None)
        self._change(changes, clock)
        return {name: stage for name, stage in self.stages().items() if stage is not before[name]}

    def sense(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Measure gradients of live seeds against the host's, from ``.grad`` as it is now; call after ``backward``.

        One small transfer from the device for all seeds together. Gates read what was measured, with its clock. Several
        processes measure together: readings are means over them.

        Args:
            scaler: With a gradient scaler, either pass it before ``scaler.step``, or leave it out and call this after
                ``scaler.unscale_``. With it, an overflow while the scale can still go down is not held against a seed.

        Raises:
            ValueError: ``scaler`` has stepped already.
        """
        sensing.sense_gradients(self.owners(), self._slots(), self.clock, self._processes, scaler)

    def record_contribution(self, slot: str, value: float, error: float) -> None:
        """Note what :func:`morphogen.growth.measure_contributions` found for ``slot``, at the present clock.

        Several processes record together: both numbers are means over them.
        """
        self.check_acting([slot])
        value, error = self._processes.mean("record_contribution", [value, error])
        target = self.slot(slot)
        target.sensors = dataclasses.replace(
            target.sensors,
            contribution=Reading(value, self.clock),
            contribution_error=Reading(error, self.clock),
        )

    def export(self) -> nn.Module:
        """Return a plain module that computes the same: no hooks, no slots, nothing of morphogen; a copy in eval mode.

        Seeds that act on the output are built in at their present alpha; incubating ones are left out. Both modules run on
        the example before this returns, without a trace. What guards a cache of keys and values is left behind (``caches.py``).

        Raises:
            SlotError: The host gets at a grown submodule in a way that a plain one cannot follow, such as its attributes.
        """
        return exported(self.host, self._slots(), self._example_like_host())

    # -- structure (morphogen.state.DynamicModel) --------------------------------------------------------------------

    def topology(self) -> Json:
        """Return the structure as JSON data: clock, and for each slot its site, state and sensors."""
        return topology_of(self._slots(), self.clock, self.host_changes.record)

    def plan_topology(self, topology: Json) -> PlannedStructure:
        """Build the seeds that ``topology`` names, newly initialised; seeds that are in place already are kept.

        Raises:
            StateMismatch: The topology is of another format or of other slots.
            ValueError: It names an unknown blueprint.
        """
        self._shadow_passes.check_none()
        clock, records = read_topology(topology, {name: slot.site for name, slot in self._slots().items()})
        present = self.host_changes.record
        host = PlannedHost(self.host, present, read_host(topology, self.host, present))
        seeds: dict[str, Seed | None] = {}
        for name, record in records.items():
            slot = self.slot(name)
            if not record.state.has_seed:
                seeds[name] = None
            elif slot.seed is not None and same_seed(slot.state, record.state):
                seeds[name] = slot.seed
            else:
                seeds[name] = self._built(slot, record.state, self._streams)
        slots = {name: (record.state, record.sensors, seeds[name]) for name, record in records.items()}
        return PlannedStructure(self, clock, slots, host)

    def grafts(self) -> Sequence[Graft]:
        """Return how parameters of the host grew in the change under way; none at any other time."""
        return self.host_changes.grafts

    def on_topology_change(self, callback: Follower) -> None:
        """Call ``callback`` after each change of structure; bound methods are held weakly.

        If it raises, the change is undone. It may return a function that takes back what it did, for the case that a
        callback after it raises.
        """
        self.followers.add(callback)

    def check_acting(self, slots: Iterable[str]) -> None:
        """Raise SlotError unless each of ``slots`` holds a seed that acts on the output."""
        for name in slots:
            stage = self.slot(name).state.stage
            if stage not in lifecycle.ACTING:
                raise SlotError(f"slot {name!r} must hold a blended seed, is {stage.name.lower()}. Advance it first.")

    _ddp_params_and_buffers_to_ignore = property(seed_parameters)  # DistributedDataParallel reads it

    # -- inside -----------------------------------------------------------------------------------------------------

    @uncompiled
    def _with_alphas(self, alphas: AlphaOverrides, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the host uncompiled, as slots look for overrides in such code alone: in compiled code that breaks the graph."""
        self.check_acting(alphas)
        token = alpha_overrides.set(alphas)
        try:
            with torch.compiler.set_stance("force_eager"):
                return self.host(*args, **kwargs)
        finally:
            alpha_overrides.reset(token)

    def _slots(self) -> dict[str, SeedSlot]:
        return cast("dict[str, SeedSlot]", self.slots._modules)  # pyright: ignore[reportPrivateUsage]

    def _checked(self, slot: str, move: Callable[[], SlotState]) -> SlotState:
        try:
            return move()
        except SlotError as error:
            raise SlotError(f"slot {slot!r} {error}") from None

    def _move(self, slot: str, state: SlotState) -> SlotState:
        self._change({slot: (state, self.slot(slot).seed if state.has_seed else None)})
        return state

    def _through_gate(self, slot: str, into: Stage, after: SlotState) -> GateResult:
        target = self.slot(slot)
        gate = gate_into(into, target.state, target.sensors, self.clock, self.config.gates)
        if gate.passed:
            self._move(slot, after)
        else:
            reasons = tuple(check.value for check in gate.refusals)
            self.followers.emit(GateRefused(tick=self.clock, slot=slot, gate=into, reasons=reasons))
        return gate

    def _built(self, slot: SeedSlot, state: SlotState, streams: RandomStreams) -> Seed:
        seed = built_seed(self.host, slot, state, streams, self._example_like_host())
        self._gradient_average.watch(seed)
        return seed

    def _example_like_host(self) -> Example:
        return example_like(self.host, self._example)

    def _change(
        self,
        changes: Mapping[str, tuple[SlotState, Seed | None]],
        clock: int | None = None,
        host: AbstractContextManager[None] | None = None,
    ) -> None:
        """Put new states, seeds and clock in place; if a follower refuses, put the old ones back and raise its error.

        Followers are told within ``host``, which changes the host and takes that back if it fails.
        """
        before = {name: (slot.state, slot.seed) for name, slot in self._slots().items() if name in changes}
        self._shadow_passes.check_none()
        self._processes.check_change(self._slots(), changes, self.clock if clock is None else clock, self.config)
        clock_before, self.clock = self.clock, self.clock if clock is None else clock
        for name, (state, seed) in changes.items():
            self.slot(name).put(state, seed)
        if any(
            seed is not before[name][1] or state.frozen != before[name][0].frozen for name, (state, seed) in changes.items()
        ):
            try:
                with host or nullcontext():
                    self.followers.call()
            except BaseException:  # border: whatever refused, the model must be as it was; raised again at once
                for name, (state, seed) in before.items():
                    self.slot(name).put(state, seed)
                self.clock = clock_before
                raise
        for name, (state, seed) in changes.items():
            if seed is not before[name][1]:
                self.slot(name).sensors = sensing.SlotSensors()
            self.followers.report(name, before[name][0], state)
