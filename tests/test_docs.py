"""Tables that are generated from code stand in the docs as the code says now, and what the docs show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from morphogen.envs import choices, observation, rewards
from morphogen.growth import blueprints

DOCS = Path(__file__).parents[1] / "docs"


def test_the_table_of_blueprints_is_that_of_the_code() -> None:
    assert blueprints.table().strip() in (DOCS / "growth.md").read_text(), "paste `blueprints.table()` into docs/growth.md"


@pytest.mark.parametrize(
    ("mark", "text", "source"),
    [
        ("actions", choices.table(), "choices.table()"),
        ("features", observation.table(), "observation.table()"),
        ("rewards", rewards.describe(), "rewards.describe()"),
    ],
)
def test_the_tables_of_the_environment_are_those_of_the_code(mark: str, text: str, source: str) -> None:
    found = re.search(f"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", (DOCS / "envs.md").read_text(), re.DOTALL)
    assert found is not None and found[1] == text, f"paste `{source}` between the marks of docs/envs.md"


def test_what_the_page_of_the_environment_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "envs.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, {})
    shown = capsys.readouterr().out
    assert len(blocks) == 3 and "[ True  True]" in shown and "('run_known', 'progress', 'left')" in shown
