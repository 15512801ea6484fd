"""Probe: the number that the user's probe returns rises, as the loss of a fixed batch in eval mode does when a run is hurt."""

from __future__ import annotations

from morphogen.governor.config import ProbeConfig
from morphogen.governor.detectors.levels import LevelDetector, Rule, signal


class Probe(LevelDetector):
    """Finds a ``probe_loss`` above its limits; the rule is that of :class:`HistoryConfig`, with a window counted in probes."""

    def __init__(self, config: ProbeConfig) -> None:
        """Start with no past."""
        rule = Rule("loss of the probe", signal("probe_loss"), spike=config.spike, relative_floor=config.floor, in_state=True)
        super().__init__("probe", {"probe": rule}, config)
