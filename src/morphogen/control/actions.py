"""Actions: what a policy may do with one slot in one decision. Frozen records; executing one changes a model."""

from __future__ import annotations

import dataclasses
import enum
import math

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, Sowing
from morphogen.growth.gates import GateResult
from morphogen.growth.ramps import Curve


class Op(enum.IntEnum):
    """The kinds of action. The numbers are part of trained policies: never renumber."""

    WAIT = 0
    GERMINATE = 1
    ADVANCE = 2
    SET_ALPHA_TARGET = 3
    PRUNE = 4
    FOSSILIZE = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """One decision.

    Attributes:
        op: What to do.
        slot: Where; None for WAIT alone.
        sowing: What to germinate; for GERMINATE alone.
        alpha_target: In (0, 1]; for SET_ALPHA_TARGET alone.
        over: Ticks of the ramp: >= 1 for SET_ALPHA_TARGET, >= 0 for PRUNE, else 0.
        curve: Shape of the ramp; for SET_ALPHA_TARGET alone.
        steepness: Of a sigmoid; for SET_ALPHA_TARGET alone.
        reason: Why, in a few words, for the log.
    """

    op: Op = Op.WAIT
    slot: str | None = None
    sowing: Sowing | None = None
    alpha_target: float = 1.0
    over: int = 0
    curve: Curve = "sigmoid"
    steepness: float = 12.0
    reason: str = ""

    def __post_init__(self) -> None:
        """Check that what the op needs is there, and nothing that would be ignored."""
        op = self.op.name
        if (self.op is Op.WAIT) != (self.slot is None):
            raise ValueError(f"`slot` must be given for every op but WAIT, got {self.slot!r} for {op}. Mend the policy.")
        if (self.op is Op.GERMINATE) != (self.sowing is not None):
            raise ValueError(f"`sowing` must be given for GERMINATE alone, got {self.sowing} for {op}. Mend the policy.")
        if not 0.0 < self.alpha_target <= 1.0:
            raise ValueError(f"`alpha_target` must be in (0, 1], got {self.alpha_target}. To remove a seed, prune it.")
        if self.op is not Op.SET_ALPHA_TARGET and self.alpha_target != 1.0:
            raise ValueError(f"`alpha_target` must be left out, got {self.alpha_target} for {op}. Mend the policy.")
        least, most = _OVER.get(self.op, (0, 0))
        if not least <= self.over <= most:
            rule = f">= {least} ticks" if most else "left out"
            raise ValueError(f"`over` must be {rule}, got {self.over} for {op}. Mend the policy.")
        if self.op is not Op.SET_ALPHA_TARGET and (self.curve, self.steepness) != ("sigmoid", 12.0):
            raise ValueError(f"`curve` and `steepness` must be left out, got {self.curve!r} for {op}. Mend the policy.")


_OVER: dict[Op, tuple[int, float]] = {Op.SET_ALPHA_TARGET: (1, math.inf), Op.PRUNE: (0, math.inf)}


def execute(model: GrowableModel, action: Action) -> GateResult | None:
    """Carry out ``action``; an action the masks allow always succeeds. Returns the gate's result where there is a gate.

    Raises:
        SlotError: The action was masked; the model is as it was.
    """
    if action.slot is None:
        return None
    if action.op is Op.GERMINATE:
        assert action.sowing is not None
        model.germinate(action.slot, action.sowing)
    elif action.op is Op.ADVANCE:
        return _passed(action, model.advance(action.slot))
    elif action.op is Op.SET_ALPHA_TARGET:
        model.set_alpha_target(
            action.slot, action.alpha_target, over=action.over, curve=action.curve, steepness=action.steepness
        )
    elif action.op is Op.PRUNE:
        model.prune(action.slot, over=action.over, reason=action.reason or "pruned by the policy")
    elif action.op is Op.FOSSILIZE:
        return _passed(action, model.fossilize(action.slot))
    return None


def _passed(action: Action, gate: GateResult) -> GateResult:
    if not gate.passed:
        lacking = ", ".join(check.value for check in gate.refusals)
        raise SlotError(
            f"slot {action.slot!r} must have {lacking} to become {gate.into.name.lower()}, and has not. Ask the mask first."
        )
    return gate
