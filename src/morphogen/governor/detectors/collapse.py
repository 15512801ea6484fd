"""Collapse: outputs that lose their dependence on the inputs, or fall into one class, after having been better."""

from __future__ import annotations

from morphogen.governor.config import CollapseConfig
from morphogen.governor.detectors.levels import (
    LevelDetector,
    Rule,
    negative_exponential,
    negative_log_of,
    signal,
)
from morphogen.governor.findings import Observation


class Collapse(LevelDetector):
    """Finds outputs whose spread across inputs falls below its limits, or whose mean prediction loses its entropy.

    The rule is that of :class:`HistoryConfig`, on minus the logarithm of the spread and on minus the entropy; where labels are
    given, the entropy is counted from that of the labels of the same batch. Needs ``observe(logits=)``. A
    network that has not learned yet has nothing to lose: only a fall from what was lately normal is one.
    """

    def __init__(self, config: CollapseConfig) -> None:
        """Start with no past."""
        fall = Rule(
            "spread of the outputs across inputs",
            signal("output_spread"),
            spike=config.spike,
            scale=_fall_of,
            absolute_floor=config.floor,
            undo=negative_exponential,
        )
        entropy = Rule(
            "entropy of the mean prediction",
            _entropy,
            spike=config.entropy_spike,
            scale=lambda entropy: -entropy,
            absolute_floor=config.entropy_floor,
            undo=lambda limit: -limit,
        )
        super().__init__("collapse", {"fall": fall, "entropy": entropy}, config)


def _fall_of(spread: float) -> float | None:
    return negative_log_of(max(spread, 1e-30))


def _entropy(observation: Observation) -> float | None:
    entropy = observation.signals.get("prediction_entropy")
    return None if entropy is None else entropy - observation.signals.get("label_entropy", 0.0)
