"""Every blueprint passes the shipped suite; test_conformance.py tests the suite itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from morphogen.testing import CHECKS, BlueprintCase, blueprint_cases


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", blueprint_cases(), ids=str)
def test_blueprint(case: BlueprintCase, check: Callable[[BlueprintCase], None]) -> None:
    check(case)
