"""Every example runs as its head says, in a process of its own, and shows what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISES = {
    "governed_loop.py": ("step 200: skip: loss is nan", "step 400: rewind: ", "600 observations, 1 step skipped, 1 rewind"),
    "grow_any_host.py": ("reader: (2, 8, 8) NLC", "the slot is DORMANT", "torch alone"),
    "grow_by_hand.py": ("fossilised, contributing", "same outputs: True"),
    "growth_with_maskable_ppo.py": ("256 decisions in 2 environments, 21 actions", "return on a new seed"),
    "ppo_memory_and_masks.py": ("without memory: 0.", "with an LSTM: 1.00"),
}


def test_every_example_has_a_promise() -> None:
    """Those of other frameworks are promised in tests/integrations."""
    assert {path.name for path in EXAMPLES.glob("*.py") if not path.stem.endswith("_governor")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert found.returncode == 0, found.stderr
    for words in PROMISES[name]:
        assert words in found.stdout
