"""Detectors: one file and one row of the table below for each."""

from __future__ import annotations

from morphogen.governor.config import GovernorConfig
from morphogen.governor.detectors.base import Detector as Detector
from morphogen.governor.detectors.collapse import Collapse as Collapse
from morphogen.governor.detectors.dead_gradient import DeadGradient as DeadGradient
from morphogen.governor.detectors.explosion import Explosion as Explosion
from morphogen.governor.detectors.non_finite import NonFinite as NonFinite
from morphogen.governor.detectors.probe import Probe as Probe
from morphogen.governor.detectors.running_statistics import RunningStatistics as RunningStatistics
from morphogen.governor.detectors.update import UpdateSize as UpdateSize


def standard_detectors(config: GovernorConfig) -> tuple[Detector, ...]:
    """Return the detectors of a governor, most urgent first."""
    return (
        NonFinite(),
        Explosion(config.explosion),
        UpdateSize(config.update),
        RunningStatistics(config.running_statistics),
        Collapse(config.collapse),
        DeadGradient(config.dead_gradient),
        Probe(config.probe),
    )
