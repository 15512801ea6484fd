"""What an agent may choose, as eight small numbers, and what they mean.

``op`` comes first, since the other choices hang on it: which slots it is possible on, and whether a choice matters at all.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import MultiDiscrete
from numpy.typing import NDArray

from morphogen.control import Action, Op
from morphogen.errors import SlotError
from morphogen.growth import Sowing
from morphogen.growth.lifecycle import Operator
from morphogen.growth.ramps import Curve
from morphogen.rl.actions import ActionConfig, HeadConfig

HEADS = ("op", "slot", "blueprint", "style", "tempo", "alpha_target", "alpha_speed", "alpha_curve")
STYLES: tuple[tuple[Operator, Curve], ...] = (("add", "sigmoid"), ("add", "linear"), ("scale", "sigmoid"), ("gate", "sigmoid"))
"""How a seed acts, and the shape of its first ramp."""
TEMPOS_TICKS = (1, 3, 6)
"""Length of its first ramp."""
ALPHA_TARGETS = (0.5, 0.7, 1.0)
ALPHA_SPEEDS_TICKS = (0, 3, 5, 8)
"""Length of a later ramp; 0 is for pruning at once."""
ALPHA_CURVES: tuple[tuple[Curve, float], ...] = (
    ("linear", 12.0),
    ("cosine", 12.0),
    ("sigmoid", 6.0),
    ("sigmoid", 12.0),
    ("sigmoid", 24.0),
)
_STEEPNESS = 12.0  # of first ramps

Choices = NDArray[np.int64]
"""One action, shape (8,), in the order of ``HEADS``."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many places there are: what a policy is built for, whatever the task fills them with.

    Attributes:
        num_slots: Places for slots, >= 1.
        num_blueprints: Places for blueprints, >= 1.
    """

    num_slots: int = 5
    num_blueprints: int = 5

    def __post_init__(self) -> None:
        """Check both."""
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value}. The default is 5.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of each head."""
        last = (len(STYLES), len(TEMPOS_TICKS), len(ALPHA_TARGETS), len(ALPHA_SPEEDS_TICKS), len(ALPHA_CURVES))
        return (len(Op), self.num_slots, self.num_blueprints, *last)

    @property
    def action_space(self) -> MultiDiscrete:
        """The space of one action."""
        return MultiDiscrete(np.array(self.sizes))


_RARE = -2.0
"""Initial logit of what undoes or turns at a seed: tried as often as all else, hardly a seed would live to show its worth."""


def action_config() -> ActionConfig:
    """Return how the heads hang together, for an agent that can make use of it: op -> slot -> blueprint.

    An untrained policy prunes and retargets about a seventh as often as it waits or germinates.
    """
    germinate, retarget, prune = int(Op.GERMINATE), int(Op.SET_ALPHA_TARGET), int(Op.PRUNE)
    somewhere = tuple(int(op) for op in Op if op is not Op.WAIT)
    rare = tuple(_RARE if op in (Op.SET_ALPHA_TARGET, Op.PRUNE) else 0.0 for op in Op)
    return ActionConfig(
        heads=(
            HeadConfig(name="op", initial_logits=rare),
            HeadConfig(name="slot", given=("op",), relevant_when={"op": somewhere}),
            HeadConfig(name="blueprint", given=("slot",), relevant_when={"op": (germinate,)}),
            HeadConfig(name="style", relevant_when={"op": (germinate,)}),
            HeadConfig(name="tempo", relevant_when={"op": (germinate,)}),
            HeadConfig(name="alpha_target", relevant_when={"op": (germinate, retarget)}),
            HeadConfig(name="alpha_speed", given=("op",), relevant_when={"op": (retarget, prune)}),
            HeadConfig(name="alpha_curve", relevant_when={"op": (retarget,)}),
        )
    )


def table() -> str:
    """Return what may be chosen as a Markdown table, a row for each head."""
    choices = {
        "op": [op.name for op in Op],
        "slot": ["the places for slots, in the order of the task"],
        "blueprint": ["the places for blueprints, likewise"],
        "style": [f"{operator}, {curve}" for operator, curve in STYLES],
        "tempo": [f"{ticks}" for ticks in TEMPOS_TICKS],
        "alpha_target": [f"{alpha:g}" for alpha in ALPHA_TARGETS],
        "alpha_speed": [f"{ticks}" for ticks in ALPHA_SPEEDS_TICKS],
        "alpha_curve": [curve if curve != "sigmoid" else f"{curve} {steepness:g}" for curve, steepness in ALPHA_CURVES],
    }
    rows = ["| head | matters for | its mask hangs on | choices |", "|---|---|---|---|"]
    for head in action_config().heads or ():
        ops = ", ".join(Op(op).name for op in head.relevant_when.get("op", ())) or "always"
        ops = "all ops but WAIT" if len(head.relevant_when.get("op", ())) == len(Op) - 1 else ops
        rows.append(f"| `{head.name}` | {ops} | {', '.join(head.given)} | {'; '.join(choices[head.name])} |")
    return "\n".join(rows) + "\n"


