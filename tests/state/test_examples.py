"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import morphogen.state

MODULES = [f"morphogen.state.{module.name}" for module in pkgutil.iter_modules(morphogen.state.__path__)]
WITH_EXAMPLES = {"morphogen.state.training_state", "morphogen.state.streams", "morphogen.state.schedules"}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES
