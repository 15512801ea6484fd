"""A small grow job, run once for all tests that only look at what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from morphogen.recipes.config import GrowConfig
from morphogen.recipes.grow import GrowResult, grow

STEPS = 250
"""Ten ticks of the digits task: enough to germinate, blend and hold."""


def _small(**changes: object) -> GrowConfig:
    return GrowConfig(task="digits", repeats=1, total_steps=STEPS, checkpoint_every_ticks=2).replace(**changes)


@pytest.fixture(scope="session")
def small_config() -> Callable[..., GrowConfig]:
    """Makes a job on digits that takes a few seconds."""
    return _small


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> GrowResult:
    """A finished job with two repeats and both kinds of fault."""
    out: Path = tmp_path_factory.mktemp("grow") / "run"
    return grow(_small(repeats=2, inject=("nan@100", "spike@180")), out)
