"""One torch thread per process, and fresh deterministic streams for tests that want them."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator of its own for each test."""
    return torch.Generator().manual_seed(0)
