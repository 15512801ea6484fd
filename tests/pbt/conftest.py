"""Small populations that train in no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from morphogen.pbt import PBTConfig, PopulationResult
from morphogen.pbt.snapshots import to_bytes
from morphogen.testing.engine_members import SPACES

Settings = Callable[..., PBTConfig]


@pytest.fixture
def settings() -> Settings:
    """Make the config of five members over four intervals of three steps."""

    def make(**changes: Any) -> PBTConfig:
        given: dict[str, Any] = {
            "population_size": 5,
            "total_steps": 12,
            "perturbation_interval": 3,
            "hyperparameters": SPACES,
            "synchronous": True,
            "optimizer_exploit_strategy": "copy",
            "seed": 3,
        }
        return PBTConfig(**{**given, **changes})

    return make


@pytest.fixture
def facts_of() -> Callable[[PopulationResult], Any]:
    """Return all that a result says, in a form in which NaN equals NaN; CPU time and snapshots left out."""

    def facts(result: PopulationResult) -> Any:
        reports = [
            (report.member, report.interval, report.step, repr(report.score), dict(report.hyperparameters), report.seed)
            for report in result.reports
        ]
        exploits = [
            (each.event, each.member, each.source, each.reason, repr(each.score_after), dict(each.hyperparameters), each.seed)
            for each in result.exploits
        ]
        return result.best, reports, exploits, to_bytes(result.parameters)

    return facts
