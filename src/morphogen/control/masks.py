"""Masks: which actions are possible now. Exact: a masked action cannot be executed, an unmasked one always can. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from morphogen.control.actions import Action, Op
from morphogen.control.observation import SlotView
from morphogen.growth import Stage


@dataclasses.dataclass(frozen=True)
class ActionMask:
    """Op -> the slots on which it is possible. WAIT is always possible and has no slot."""

    slots_by_op: dict[Op, tuple[str, ...]]

    def allows(self, action: Action) -> bool:
        """Whether ``action`` can be executed now."""
        return action.op is Op.WAIT or action.slot in self.slots_by_op[action.op]

    @property
    def ops(self) -> tuple[Op, ...]:
        """The ops that are possible on some slot, WAIT first."""
        return (Op.WAIT, *(op for op, slots in self.slots_by_op.items() if slots))


def action_mask(slots: Sequence[SlotView]) -> ActionMask:
    """Return which op is possible on which slot."""
    return ActionMask({op: tuple(view.name for view in slots if _possible(op, view)) for op in Op if op is not Op.WAIT})


def _possible(op: Op, view: SlotView) -> bool:
    if op is Op.GERMINATE:
        return view.stage is Stage.DORMANT
    if op is Op.ADVANCE:
        return view.stage is not Stage.HOLDING and view.gate_open
    if op is Op.FOSSILIZE:
        return view.stage is Stage.HOLDING and view.gate_open
    if op is Op.SET_ALPHA_TARGET:
        return view.stage in (Stage.BLENDING, Stage.HOLDING)
    return view.is_live
