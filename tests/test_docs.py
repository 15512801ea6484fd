"""Tables that are generated from code stand in the docs as the code says now."""

from __future__ import annotations

from pathlib import Path

from morphogen.growth import blueprints

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_blueprints_is_that_of_the_code() -> None:
    assert blueprints.table().strip() in (DOCS / "growth.md").read_text(), "paste `blueprints.table()` into docs/growth.md"
