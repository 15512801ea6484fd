"""Each adapter needs its framework and says how to get it; the package itself needs none."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = {
    "lightning": ("lightning", "lightning"),
    "huggingface": ("transformers", "transformers"),
    "ray_tune": ("ray", "ray"),
    "stable_baselines3": ("stable_baselines3", "stable-baselines3"),
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_a_missing_framework_says_how_to_get_it(module: str) -> None:
    framework, extra = FRAMEWORKS[module]
    done = run(f"import sys; sys.modules['{framework}'] = None; import morphogen.integrations.{module}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"pip install 'morphogen[{extra}]'")
    assert "ImportError" in done.stderr.splitlines()[-1]


def test_the_package_imports_no_framework() -> None:
    loaded = f"{{'torch', *{[framework for framework, _ in FRAMEWORKS.values()]}}} & sys.modules.keys()"
    done = run(f"import morphogen.integrations, sys; print(len({loaded}))")
    assert done.stdout.strip() == "0", done.stderr
