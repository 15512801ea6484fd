"""The governor: catches NaN, explosions and collapse, and rewinds the whole run."""

from morphogen.governor.config import ExplosionConfig as ExplosionConfig, GovernorConfig as GovernorConfig
from morphogen.governor.detectors import Detector as Detector
from morphogen.governor.events import (
    LevelShiftAccepted as LevelShiftAccepted,
    Rollback as Rollback,
    StepSkipped as StepSkipped,
)
from morphogen.governor.findings import Finding as Finding, Observation as Observation
from morphogen.governor.governor import Governor as Governor
from morphogen.governor.verdicts import Action as Action, Verdict as Verdict