@dataclasses.dataclass(frozen=True)
class Menu:
    """What the numbers stand for in one task.

    Attributes:
        slots: Names of the slots, in order.
        blueprints: What may be sown, in order; style, tempo and target come from the other choices.
        layout: The places; those beyond ``slots`` and ``blueprints`` stay empty.

    Raises:
        ValueError: There are more slots or blueprints than places.

    Example:
        >>> menu = Menu(("early", "late"), (Sowing(blueprint="norm"),), Layout())
        >>> action = menu.action([1, 1, 0, 0, 1, 2, 0, 0])
        >>> action.op.name, action.slot, action.sowing.blueprint, action.sowing.blend_ticks
        ('GERMINATE', 'late', 'norm', 3)
        >>> menu.choices(action).tolist()
        [1, 1, 0, 0, 1, 2, 0, 0]
    """

    slots: tuple[str, ...]
    blueprints: tuple[Sowing, ...]
    layout: Layout

    def __post_init__(self) -> None:
        """Check that all fits."""
        for name in ("slots", "blueprints"):
            most, found = getattr(self.layout, f"num_{name}"), len(getattr(self, name))
            if found > most:
                raise ValueError(
                    f"`layout.num_{name}` must be at least {found}, the {name} of the task, got {most}. "
                    f"Give more places, or choose fewer {name}."
                )

    def action(self, choices: Sequence[int] | Choices) -> Action:
        """Return what ``choices`` mean; those that do not matter are ignored.

        Raises:
            SlotError: There is no such slot or blueprint in this task.
            ValueError: The choices do not go together, or one is not of the space.
        """
        self._check(choices)
        op, slot, blueprint, style, tempo, target, speed, curve = (int(choice) for choice in choices)
        if op == Op.WAIT:
            return Action()
        where, alpha = self._slot(slot), ALPHA_TARGETS[target]
        if op == Op.GERMINATE:
            return Action(op=Op.GERMINATE, slot=where, sowing=self._sowing(blueprint, style, tempo, alpha))
        if op == Op.SET_ALPHA_TARGET:
            shape, steepness = ALPHA_CURVES[curve]
            over = ALPHA_SPEEDS_TICKS[speed]
            return Action(op=Op(op), slot=where, alpha_target=alpha, over=over, curve=shape, steepness=steepness)
        return Action(op=Op(op), slot=where, over=ALPHA_SPEEDS_TICKS[speed] if op == Op.PRUNE else 0)

    def choices(self, action: Action) -> Choices:
        """Return the numbers for ``action``; those that do not matter are 0.

        Raises:
            ValueError: No choices mean this action.
        """
        found = dict.fromkeys(HEADS, 0) | {"op": int(action.op)}
        if action.slot is not None:
            found["slot"] = _place(self.slots, action.slot, "slot")
        if action.sowing is not None:
            sowing = action.sowing
            offered = [(each.blueprint, dict(each.options)) for each in self.blueprints]
            found["blueprint"] = _place(offered, (sowing.blueprint, dict(sowing.options)), "blueprint")
            found["style"] = _place(STYLES, (sowing.operator, sowing.curve), "style")
            _place([_STEEPNESS], sowing.steepness, "steepness")
            found["tempo"] = _place(TEMPOS_TICKS, sowing.blend_ticks, "tempo")
            found["alpha_target"] = _place(ALPHA_TARGETS, sowing.alpha_target, "alpha_target")
        if action.op is Op.SET_ALPHA_TARGET:
            found["alpha_target"] = _place(ALPHA_TARGETS, action.alpha_target, "alpha_target")
            found["alpha_curve"] = _place(ALPHA_CURVES, (action.curve, action.steepness), "alpha_curve")
        if action.op in (Op.SET_ALPHA_TARGET, Op.PRUNE):
            found["alpha_speed"] = _place(ALPHA_SPEEDS_TICKS, action.over, "alpha_speed")
        return np.array([found[head] for head in HEADS])

    def _check(self, choices: Sequence[int] | Choices) -> None:
        if len(choices) != len(HEADS):
            raise ValueError(f"`choices` must be {len(HEADS)} numbers, got {len(choices)}. They are {', '.join(HEADS)}.")
        for head, size, choice in zip(HEADS, self.layout.sizes, choices, strict=True):
            if not 0 <= choice < size:
                raise ValueError(f"`{head}` must be in [0, {size}), got {choice}. Sample the action space under the mask.")

    def _slot(self, place: int) -> str:
        if not 0 <= place < len(self.slots):
            raise SlotError(f"`slot` must be in [0, {len(self.slots)}), got {place}. Ask the mask first.")
        return self.slots[place]

    def _sowing(self, place: int, style: int, tempo: int, alpha_target: float) -> Sowing:
        if not 0 <= place < len(self.blueprints):
            raise SlotError(f"`blueprint` must be in [0, {len(self.blueprints)}), got {place}. Ask the mask first.")
        operator, curve = STYLES[style]
        return dataclasses.replace(
            self.blueprints[place],
            operator=operator,
            alpha_target=alpha_target,
            blend_ticks=TEMPOS_TICKS[tempo],
            curve=curve,
            steepness=_STEEPNESS,
        )


def _place(offered: Sequence[object], wanted: object, head: str) -> int:
    if wanted in offered:
        return offered.index(wanted)
    names = [name for name in offered if isinstance(name, str)]
    near = difflib.get_close_matches(wanted, names, n=1) if isinstance(wanted, str) else []
    hint = f"Did you mean {near[0]!r}?" if near else "The environment offers nothing else."
    raise ValueError(f"`{head}` must be one of {list(offered)}, got {wanted!r}. {hint}")
