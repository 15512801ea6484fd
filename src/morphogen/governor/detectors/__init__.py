"""Detectors: one file and one row of the table below for each."""

from __future__ import annotations

from morphogen.governor.config import GovernorConfig
from morphogen.governor.detectors.base import Detector as Detector
from morphogen.governor.detectors.explosion import Explosion as Explosion
from morphogen.governor.detectors.non_finite import NonFinite as NonFinite


def standard_detectors(config: GovernorConfig) -> tuple[Detector, ...]:
    """Return the detectors of a governor, most urgent first."""
    return (
        NonFinite(),
        Explosion(config.explosion),
    )
