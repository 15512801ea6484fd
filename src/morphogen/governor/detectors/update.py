"""Update: the weights moved much further than they lately did for the learning rate, whatever the loss says so far."""

from __future__ import annotations

from morphogen.governor.config import LevelConfig
from morphogen.governor.detectors.levels import LevelDetector, Rule, exponential, log_of, signal


class UpdateSize(LevelDetector):
    """Finds a log relative update per learning rate above its limits; the rule is that of :class:`LevelConfig`.

    It precedes the loss by a step or more (damaged weights or moments, a learning rate set too high), and it sees what the loss
    may hide (weights that grow or decay a little in each step). The step that moved the weights was taken, so it tells of the
    run itself. Schedules are divided out.
    """

    def __init__(self, config: LevelConfig) -> None:
        """Start with no past."""
        rule = Rule(
            "relative update per learning rate",
            signal("update_per_rate"),
            spike=config.spike,
            scale=log_of,
            absolute_floor=config.floor,
            undo=exponential,
            in_state=True,
        )
        super().__init__("update", {"update": rule}, config)
