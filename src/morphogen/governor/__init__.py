"""The governor: catches NaN, explosions and collapse, and rewinds the whole run."""

from morphogen.governor.config import (
    CollapseConfig as CollapseConfig,
    ExplosionConfig as ExplosionConfig,
    GovernorConfig as GovernorConfig,
    LevelConfig as LevelConfig,
    ProbeConfig as ProbeConfig,
    SensorConfig as SensorConfig,
)
from morphogen.governor.detectors import Detector as Detector
from morphogen.governor.events import (
    Collapsed as Collapsed,
    LevelShiftAccepted as LevelShiftAccepted,
    PartQuarantined as PartQuarantined,
    Rollback as Rollback,
    StepSkipped as StepSkipped,
    Warned as Warned,
)
from morphogen.governor.findings import Finding as Finding, Observation as Observation
from morphogen.governor.governor import Governor as Governor
from morphogen.governor.report import GovernorReport as GovernorReport
from morphogen.governor.verdicts import Action as Action, Penalty as Penalty, Verdict as Verdict
