"""Every blueprint passes the shipped suite; test_conformance.py tests the suite itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from morphogen.growth import blueprints
from morphogen.testing import CHECKS, BlueprintCase, blueprint_cases


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", blueprints.names())
def test_blueprint(name: str, check: Callable[[BlueprintCase], None]) -> None:
    """Under every operator, in every layout, with every option that has few values; a message names the case."""
    for case in blueprint_cases([name]):
        check(case)
