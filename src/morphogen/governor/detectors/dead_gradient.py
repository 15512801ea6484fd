"""Dead gradients: parameters that used to have a gradient have none, or one of exact zeros."""

from __future__ import annotations

from morphogen.governor.config import LevelConfig
from morphogen.governor.detectors.levels import LevelDetector, Rule, signal


class DeadGradient(LevelDetector):
    """Finds a share of parameter tensors without a gradient above its limits; the rule is that of :class:`LevelConfig`.

    What never had a gradient (unused heads, frozen layers) is part of its past, and no fault.
    """

    def __init__(self, config: LevelConfig) -> None:
        """Start with no past."""
        rule = Rule(
            "share of parameters without a gradient",
            signal("dead_share"),
            spike=config.spike,
            absolute_floor=config.floor,
        )
        super().__init__("dead_gradient", {"share": rule}, config)
