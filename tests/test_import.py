"""Importing morphogen is cheap: no optional dependency, and no torch before it is needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import morphogen

SOURCE = Path(__file__).parents[1] / "src"
OPTIONAL = (
    *("datasets", "lightning", "mlflow", "onnx", "onnxscript", "pytorch_lightning", "ray"),
    *("sb3_contrib", "stable_baselines3", "textual", "transformers", "wandb"),
)
EVERY_PUBLIC_NAME = "import morphogen; [getattr(morphogen, name) for name in getattr(morphogen, '__all__', ())]"


def imported_by(code: str, path: Path) -> set[str]:
    """The top-level modules that ``code`` has imported, where ``path`` is searched first."""
    report = "; import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        env={**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{SOURCE}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A place where every optional dependency can be imported, so that trying to is seen."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").touch()
    return tmp_path


def test_morphogen_loads_neither_torch_nor_an_optional_dependency(installed: Path) -> None:
    imported = imported_by("import morphogen", installed)
    assert "morphogen" in imported
    assert not imported & {"torch", *OPTIONAL}


def test_no_public_name_needs_an_optional_dependency(installed: Path) -> None:
    assert not imported_by(EVERY_PUBLIC_NAME, installed) & set(OPTIONAL)


def test_the_most_used_of_populations_is_at_hand() -> None:
    assert morphogen.PopulationTrainer is morphogen.pbt.PopulationTrainer  # pyright: ignore[reportAttributeAccessIssue]
    assert {"PopulationTrainer", "PBTConfig", "PBTScheduler"} <= {*morphogen.__all__}
    with pytest.raises(AttributeError, match="Public names: .*PopulationTrainer"):
        _ = morphogen.PopulationTrainr  # pyright: ignore[reportAttributeAccessIssue]


def test_the_version_is_declared_once() -> None:
    project = tomllib.loads((SOURCE.parent / "pyproject.toml").read_text("utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert (SOURCE.parent / project["tool"]["hatch"]["version"]["path"]).read_text().count(morphogen.__version__) == 1
    assert importlib.metadata.version("morphogen") == morphogen.__version__


def test_an_optional_dependency_would_be_seen(installed: Path) -> None:
    assert "ray" in imported_by("import morphogen, ray", installed)
