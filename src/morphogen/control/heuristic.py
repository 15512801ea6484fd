"""The heuristic: grow early, keep what helps, remove what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from morphogen.control.actions import Action, Op
from morphogen.control.masks import ActionMask
from morphogen.control.observation import Observation, SlotView
from morphogen.growth import Check, Sowing, Stage


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """Germinates while the run is young, advances every seed its gate lets through, and judges it by its contribution.

    A holding seed whose contribution exceeds ``min_contribution`` is fossilised where the gate agrees, which also looks at its
    error if ``contribution_z`` says so; one that was held for ``patience_ticks`` without that is pruned. So is a training or
    blending seed whose gate is closed after that time for another reason than time itself: a dwell to sit out, a ramp under
    way. The blueprint of a pruned seed is not tried in that slot again.

    Attributes:
        blueprints: What may be sown, best first.
        sow_until: Share of the run after which nothing new is sown: a seed must have time to pay for itself.
        min_contribution: Least contribution to keep a seed, in units of the metric.
        patience_ticks: Ticks in a stage after which a holding seed must have shown it, and a training or blending seed must
            have met what its gate asks for.
        max_developing: Seeds developing at the same time.
    """

    blueprints: Sequence[Sowing]
    sow_until: float = 0.5
    min_contribution: float = 0.005
    patience_ticks: int = 4
    max_developing: int = 2

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        """Return the most useful possible action: fossilise, prune, advance, germinate, wait, in this order."""
        views = {view.name: view for view in observation.slots}
        for name in mask.slots_by_op[Op.FOSSILIZE]:
            if (views[name].contribution or 0.0) > self.min_contribution:
                return Action(op=Op.FOSSILIZE, slot=name, reason=f"contributes {_signed(views[name])}")
        for view in observation.slots:
            if view.ticks_in_stage >= self.patience_ticks and (fault := _fault(view)) is not None:
                return Action(op=Op.PRUNE, slot=view.name, over=0 if view.stage is Stage.TRAINING else 3, reason=fault)
        if mask.slots_by_op[Op.ADVANCE]:
            return Action(op=Op.ADVANCE, slot=mask.slots_by_op[Op.ADVANCE][0], reason="gate open")
        developing = sum(view.is_live for view in observation.slots)
        if observation.progress < self.sow_until and developing < self.max_developing:
            for name in mask.slots_by_op[Op.GERMINATE]:
                sowing = self._untried(views[name])
                if sowing is not None:
                    return Action(op=Op.GERMINATE, slot=name, sowing=sowing, reason="room to grow")
        return Action()

    def _untried(self, view: SlotView) -> Sowing | None:
        return next((sowing for sowing in self.blueprints if sowing.blueprint not in view.tried), None)


_TIME_WILL_TELL = frozenset({Check.DWELL, Check.AT_REST})


def _fault(view: SlotView) -> str | None:
    """Return why a seed that had its time should go, None if it need not."""
    if view.stage is Stage.HOLDING:
        return f"contributes {_signed(view)} only"
    waits = not view.refusals or _TIME_WILL_TELL.intersection(view.refusals)
    if view.stage not in (Stage.TRAINING, Stage.BLENDING) or waits:
        return None
    return f"stuck in {view.stage.name.lower()}, lacks {', '.join(check.value for check in view.refusals)}"


def _signed(view: SlotView) -> str:
    if view.contribution is None:
        return "an unmeasured amount"
    error = "" if view.contribution_error is None else f" with a standard error of {view.contribution_error:.3f}"
    return f"{view.contribution:+.3f}{error}"
