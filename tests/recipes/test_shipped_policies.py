"""Policies that come with morphogen: each loads, and what is said of it is what was measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from morphogen import tasks
from morphogen.envs import GrowthEnvConfig
from morphogen.envs.episode import menu_of
from morphogen.recipes.policy_file import find, load_policy, shipped

ROOT = Path(__file__).parents[2]


def test_there_is_one_for_each_task_it_is_named_after() -> None:
    assert {"digits", "mnist1d"} <= set(shipped())
    assert set(shipped()) <= set(tasks.names())


@pytest.mark.parametrize("name", list(shipped()))
def test_it_loads_fits_its_task_and_says_how_it_was_made(name: str) -> None:
    policy = load_policy(find(name))
    assert policy.origin.task == name
    policy.fit(menu_of(tasks.get(name), policy.origin.env))
    assert policy.origin.env.layout == GrowthEnvConfig().layout  # so that it carries over to every other task
    facts = json.loads(find(name).with_suffix(".json").read_text())
    config = policy.origin.facts["config"]
    assert facts["command"].startswith(f"morphogen train --task {name} ")
    assert f" --steps {config['total_steps']} --seed {config['ppo']['seed']}" in facts["command"]
    assert (f"--from {config.get('start_from')} " in facts["command"]) == (config.get("start_from") is not None)
    assert facts["decisions"] == policy.origin.facts["steps"] == facts["curve"]["rows"][-1][0]
    assert [row["player"] for row in facts["rows"]] == ["learned", "wait", "random", "periodic", "heuristic"]
    assert facts["rows"][0]["episodes"] >= 30


def test_the_table_of_the_docs_is_what_was_measured() -> None:
    table = subprocess.run(
        [sys.executable, ROOT / "tools" / "ship_policy.py", "--table"], check=True, capture_output=True, text=True
    ).stdout
    text = (ROOT / "docs" / "evaluate.md").read_text()
    assert re.search(re.escape(table), text), "fill docs/evaluate.md with `python tools/ship_policy.py --table`"
