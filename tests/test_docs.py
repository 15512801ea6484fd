"""Tables that are generated from code stand in the docs as the code says now, and what the docs show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from morphogen.envs import choices, observation, rewards
from morphogen.growth import blueprints
from morphogen.pbt import PBTConfig
from morphogen.pbt.config import OURS
from morphogen.pbt.members.handover import PARTS

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


def marked(page: str, mark: str) -> str:
    found = re.search(f"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None, f"docs/{page} has no marks {mark}"
    return found[1]


def test_the_settings_of_a_population_are_those_of_the_code() -> None:
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in marked("pbt.md", "settings").splitlines()[2:]]
    fields = PBTConfig.model_fields.items()
    assert rows == [[name, "must be given" if field.is_required() else str(field.default)] for name, field in fields]


def test_what_becomes_of_each_part_is_what_the_code_says() -> None:
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in marked("pbt.md", "parts").splitlines()[2:]]
    assert rows == [(part.what, part.fate) for part in PARTS]


def test_the_names_of_ray_tune_are_those_that_are_answered() -> None:
    rows = [tuple(cell.strip(" `") for cell in line.split("|")[1:3]) for line in marked("pbt.md", "names").splitlines()[2:]]
    assert rows == [*OURS.items()]


def test_what_the_page_of_populations_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "pbt.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, {})
    shown = capsys.readouterr().out.splitlines()
    assert len(blocks) == 3 and shown[0] == "True 32"
    assert shown[1].endswith("dict_keys(['learning_rate', 'weight_decay'])")
    assert shown[2] == "256 ['gamma', 'learning_rate', 'minibatch_size']"
