"""The examples of the frameworks run as their heads say, in processes of their own, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
# Lightning's own, as in pyproject.toml.
LIGHTNINGS = [
    "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
]


def shown_by(name: str, folder: Path) -> str:
    warnings = [part for rule in ("error", *LIGHTNINGS) for part in ("-W", rule)]
    found = subprocess.run(
        [sys.executable, *warnings, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def numbers_in(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.?\d*", line)]


def test_lightning(tmp_path: Path) -> None:
    shown = shown_by("lightning_governor.py", tmp_path)
    assert "StepSkipped loss is nan" in shown and "Rollback" in shown
    healthy, faulty, governed = numbers_in(next(line for line in shown.splitlines() if line.startswith("test accuracy")))
    assert faulty < 50 and healthy > 80 and governed > healthy - 5


def test_huggingface(tmp_path: Path) -> None:
    shown = shown_by("huggingface_governor.py", tmp_path)
    assert "StepSkipped loss is nan" in shown and "Rollback" in shown
    healthy, faulty, governed = numbers_in(next(line for line in shown.splitlines() if line.startswith("test perplexity")))
    assert faulty > 10 and governed < 1.1 * healthy < 2.5


def test_stable_baselines3(tmp_path: Path) -> None:
    shown = shown_by("stable_baselines3_governor.py", tmp_path)
    assert "StepSkipped loss is nan" in shown and shown.count("Rollback") == 2
    last = next(line for line in shown.splitlines() if line.startswith("mean return"))
    _, healthy, governed = numbers_in(last)
    assert "faults: died" in last and healthy > 300 and governed > 300
