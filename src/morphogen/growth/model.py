"""GrowableModel: any module, with slots in which seeds germinate, train, blend in, are fossilised or pruned."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from morphogen.errors import SlotError
from morphogen.growth import blueprints, lifecycle, sensing
from morphogen.growth.config import GrowthConfig
from morphogen.growth.events import GateRefused, StageChanged
from morphogen.growth.export import plain_module
from morphogen.growth.gates import GateResult, Reading, gate_into
from morphogen.growth.layouts import Layout, infer_layout, width_of
from morphogen.growth.lifecycle import NEXT_STAGE, Operator, SlotState, Sowing, Stage, Transition
from morphogen.growth.operators import Seed
from morphogen.growth.probing import Example, probe, untouched
from morphogen.growth.ramps import Curve
from morphogen.growth.slots import AlphaOverrides, SeedSlot, Site, alpha_overrides
from morphogen.growth.structure import Followers, PlannedStructure
from morphogen.growth.topology import read_topology, topology_of
from morphogen.state import RandomStreams, draw_from
from morphogen.telemetry.events import Emit, Json, discard

HOST = "host"
"""Owner of the host's parameters; no slot may be called so."""


@dataclasses.dataclass(frozen=True)
class GrowthPoint:
    """A submodule by name, and its layout where the layers inside do not tell."""

    path: str
    layout: Layout | None = None


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
        SlotError: A point does not exist, is not called once, or returns no tensor.
        ValueError: ``points`` is empty, or a slot's name is not an identifier.

    Example:
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
        self.config = config or GrowthConfig()
        self.clock = 0
        self._streams = RandomStreams(seed)
        self._emit = emit
        self._example = example_input
        self.followers = Followers()
        sites = _sites(host, points, example_input)
        self.host = host
        self.slots = nn.ModuleDict({name: SeedSlot(name, site, self.config.incubation_ratio) for name, site in sites.items()})
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
        self._check_overrides(alphas)
        token = alpha_overrides.set(alphas)
        try:
            return self.host(*args, **kwargs)
        finally:
            alpha_overrides.reset(token)

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
        """Put a new seed into a dormant slot and return the slot's state. The output does not change, and nothing is drawn
        from any stream but the seed's own.

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
        sowing = blueprint if isinstance(blueprint, Sowing) else Sowing(blueprint=blueprint, operator=operator, options=options or {})
        target = self.slot(slot)
        state = self._checked(slot, lambda: lifecycle.germinated(target.state, sowing, self.clock))
        streams = self._streams if seed is None else RandomStreams(seed)
        generator = streams.torch("germination", slot, state.germination)
        module = self._built(target, state, generator)
        self._change({slot: (state, module)})
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
        after = self._checked(slot, lambda: lifecycle.fossilized(target.state, self.clock))
        return self._through_gate(slot, Stage.FOSSILIZED, after)

    def set_alpha_target(
        self, slot: str, target: float, *, over: int = 5, curve: Curve = "sigmoid", steepness: float = 12.0
    ) -> SlotState:
        """Ramp alpha of a blending or holding seed to ``target`` over ``over`` ticks; cancels a scheduled prune."""
        state = self.slot(slot).state
        move = lambda: lifecycle.retargeted(state, self.clock, target, over, curve, steepness)  # noqa: E731
        return self._move(slot, self._checked(slot, move))

    def prune(self, slot: str, *, over: int = 0, reason: str = "pruned") -> SlotState:
        """Remove a live seed now, or after ramping its alpha to zero over ``over`` ticks; its moments go with it."""
        state = self.slot(slot).state
        return self._move(slot, self._checked(slot, lambda: lifecycle.pruned(state, self.clock, over, reason)))

    def excise(self, slot: str, *, reason: str = "excised") -> SlotState:
        """Cut a fossil out, by hand: no policy does this."""
        state = self.slot(slot).state
        return self._move(slot, self._checked(slot, lambda: lifecycle.excised(state, self.clock, reason)))

    def tick(self) -> dict[str, Stage]:
        """Advance the one clock: ramps, dwell times, cooldowns. Seeds in incubation that are not finite are pruned.

        Returns:
            Slots whose stage changed -> the new stage.
        """
        self.clock += 1
        before = self.stages()
        changes: dict[str, tuple[SlotState, Seed | None]] = {}
        for name, slot in self._slots().items():
            state = lifecycle.ticked(slot.state, self.clock, self.config)
            finite = slot.sensors.finite
            if state.stage is Stage.TRAINING and finite is not None and finite.value == 0.0:
                state = lifecycle.pruned(state, self.clock, 0, "quarantined: not finite")
            changes[name] = (state, slot.seed if state.has_seed else None)
        self._change(changes)
        return {name: stage for name, stage in self.stages().items() if stage is not before[name]}

    def sense(self) -> None:
        """Measure gradients of live seeds against the host's, from ``.grad`` as it is now; call after ``backward``.

        One small transfer from the device for all seeds together. Gates read what was measured, with its clock.
        """
        sensing.sense_gradients(self.owners(), self._slots(), self.clock)

    def record_contribution(self, slot: str, value: float, error: float) -> None:
        """Note what :func:`morphogen.growth.measure_contributions` found for ``slot``, at the present clock."""
        target = self.slot(slot)
        target.sensors = dataclasses.replace(
            target.sensors,
            contribution=Reading(value, self.clock),
            contribution_error=Reading(error, self.clock),
        )

    def export(self) -> nn.Module:
        """Return a plain module that computes the same: no hooks, no slots, nothing of morphogen; a copy in eval mode.

        Seeds that act on the output are built in at their present alpha; incubating ones are left out.
        """
        return plain_module(self.host, self._slots())

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
                seeds[name] = self._built(slot, record.state, self._streams.torch("germination", name, record.state.germination))
        return PlannedStructure(self, clock, {name: (records[name].state, records[name].sensors, seeds[name]) for name in records})

    def on_topology_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each change of structure; bound methods are held weakly. If it raises, the change is undone."""
        self.followers.add(callback)

    # -- inside -----------------------------------------------------------------------------------------------------

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
            self._emit(GateRefused(tick=self.clock, slot=slot, gate=into, reasons=reasons))
        return gate

    def _built(self, slot: SeedSlot, state: SlotState, generator: torch.Generator) -> Seed:
        """Build the seed apart from the model, on the feature's device and dtype, and try it on the feature."""
        row = blueprints.get(state.blueprint or "")
        site = slot.site
        with draw_from(generator):
            body = row.build(site.width, site.layout, **state.options)
            seed = Seed(body, state.operator, site.width, site.layout)
        feature = probe(self.host, {slot.name: site.path}, self._example_like_host())[slot.name]
        seed.to(device=feature.device, dtype=feature.dtype)
        with untouched(seed):
            residual = seed(feature)
        if residual.shape != feature.shape:
            raise SlotError(
                f"slot {slot.name!r} needs a residual of shape {tuple(feature.shape)}, blueprint {row.name!r} gives "
                f"{tuple(residual.shape)}. Mend the blueprint."
            )
        return seed.train(self.host.get_submodule(site.path).training)

    def _example_like_host(self) -> Example:
        """The example on the host's present device, floating parts in its present dtype."""
        like = next(self.host.parameters(), None)
        return self._example if like is None else cast("Example", _converted(self._example, like))

    def _change(self, changes: Mapping[str, tuple[SlotState, Seed | None]]) -> None:
        """Put new states and seeds in place; if a follower refuses, put the old ones back and raise its error."""
        before = {name: (slot.state, slot.seed) for name, slot in self._slots().items() if name in changes}
        frozen: list[Parameter] = []
        restructured = any(seed is not before[name][1] for name, (_, seed) in changes.items())
        for name, (state, seed) in changes.items():
            self.slot(name).put(state, seed)
            newly_fossil = state.stage is Stage.FOSSILIZED and before[name][0].stage is not Stage.FOSSILIZED
            if newly_fossil and seed is not None and self.config.freeze_fossils:
                frozen += [parameter.requires_grad_(False) for parameter in seed.parameters()]
        if restructured or frozen:
            try:
                self.followers.call()
            except BaseException:  # border: whatever refused, the model must be as it was; raised again at once
                for parameter in frozen:
                    parameter.requires_grad_(True)
                for name, (state, seed) in before.items():
                    self.slot(name).put(state, seed)
                raise
        for name, (state, seed) in changes.items():
            if seed is not before[name][1]:
                self.slot(name).sensors = sensing.SlotSensors()
            self._report(name, before[name][0], state)

    def _report(self, name: str, before: SlotState, after: SlotState) -> None:
        for transition in _new_transitions(before, after):
            self._emit(
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

    def _check_overrides(self, alphas: AlphaOverrides) -> None:
        for name in alphas:
            state = self.slot(name).state
            if not (state.has_seed and state.stage not in (Stage.GERMINATED, Stage.TRAINING)):
                raise SlotError(
                    f"slot {name!r} must hold a blended seed to override alpha, is {state.stage.name.lower()}. Leave it out."
                )


def _sites(host: nn.Module, points: Mapping[str, str | GrowthPoint], example: Example) -> dict[str, Site]:
    """Check the points' names, probe the host once, and return what is at each point."""
    if not points:
        raise ValueError("`points` must name at least one submodule, got none. See `dict(host.named_modules())`.")
    given = {name: GrowthPoint(point) if isinstance(point, str) else point for name, point in points.items()}
    known = dict(host.named_modules())
    for name, point in given.items():
        if not name.isidentifier() or name == HOST:
            raise ValueError(f"a slot's name must be an identifier other than {HOST!r}, got {name!r}. Rename it.")
        if point.path not in known:
            near = difflib.get_close_matches(point.path, known, n=3)
            raise SlotError(
                f"slot {name!r}: the host has no submodule `{point.path}`. "
                f"{f'Did you mean {near}?' if near else 'See dict(host.named_modules()).'}"
            )
    features = probe(host, {name: point.path for name, point in given.items()}, example)
    sites: dict[str, Site] = {}
    for name, feature in features.items():
        point = given[name]
        layout = point.layout or _layout_at(name, feature, known[point.path])
        sites[name] = Site(point.path, layout, width_of(feature, layout))
    return sites


def _layout_at(slot: str, feature: Tensor, module: nn.Module) -> Layout:
    try:
        return infer_layout(feature, module)
    except SlotError as error:
        raise SlotError(f"slot {slot!r}: {error}") from None


def _same_seed(ours: SlotState, theirs: SlotState) -> bool:
    """Whether two states speak of one and the same germination."""
    identity = ("germination", "blueprint", "operator", "options")
    return ours.has_seed and all(getattr(ours, name) == getattr(theirs, name) for name in identity)


def _new_transitions(before: SlotState, after: SlotState) -> list[Transition]:
    known = {id(transition) for transition in before.history}
    return [transition for transition in after.history if id(transition) not in known]


def _converted(value: Any, like: Tensor) -> Any:
    """Return an example on the device of ``like``, floating tensors in its dtype."""
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(_converted(item, like) for item in cast("tuple[Any, ...]", value))
    if isinstance(value, Mapping):
        return {key: _converted(item, like) for key, item in cast("Mapping[str, Any]", value).items()}
    return value
