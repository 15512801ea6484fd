"""The runner of the PPO benchmarks judges and reports as it says, and its adapters train what the rows say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

LIBRARIES = {"morphogen", "ppo", "recurrent", "maskable"}


def run(ppo: SimpleNamespace, arm: str, seed: int, **values: Any) -> Any:
    """Return a run of 1000 steps in 10 CPU-seconds, 6 of them in updates, unless told otherwise."""
    given = {"steps": 1000, "cpu_seconds": 10.0, "update_cpu_seconds": 6.0, "returns": (1.0,)}
    return ppo.checks.Run(arm=arm, seed=seed, training_return=None, invalid_actions=None, **{**given, **values})


def test_speed_is_the_median_of_the_ratios_of_neighbours(ppo: SimpleNamespace) -> None:
    own, other = (8.0, 2.0, 10.0), (12.0, 6.0, 10.0)  # ratios 1.5, 3, 1; of the medians it would be 1.25
    runs = [run(ppo, "a", seed, cpu_seconds=value) for seed, value in enumerate(own)]
    runs += [run(ppo, "b", seed, cpu_seconds=value) for seed, value in enumerate(other)]
    assert ppo.checks.Speed("a", "b", 1.5).outcome(runs) == ppo.checks.Outcome("a / b: speed >= 1.5", "1.50", True)
    assert not ppo.checks.Speed("a", "b", 1.6).outcome(runs).met


def test_update_cost_leaves_rollouts_out(ppo: SimpleNamespace) -> None:
    runs = [run(ppo, "a", 0, update_cpu_seconds=9.0, cpu_seconds=100.0), run(ppo, "b", 0)]
    found = ppo.checks.UpdateCost("a", "b", 1.5).outcome(runs)
    assert (found.found, found.met) == ("1.50", True)


@pytest.mark.parametrize(("good", "met"), [(5, True), (4, True), (3, False)])
def test_four_of_five(ppo: SimpleNamespace, good: int, met: bool) -> None:
    runs = [run(ppo, "a", seed, returns=(500.0, 450.0) if seed < good else (0.0,)) for seed in range(5)]
    found = ppo.checks.ReturnAtLeast("a", 475, of_five=4).outcome(runs)
    assert (found.found, found.met) == (f"{good} of 5", met)


def test_four_of_five_asks_three_of_three(ppo: SimpleNamespace) -> None:
    runs = [run(ppo, "a", seed, returns=(500.0,) if seed < 2 else (0.0,)) for seed in range(3)]
    assert not ppo.checks.ReturnAtLeast("a", 475, of_five=4).outcome(runs).met


def test_not_below_allows_one_standard_error_of_the_other(ppo: SimpleNamespace) -> None:
    other = [run(ppo, "b", seed, returns=(value,)) for seed, value in enumerate((0.0, 3.0, 6.0))]  # 3 +- sqrt(3)
    for value, met in ((1.3, True), (1.2, False)):
        found = ppo.checks.NotBelow("a", "b").outcome([*other, run(ppo, "a", 0, returns=(value,))])
        assert found.met == met


def test_actions_that_nobody_counted_are_not_none(ppo: SimpleNamespace) -> None:
    check = ppo.checks.NoInvalidActions("a")
    assert check.outcome([run(ppo, "a", 0)]).found == "not counted"
    assert not check.outcome([run(ppo, "a", 0)]).met
    counted = [dataclasses.replace(run(ppo, "a", seed), invalid_actions=count) for seed, count in ((0, 0), (1, 2))]
    assert check.outcome(counted[:1]).met
    assert check.outcome(counted).found == "2"


def test_rows_are_sound(ppo: SimpleNamespace) -> None:
    for name, row in ppo.rows.ROWS.items():
        assert {arm.library for arm in row.arms.values()} <= LIBRARIES, name
        for check in row.checks:
            assert {getattr(check, key) for key in ("arm", "other") if hasattr(check, key)} <= row.arms.keys(), name
        assert row.task.num_envs * row.task.rollout_steps % row.task.minibatch_size == 0, name
    assert len(ppo.run.judge(ppo.rows.ROWS["grow"], [run(ppo, "morphogen", 0, returns=(15.0,))])) == 2, (
        "no speed without the peer"
    )


@pytest.mark.parametrize(
    ("row", "arm"),
    [
        ("cartpole", "morphogen"),
        ("cartpole-position", "morphogen"),
        ("quantile-pendulum", "morphogen, quantile critic"),
        ("grow", "morphogen"),
        ("cartpole", "peer"),
        ("cartpole-position", "peer"),
        ("grow", "peer"),
        ("grow", "peer, a mask per dimension"),
    ],
)
def test_each_adapter_trains_and_evaluates(ppo: SimpleNamespace, row: str, arm: str) -> None:
    chosen = ppo.rows.ROWS[row]
    brief = dataclasses.replace(chosen.task, total_steps=100, num_envs=2, rollout_steps=32, minibatch_size=32, epochs=1)
    found = ppo.worker.train(arm, chosen.arms[arm], brief, seed=1, episodes=10)
    assert (found.steps, len(found.returns)) == (128, 10)
    assert 0 < found.update_cpu_seconds < found.cpu_seconds
    if brief.env == "Grow":
        assert (found.invalid_actions == 0) == (arm != "peer, a mask per dimension")
    else:
        assert found.invalid_actions is None


@pytest.mark.slow
def test_the_command_writes_a_row_beside_others(ppo: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "ppo.json"
    path.write_text('{"other": 1}')
    command = [
        sys.executable,
        ppo.run.__file__,
        "grow",
        "--seeds",
        "1",
        "--steps",
        "1024",
        "--episodes",
        "10",
        "--json",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["other"] == 1
    assert set(found["grow"]["arms"]) == {"morphogen", "peer", "peer, a mask per dimension"}
    assert found["grow"]["command"] == "python benchmarks/ppo/run.py grow --seeds 1 --steps 1024 --episodes 10"
    assert "speed" in found["grow"]["checks"][0]["asked"]
    assert "morphogen / peer: speed >= 1.5" in done.stdout
