"""The floors of the house hold, and the contracts that say so can fail."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = Path(sysconfig.get_path("scripts")) / "lint-imports"
FLOORS = ("cli", "control", "governor", "growth", "integrations", "recipes", "state", "tasks", "testing")


def lint_imports(source: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    """Check this project's contracts, or those named, on the package under ``source``."""
    return subprocess.run(
        [LINT_IMPORTS, "--no-cache", "--no-logo", "--config", ROOT / "pyproject.toml"]
        + [argument for contract in contracts for argument in ("--contract", contract)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


def write_package(source: Path, **modules: str) -> Path:
    """Write a package that has this one's floors, and the code of ``modules`` (path with __ for /, without .py)."""
    package = source / "morphogen"
    empty = ["errors", "config", "version", "telemetry/events", "telemetry/markup", *(f"{floor}/__init__" for floor in FLOORS)]
    files = dict.fromkeys(empty, "") | {name.replace("__", "/"): code for name, code in modules.items()}
    for name, code in files.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        (file.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    return source


def test_the_package_keeps_every_contract() -> None:
    checked = lint_imports(ROOT / "src")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 broken" in checked.stdout


def test_floors_that_are_not_built_yet_are_tolerated(tmp_path: Path) -> None:
    checked = lint_imports(write_package(tmp_path))
    assert checked.returncode == 0, checked.stdout + checked.stderr


ALLOWED = {
    "growth__model": "from morphogen.state import surgery",
    "state__surgery": "from morphogen import errors",
    "integrations__ray_tune": "import ray",
    "integrations__lightning": "import lightning.pytorch",
    "__main__": "import morphogen.cli",
    "pbt__engines__ray": "import ray",
    "telemetry__wandb": "import wandb\nfrom morphogen.telemetry import events",
    "recipes__grow": "from morphogen.telemetry import jsonl",
    "growth__events": "from morphogen.telemetry import events",
    "governor__report": "from morphogen.telemetry import markup",
    "telemetry__jsonl": "from morphogen.telemetry import events",
    "testing__blueprint": "from morphogen import cli, growth\nfrom morphogen.telemetry import jsonl",
    "envs__growth_env": "from morphogen import control, growth, rl",
    "rl__ppo": "from morphogen import state",
}


def test_what_the_design_allows_is_allowed(tmp_path: Path) -> None:
    checked = lint_imports(write_package(tmp_path, **ALLOWED))
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("contract", "module", "code"),
    [
        ("floors", "state__surgery", "import morphogen.growth"),
        ("floors", "growth__model", "import morphogen.governor"),
        ("floors", "governor__detectors", "import morphogen.growth"),
        ("floors", "tasks__digits", "import typing\nif typing.TYPE_CHECKING:\n    import morphogen.control"),
        ("floors", "control__masks", "def mask():\n    from morphogen import recipes"),
        ("floors", "recipes__grow", "import morphogen.testing"),
        ("floors", "helpers", ""),
        ("sinks", "state__streams", "from morphogen.telemetry import jsonl"),
        ("sinks", "rl__ppo", "import morphogen.telemetry.jsonl"),
        ("telemetry", "telemetry__console", "import morphogen.growth"),
        ("telemetry", "telemetry__console", "import morphogen.rl.ppo"),
        ("rl-growth", "rl__ppo", "import morphogen.growth"),
        ("rl-growth", "growth__model", "import morphogen.rl"),
        ("pbt-growth", "pbt__member", "import morphogen.growth.model"),
        ("stdlib", "telemetry__events", "import torch"),
        ("stdlib", "telemetry__markup", "import numpy"),
        ("extras", "control__heuristic", "import ray"),
        ("extras", "telemetry__wandb", "import mlflow"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, contract: str, module: str, code: str) -> None:
    others = {"growth__model": "", "telemetry__jsonl": "", "rl__ppo": ""}
    checked = lint_imports(write_package(tmp_path, **(others | {module: code})), contract)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "1 broken" in checked.stdout
