"""One torch thread per process, and fresh deterministic streams for tests that want them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("MORPHOGEN_DATA", str(Path(tempfile.gettempdir()) / "morphogen-test-data"))  # not the user's cache


@pytest.fixture(autouse=True)
def _same_chance_for_each_test() -> None:
    """Hosts that a test builds from torch's global stream are the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator of its own for each test."""
    return torch.Generator().manual_seed(0)
