"""The life of a seed: stages, legal moves and one clock. Pure: no model, no torch.

    DORMANT -> GERMINATED -> TRAINING -> BLENDING <-> HOLDING -> FOSSILIZED
               any of these four -> PRUNED -> EMBARGOED -> RESETTING -> DORMANT
               a fossil is cut out (-> PRUNED) or merged into the host (-> DORMANT)

Every function takes a :class:`SlotState` and returns the next one, or raises :class:`SlotError` and changes nothing.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any, Literal

from morphogen.errors import SlotError
from morphogen.growth.config import GrowthConfig
from morphogen.growth.ramps import Curve, Ramp

Operator = Literal["add", "scale", "gate"]
OPERATORS: tuple[Operator, ...] = ("add", "scale", "gate")
HISTORY_LIMIT = 100


class Stage(enum.IntEnum):
    """Where a slot is in its life. The numbers are part of trained policies: never renumber."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    BLENDING = 3
    HOLDING = 4
    FOSSILIZED = 5
    PRUNED = 6
    EMBARGOED = 7
    RESETTING = 8


LIVE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})
"""Stages in which a seed is there and can still be pruned."""
ACTING = frozenset({Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED})
"""Stages in which a seed acts on the output."""
NEXT_STAGE: Mapping[Stage, Stage] = {
    Stage.GERMINATED: Stage.TRAINING,
    Stage.TRAINING: Stage.BLENDING,
    Stage.BLENDING: Stage.HOLDING,
}
"""What ``advance`` moves to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transition:
    """One change of stage, as kept in a slot's history."""

    tick: int
    previous: Stage
    stage: Stage
    ticks_in_previous: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotState:
    """Everything that evolves in a slot, but the seed's weights.

    Attributes:
        stage: Present stage.
        ticks_in_stage: Clock ticks since the stage was entered.
        age_ticks: Clock ticks since germination; 0 without a seed.
        germination: How many seeds this slot has had, this one included.
        blueprint: Name of the seed's blueprint; kept while cooling down, None when dormant.
        options: The blueprint's options.
        operator: How the seed acts on the host's feature.
        alpha: Present weight of the seed in [0, 1].
        alpha_target: Where BLENDING leads.
        blend_ticks: Length of the first ramp.
        curve: Shape of the first ramp.
        steepness: Steepness of a sigmoid ramp.
        ramp: The ramp under way, None when at rest.
        prune_reason: Why the seed is being ramped down to its removal, or was removed.
        frozen: Whether the seed was frozen when it was fossilised.
        pruned_blueprints: Blueprints of the seeds removed here so far, oldest first.
        history: The last transitions, oldest first.
    """

    stage: Stage = Stage.DORMANT
    ticks_in_stage: int = 0
    age_ticks: int = 0
    germination: int = 0
    blueprint: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    operator: Operator = "add"
    alpha: float = 0.0
    alpha_target: float = 1.0
    blend_ticks: int = 5
    curve: Curve = "sigmoid"
    steepness: float = 12.0
    ramp: Ramp | None = None
    prune_reason: str | None = None
    frozen: bool = False
    pruned_blueprints: tuple[str, ...] = ()
    history: tuple[Transition, ...] = ()

    @property
    def has_seed(self) -> bool:
        """Whether a seed module is in the slot."""
        return self.stage in LIVE or self.stage is Stage.FOSSILIZED

    @property
    def is_pruning(self) -> bool:
        """Whether a ramp towards removal is under way."""
        return self.stage is Stage.BLENDING and self.prune_reason is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sowing:
    """What to germinate.

    Attributes:
        blueprint: Name in the registry.
        options: Keyword arguments of the blueprint; JSON data, as checkpoints keep them.
        operator: "add", "scale" or "gate".
        alpha_target: Weight aimed at by the first ramp, in (0, 1].
        blend_ticks: Length of the first ramp, >= 1.
        curve: "linear", "cosine" or "sigmoid".
        steepness: Of a sigmoid.
    """

    blueprint: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    operator: Operator = "add"
    alpha_target: float = 1.0
    blend_ticks: int = 5
    curve: Curve = "sigmoid"
    steepness: float = 12.0

    def __post_init__(self) -> None:
        """Check what needs no model; the ramp checks its own fields."""
        if self.operator not in OPERATORS:
            raise ValueError(f"`operator` must be one of {', '.join(OPERATORS)}, got {self.operator!r}. Choose one of them.")
        if not 0.0 < self.alpha_target <= 1.0:
            raise ValueError(f"`alpha_target` must be in (0, 1], got {self.alpha_target}. To remove a seed, prune it.")
        if self.blend_ticks < 1:
            raise ValueError(f"`blend_ticks` must be >= 1, got {self.blend_ticks}. With 1, alpha steps to its target at once.")
        if not _is_json(self.options):
            raise ValueError(
                f"`options` must be JSON data (numbers, text, lists, dicts with text keys), got {dict(self.options)}. "
                "They are part of every checkpoint."
            )
        Ramp(
            start=0.0,
            target=self.alpha_target,
            num_ticks=self.blend_ticks,
            curve=self.curve,
            steepness=self.steepness,
        )


