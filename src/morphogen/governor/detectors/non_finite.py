"""Non-finite numbers: no history, no threshold, stopped before the step."""

from __future__ import annotations

import math
from typing import Any

from morphogen.governor.findings import Finding, Observation

_SIGNALS = {"weight_norm": "norm of the weights", "update": "relative update", "buffer_change": "change of a buffer"}
_IN_STATE = frozenset({"weight_norm", "update"})


class NonFinite:
    """Finds a NaN or infinite loss, gradient norm, weight or buffer. False alarms: none; a norm that overflows is infinite.

    Weights are looked at whole every ``state_check_every`` steps, and a sample of them in every step.
    """

    name = "non_finite"

    def inspect(self, observation: Observation) -> Finding | None:
        """Return a finding naming what is not finite."""
        for what, value in (("loss", observation.loss), ("gradient norm", observation.grad_norm)):
            if value is not None and not math.isfinite(value):
                return self._finding(what, value)
        for name, what in _SIGNALS.items():
            value = observation.signals.get(name, 0.0)
            if not math.isfinite(value):
                return self._finding(what, value, in_state=name in _IN_STATE)
        return None

    def _finding(self, what: str, value: float, in_state: bool = False) -> Finding:
        return Finding(detector=self.name, message=f"{what} is {value}", value=value, non_finite=True, in_state=in_state)

    def accept(self, observation: Observation) -> None:
        """Nothing to learn."""

    def forget(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
