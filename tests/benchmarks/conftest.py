"""The modules of benchmarks/ppo, which import each other by bare name as scripts do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

PPO = Path(__file__).parents[2] / "benchmarks" / "ppo"


@pytest.fixture(scope="session")
def ppo() -> Iterator[SimpleNamespace]:
    """The modules by name."""
    sys.path.insert(0, str(PPO))
    names = ("environments", "checks", "rows", "worker", "run")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(PPO))