def germinated(state: SlotState, sowing: Sowing, clock: int) -> SlotState:
    """Return the state of a dormant slot after a seed was put in."""
    if state.stage is not Stage.DORMANT:
        raise SlotError(f"must be dormant to germinate, is {state.stage.name.lower()}. Choose another slot or wait.")
    fresh = dataclasses.replace(
        state,
        age_ticks=0,
        germination=state.germination + 1,
        blueprint=sowing.blueprint,
        options=dict(sowing.options),
        operator=sowing.operator,
        alpha=0.0,
        alpha_target=sowing.alpha_target,
        blend_ticks=sowing.blend_ticks,
        curve=sowing.curve,
        steepness=sowing.steepness,
        ramp=None,
        prune_reason=None,
    )
    return _moved(fresh, Stage.GERMINATED, clock, f"germinated {sowing.blueprint}")


def advanced(state: SlotState, clock: int) -> SlotState:
    """Return the state one stage on. Entering BLENDING takes the first step of the ramp at once."""
    target = NEXT_STAGE.get(state.stage)
    if target is None:
        raise SlotError(
            f"must be germinated, training or blending to advance, is {state.stage.name.lower()}. "
            "Germinate a dormant slot; fossilize or prune a holding one."
        )
    if state.is_pruning:
        raise SlotError("is being ramped down for removal, so it cannot advance. Set an alpha target to cancel the prune.")
    state = _moved(state, target, clock, "advanced")
    if target is not Stage.BLENDING:
        return state
    ramp = Ramp(
        start=state.alpha,
        target=state.alpha_target,
        num_ticks=state.blend_ticks,
        curve=state.curve,
        steepness=state.steepness,
    )
    return _ramped(dataclasses.replace(state, ramp=ramp))


def retargeted(state: SlotState, clock: int, target: float, *, over: int, curve: Curve, steepness: float = 12.0) -> SlotState:
    """Return the state with a ramp from the present alpha to ``target``; from HOLDING it goes back to BLENDING.

    A ramp under way is replaced and starts from where alpha is; a scheduled prune is cancelled. Over 0 ticks alpha is at its
    target at once.
    """
    if state.stage not in (Stage.BLENDING, Stage.HOLDING):
        raise SlotError(f"must be blending or holding to change alpha, is {state.stage.name.lower()}. Advance it first.")
    if not 0.0 < target <= 1.0:
        raise ValueError(f"`target` must be in (0, 1], got {target}. To remove a seed, prune it.")
    if over < 0:
        raise ValueError(f"`over` must be >= 0 ticks, got {over}. Use 0 to change alpha at once.")
    ramp = Ramp(start=state.alpha, target=target, num_ticks=max(1, over), curve=curve, steepness=steepness)
    if state.stage is Stage.HOLDING:
        state = _moved(state, Stage.BLENDING, clock, "alpha retargeted")
    state = dataclasses.replace(state, ramp=ramp, alpha_target=target, prune_reason=None)
    return state if over else _ramped(state)


def pruned(state: SlotState, clock: int, over: int, reason: str) -> SlotState:
    """Return the state after removal, or with a ramp to zero over ``over`` ticks that ends in removal.

    Removal is immediate when ``over`` is 0, when alpha is 0 and before BLENDING.
    """
    if state.stage not in LIVE:
        raise SlotError(
            f"must hold a live seed to prune, is {state.stage.name.lower()}. A fossil is removed with excise, by hand."
        )
    if over < 0:
        raise ValueError(f"`over` must be >= 0 ticks, got {over}. Use 0 to remove at once.")
    if over == 0 or state.alpha == 0.0 or state.stage not in (Stage.BLENDING, Stage.HOLDING):
        return _removed(state, clock, reason)
    ramp = Ramp(start=state.alpha, target=0.0, num_ticks=over, curve=state.curve, steepness=state.steepness)
    if state.stage is Stage.HOLDING:
        state = _moved(state, Stage.BLENDING, clock, "prune ramp")
    return dataclasses.replace(state, ramp=ramp, prune_reason=reason)


