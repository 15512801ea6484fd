"""Running statistics: a forward pass changed a buffer much more than any lately did, which the training loss does not show."""

from __future__ import annotations

from morphogen.governor.config import LevelConfig
from morphogen.governor.detectors.levels import LevelDetector, Rule, exponential, log_of, signal


class RunningStatistics(LevelDetector):
    """Finds a log relative change of a buffer above its limits; the rule is that of :class:`LevelConfig`.

    One huge but finite batch can ruin the statistics of batch normalisation for hundreds of steps; the loss of training, which
    normalises by each batch, stays as it was. Skipping the step puts the buffers back.
    """

    def __init__(self, config: LevelConfig) -> None:
        """Start with no past."""
        rule = Rule(
            "relative change of a buffer",
            signal("buffer_change"),
            spike=config.spike,
            scale=log_of,
            absolute_floor=config.floor,
            undo=exponential,
        )
        super().__init__("running_statistics", {"change": rule}, config)
