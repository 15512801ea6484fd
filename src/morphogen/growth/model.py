"""GrowableModel: any module, with slots in which seeds germinate, train, blend in, are fossilised or pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth import blueprints, lifecycle, sensing
from morphogen.growth.config import GrowthConfig
from morphogen.growth.events import GateRefused, StageChanged
from morphogen.growth.export import check_same, plain_module
from morphogen.growth.gates import GateResult, Reading, gate_into
from morphogen.growth.lifecycle import ACTING, LIVE, NEXT_STAGE, Operator, SlotState, Sowing, Stage, Transition
from morphogen.growth.operators import Seed
from morphogen.growth.points import HOST as HOST, GrowthPoint, sites_of
from morphogen.growth.probing import Example, probe, try_out
from morphogen.growth.ramps import Curve
from morphogen.growth.slots import AlphaOverrides, SeedSlot, alpha_overrides
from morphogen.growth.structure import Follower, Followers, PlannedStructure
from morphogen.growth.topology import read_topology, topology_of
from morphogen.state import RandomStreams, draw_from
from morphogen.telemetry.events import Emit, Json, discard


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

    Raises:
        SlotError: A point does not exist, is not called once, or returns no tensor of its layout; the host is lazy or
            belongs to another GrowableModel.
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
    ) -> None:
        """Probe the points and attach a dormant slot to each."""
        super().__init__()
        self.clock = 0
        self._streams = RandomStreams(seed)
        self._example = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example_input)
        self.followers = Followers(emit)
        sites = sites_of(host, points, example_input)
        self.host = host
        self.slots = nn.ModuleDict({name: SeedSlot(name, site) for name, site in sites.items()})
        self.config = config or GrowthConfig()
        for slot in self._slots().values():
            host.get_submodule(slot.site.path).register_forward_hook(slot.on_output)

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
    def config(self) -> GrowthConfig:
        """Knobs; assign another config to change them from now on."""
        return self._config

    @config.setter
    def config(self, config: GrowthConfig) -> None:
        self._config = config
        for slot in self._slots().values():
            slot.incubation_ratio = config.incubation_ratio

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
        for name, parameter in self.named_parameters():
            owner = name.split(".")[1] if name.startswith("slots.") else HOST
            owned[owner].append((name, parameter))
        return owned

    def isolated(self) -> dict[str, list[tuple[str, Parameter]]]:
        """Return what :meth:`owners` does of the seeds in incubation alone, which do not act on the outputs."""
        stages, owned = self.stages(), self.owners()
        return {name: owned[name] for name, stage in stages.items() if stage in LIVE - ACTING and name in owned}

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

    def sense(self) -> None:
        """Measure gradients of live seeds against the host's, from ``.grad`` as it is now; call after ``backward``.

        One small transfer from the device for all seeds together. Gates read what was measured, with its clock.
        """
        sensing.sense_gradients(self.owners(), self._slots(), self.clock)

    def record_contribution(self, slot: str, value: float, error: float) -> None:
        """Note what :func:`morphogen.growth.measure_contributions` found for ``slot``, at the present clock."""
        self.check_acting([slot])
        target = self.slot(slot)
        target.sensors = dataclasses.replace(
            target.sensors,
            contribution=Reading(value, self.clock),
            contribution_error=Reading(error, self.clock),
        )

    def export(self) -> nn.Module:
        """Return a plain module that computes the same: no hooks, no slots, nothing of morphogen; a copy in eval mode.

        Seeds that act on the output are built in at their present alpha; incubating ones are left out. Both modules run on
        the example before this returns, without a trace.

        Raises:
            SlotError: The host gets at a grown submodule in a way that a plain one cannot follow, such as its attributes.
        """
        plain = plain_module(self.host, self._slots())
        check_same(self.host, plain, self._example_like_host())
        return plain

    # -- structure (morphogen.state.DynamicModel) --------------------------------------------------------------------

    def topology(self) -> Json:
        """Return the structure as JSON data: clock, and for each slot its site, state and sensors."""
        return topology_of(self._slots(), self.clock)

    def plan_topology(self, topology: Json) -> PlannedStructure:
        """Build the seeds that ``topology`` names, newly initialised; seeds that are in place already are kept.

        Raises:
            StateMismatch: The topology is of another format or of other slots.
            ValueError: It names an unknown blueprint.
        """
        clock, records = read_topology(topology, {name: slot.site for name, slot in self._slots().items()})
        seeds: dict[str, Seed | None] = {}
        for name, record in records.items():
            slot = self.slot(name)
            if not record.state.has_seed:
                seeds[name] = None
            elif slot.seed is not None and _same_seed(slot.state, record.state):
                seeds[name] = slot.seed
            else:
                seeds[name] = self._built(slot, record.state, self._streams)
        slots = {name: (record.state, record.sensors, seeds[name]) for name, record in records.items()}
        return PlannedStructure(self, clock, slots)

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

    # -- inside -----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
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
        return {name: cast("SeedSlot", slot) for name, slot in self.slots.items()}

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
        """Build the seed apart from the model, on the feature's device and dtype, and try it on the feature."""
        row = blueprints.get(state.blueprint or "")
        site = slot.site
        with draw_from(streams.torch("germination", slot.name, state.germination)):
            body = row.build(site.width, site.layout, **state.options)
            seed = Seed(body, state.operator, site.width, site.layout)
        feature = probe(self.host, {slot.name: site.path}, self._example_like_host())[slot.name]
        seed.to(device=feature.device, dtype=feature.dtype)
        try_out(slot.name, seed, feature)
        return seed.train(self.host.get_submodule(site.path).training)

    def _example_like_host(self) -> Example:
        """The example on the host's present device, floating parts in its present dtype."""
        like = next(self.host.parameters(), None)
        if like is None:
            return self._example

        def converted(tensor: Tensor) -> Tensor:
            return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)

        return pytree.tree_map_only(Tensor, converted, self._example)

    def _change(self, changes: Mapping[str, tuple[SlotState, Seed | None]], clock: int | None = None) -> None:
        """Put new states, seeds and clock in place; if a follower refuses, put the old ones back and raise its error."""
        before = {name: (slot.state, slot.seed) for name, slot in self._slots().items() if name in changes}
        clock_before, self.clock = self.clock, self.clock if clock is None else clock
        for name, (state, seed) in changes.items():
            self.slot(name).put(state, seed)
        if any(
            seed is not before[name][1] or state.frozen != before[name][0].frozen for name, (state, seed) in changes.items()
        ):
            try:
                self.followers.call()
            except BaseException:  # border: whatever refused, the model must be as it was; raised again at once
                for name, (state, seed) in before.items():
                    self.slot(name).put(state, seed)
                self.clock = clock_before
                raise
        for name, (state, seed) in changes.items():
            if seed is not before[name][1]:
                self.slot(name).sensors = sensing.SlotSensors()
            self._report(name, before[name][0], state)

    def _report(self, name: str, before: SlotState, after: SlotState) -> None:
        for transition in _new_transitions(before, after):
            self.followers.emit(
                StageChanged(
                    tick=transition.tick,
                    slot=name,
                    previous=transition.previous,
                    stage=transition.stage,
                    ticks_in_previous=transition.ticks_in_previous,
                    reason=transition.reason,
                    blueprint=after.blueprint,
                )
            )


def _same_seed(ours: SlotState, theirs: SlotState) -> bool:
    """Whether two states speak of one and the same germination."""
    identity = ("germination", "blueprint", "operator", "options")
    return ours.has_seed and all(getattr(ours, name) == getattr(theirs, name) for name in identity)


def _new_transitions(before: SlotState, after: SlotState) -> list[Transition]:
    known = {id(transition) for transition in before.history}
    return [transition for transition in after.history if id(transition) not in known]
