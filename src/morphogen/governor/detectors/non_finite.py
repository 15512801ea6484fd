"""Non-finite loss or gradient: no history, no threshold, stopped before the step."""

from __future__ import annotations

import math
from typing import Any

from morphogen.governor.findings import Finding, Observation


class NonFinite:
    """Finds a NaN or infinite loss or gradient norm. False alarms: none; a finite norm that overflows counts as infinite."""

    name = "non_finite"

    def inspect(self, observation: Observation) -> Finding | None:
        """Return a finding naming loss or gradient norm, whichever is not finite."""
        for what, value in (("loss", observation.loss), ("gradient norm", observation.grad_norm)):
            if value is not None and not math.isfinite(value):
                return Finding(detector=self.name, message=f"{what} is {value}", value=value, non_finite=True)
        return None

    def accept(self, observation: Observation) -> None:
        """Nothing to learn."""

    def forget(self) -> None:
        """Nothing to forget."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
