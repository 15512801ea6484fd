"""The inline engine does what every engine must."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from morphogen.pbt.engines.inline import InlineEngine
from morphogen.testing.engines import ENGINE_CHECKS, EngineCase


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_inline(check: Callable[[EngineCase], None]) -> None:
    check(EngineCase("inline", InlineEngine))
