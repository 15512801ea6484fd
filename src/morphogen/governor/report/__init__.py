"""What happened under a governor: the timeline that is recorded, and the report made of it."""

from morphogen.governor.report.report import GovernorReport as GovernorReport, GovernorSummary as GovernorSummary
from morphogen.governor.report.timeline import Timeline as Timeline
