"""The benchmarks of population-based training run, and say what they say they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "pbt"


def run(script: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Return what the script wrote at its smallest size."""
    file = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / script), "--quick", "--json", str(file), *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_figure_2_tells_its_arms_apart(tmp_path: Path) -> None:
    found = run("figure2.py", tmp_path)
    medians = {arm: row["median"] for arm, row in found["q"].items()}
    assert medians["full"] >= 1.1999 > medians["copy only"] > 1.199 > medians["fixed"] < medians["explore only"]
    assert found["seeds"] == 20 and all(met for name, met in found["checks"].items() if "seeds" not in name)


@pytest.mark.slow
def test_overhead_counts_steps_and_ties(tmp_path: Path) -> None:
    rows = run("overhead.py", tmp_path, "--no-ray")["rows"]
    assert all(row["steps_by_asked"] == 1.0 and 0.0 < row["cpu_ms_per_interval"] < 1000.0 for row in rows.values())
    assert rows["inline, 1 MiB"]["exploits"] == 8 and rows["inline, 1 MiB, ties"]["exploits"] == 0


@pytest.mark.slow
def test_strategies_are_told_apart(tmp_path: Path) -> None:
    found = run("strategies.py", tmp_path)["strategies"]
    assert found["copy"]["final_ratio"] == [1.0, 1.0, 1.0] and found["copy"]["lower_than_copy"] == [0, 0, 1.0]
    assert found["reset"]["alignment"] == found["partial"]["alignment"] == [None, None, None]
    assert len({tuple(row["final_by_seed"]) for row in found.values()}) >= 5
    assert {row["exploits"] for row in found.values()} == {12}