def fossilized(state: SlotState, clock: int, freeze: bool = False) -> SlotState:
    """Return the state of a holding seed made permanent, and frozen if ``freeze``."""
    if state.stage is not Stage.HOLDING:
        raise SlotError(f"must be holding to fossilize, is {state.stage.name.lower()}. Advance it to holding first.")
    return _moved(dataclasses.replace(state, frozen=freeze), Stage.FOSSILIZED, clock, "fossilized")


def excised(state: SlotState, clock: int, reason: str) -> SlotState:
    """Return the state of a slot whose fossil was cut out by hand."""
    if state.stage is not Stage.FOSSILIZED:
        raise SlotError(f"must hold a fossil to excise, is {state.stage.name.lower()}. Use prune for a live seed.")
    return _removed(state, clock, reason)


def merged(state: SlotState, clock: int) -> SlotState:
    """Return the state of a slot whose fossil became part of the host: dormant at once, as there is nothing to cool down."""
    if state.stage is not Stage.FOSSILIZED:
        raise SlotError(f"must hold a fossil to be merged, is {state.stage.name.lower()}. Fossilize the seed first.")
    free = dataclasses.replace(
        state, age_ticks=0, blueprint=None, options={}, alpha=0.0, ramp=None, prune_reason=None, frozen=False
    )
    return _moved(free, Stage.DORMANT, clock, "merged")


def ticked(state: SlotState, clock: int, config: GrowthConfig) -> SlotState:
    """Return the state one tick later: counters, the ramp, and the stages that pass by time alone.

    Args:
        state: Before the tick.
        clock: The clock after the tick.
        config: How long cooling stages last.
    """
    state = dataclasses.replace(
        state,
        ticks_in_stage=state.ticks_in_stage + 1,
        age_ticks=state.age_ticks + 1 if state.has_seed else state.age_ticks,
    )
    if state.ramp is not None:
        state = _ramped(state)
        if state.ramp is None and state.is_pruning:
            return _removed(state, clock, state.prune_reason or "pruned")
    cooling = {
        Stage.PRUNED: (config.pruned_ticks, Stage.EMBARGOED),
        Stage.EMBARGOED: (config.embargo_ticks, Stage.RESETTING),
        Stage.RESETTING: (config.resetting_ticks, Stage.DORMANT),
    }
    while state.stage in cooling and state.ticks_in_stage >= cooling[state.stage][0]:
        state = _moved(state, cooling[state.stage][1], clock, "cooled down")
    if state.stage is Stage.DORMANT and state.blueprint is not None:
        state = dataclasses.replace(state, blueprint=None, options={}, prune_reason=None, age_ticks=0)
    return state


def _is_json(options: Mapping[str, Any]) -> bool:
    try:
        return json.loads(json.dumps(dict(options))) == dict(options)
    except (TypeError, ValueError):
        return False


def _ramped(state: SlotState) -> SlotState:
    assert state.ramp is not None
    alpha, ramp = state.ramp.ticked()
    return dataclasses.replace(state, alpha=alpha, ramp=ramp)


def _removed(state: SlotState, clock: int, reason: str) -> SlotState:
    removed = (*state.pruned_blueprints, state.blueprint or "")[-HISTORY_LIMIT:]
    gone = dataclasses.replace(state, alpha=0.0, ramp=None, prune_reason=reason, pruned_blueprints=removed, frozen=False)
    return _moved(gone, Stage.PRUNED, clock, reason)


def _moved(state: SlotState, stage: Stage, clock: int, reason: str) -> SlotState:
    transition = Transition(
        tick=clock, previous=state.stage, stage=stage, ticks_in_previous=state.ticks_in_stage, reason=reason
    )
    history = (*state.history, transition)[-HISTORY_LIMIT:]
    return dataclasses.replace(state, stage=stage, ticks_in_stage=0, history=history)
