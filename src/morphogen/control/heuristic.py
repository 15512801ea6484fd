"""The heuristic: grow early, keep what helps, remove what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from morphogen.control.actions import Action, Op
from morphogen.control.masks import ActionMask
from morphogen.control.observation import Observation, SlotView
from morphogen.growth import Sowing, Stage


@dataclasses.dataclass(frozen=True)
class Heuristic:
    """Germinates while the run is young, advances every seed its gate lets through, and judges it by its contribution.

    A holding seed whose contribution exceeds ``min_contribution`` is fossilised; one that was held for ``patience_ticks``
    without that is pruned, and its blueprint is not tried in that slot again.

    Attributes:
        blueprints: What may be sown, best first.
        sow_until: Share of the run after which nothing new is sown: a seed must have time to pay for itself.
        min_contribution: Least contribution to keep a seed, in units of the metric.
        patience_ticks: Ticks a holding seed has to show it.
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
                return Action(op=Op.FOSSILIZE, slot=name, reason=f"contributes {views[name].contribution:+.3f}")
        for view in observation.slots:
            if view.stage is Stage.HOLDING and view.ticks_in_stage >= self.patience_ticks:
                return Action(op=Op.PRUNE, slot=view.name, over=3, reason=f"contributes {_signed(view.contribution)} only")
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


def _signed(contribution: float | None) -> str:
    return "an unmeasured amount" if contribution is None else f"{contribution:+.3f}"
