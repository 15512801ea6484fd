"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import morphogen

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(morphogen.__path__, "morphogen.") if not info.name.endswith("__main__")
)
_WITH_EXAMPLES = [
    name for name in MODULES if any(test.examples for test in doctest.DocTestFinder().find(importlib.import_module(name)))
]


def test_there_are_examples_to_run() -> None:
    assert {"morphogen.growth.model", "morphogen.state.training_state", "morphogen.governor.governor"} <= set(_WITH_EXAMPLES)


@pytest.mark.parametrize("name", _WITH_EXAMPLES)
def test_docstring_examples(name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("docstrings"))
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
