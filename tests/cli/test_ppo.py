"""`morphogen ppo` as a new user meets it: real processes, exit codes, one clear line for each mistake."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from morphogen.cli import main

SMALL = ("--env", "CartPole-v1", "--steps", "256", "--num-envs", "2", "--set", "rollout_steps=32", "--eval-episodes", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
FAILING = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Failing(CartPoleEnv):
    steps = 0
    def step(self, action):
        Failing.steps += 1
        if Failing.steps == 300:
            raise RuntimeError("the motor is on fire")
        return super().step(action)

gym.register("Failing-v0", entry_point=Failing)
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "morphogen", *words]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


def run_here(*words: str) -> int:
    """Run in this process, which has torch loaded; returns the exit code."""
    with pytest.raises(SystemExit) as exit_:
        main.main(words)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_ppo_trains_evaluates_and_says_where_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("ppo", *SMALL, "--seed", "7", "--memory", "gru", "--critic", "quantile", "--normalize") == 0
    out = Path("runs") / "CartPole-v1-ppo-1"
    printed = capsys.readouterr()
    assert "over 2 evaluation episodes, after 256 steps." in printed.out
    assert f"In {out}: report.html, summary.json, policy" in printed.out
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["job"], config["env"], config["total_steps"], config["evaluation_episodes"]) == (
        "ppo",
        "CartPole-v1",
        256,
        2,
    )
    ppo = config["ppo"]
    assert (ppo["seed"], ppo["num_envs"], ppo["rollout_steps"]) == (7, 2, 32)
    assert (ppo["policy"]["memory"], ppo["critic"]["kind"]) == ("gru", "quantile")
    assert ppo["normalize_observations"] is ppo["normalize_rewards"] is True
    assert run_here("report", str(out)) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert run_here("resume", str(out)) == 0
    assert "over 2 evaluation episodes, after 256 steps." in capsys.readouterr().out


def test_a_written_config_runs_again_and_flags_win_over_it(tmp_path: Path) -> None:
    assert run_here("ppo", *SMALL, "--out", str(tmp_path / "first")) == 0
    config = str(tmp_path / "first" / "config.yaml")
    assert run_here("ppo", "--config", config, "--out", str(tmp_path / "again")) == 0
    assert run_here("ppo", "--config", config, "--seed", "1", "--set", "gamma=0.5", "--out", str(tmp_path / "other")) == 0
    written = {name: yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("first", "again", "other")}
    assert written["again"] == written["first"]
    assert written["other"] == {**written["first"], "ppo": {**written["first"]["ppo"], "seed": 1, "gamma": 0.5}}
    reached = {name: json.loads((tmp_path / name / "summary.json").read_text())["evaluation"] for name in written}
    assert reached["again"] == reached["first"]


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("--steps", "9"), "`--env` must be given", 2),
        (("--env", "CartPole-v7"), "got 'CartPole-v7'", 2),
        (("--env", "CartPol-v1"), "Did you mean: `CartPole`", 2),
        (("--env", "CartPole-v1", "--steps", "0"), "`total_steps` must be greater than or equal to 1, got 0", 2),
        (("--env", "CartPole-v1", "--num-envs", "0"), "`num_envs` must be greater than or equal to 1, got 0", 2),
        (("--env", "CartPole-v1", "--memory", "lsmt"), "`memory` must be 'none', 'lstm' or 'gru', got 'lsmt'", 2),
        (("--env", "CartPole-v1", "--critic", "median"), "`kind` must be 'scalar', 'quantile' or 'categorical'", 2),
        (("--env", "CartPole-v1", "--device", "cuda:77"), "`device` must", 2),
        (("--env", "CartPole-v1", "--set", "learning_rat=1e-3"), "Did you mean `learning_rate`?", 2),
        (("--env", "CartPole-v1", "--set", "gamma"), "`--set` must be given name=value", 2),
        (("--env", "CartPole-v1", "--set", "gamma=2"), "`gamma` must be less than or equal to 1", 2),
        (("--env", "CartPole-v1", "--seed", "3", "--set", "seed=4"), "`seed` must be given once", 2),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read", 1),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: tuple[str, ...], said: str, code: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("ppo", *words) == code
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert not list(here.iterdir())


def test_an_existing_out_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert run_here("ppo", *SMALL, "--out", str(tmp_path)) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and f"{tmp_path}: must be a new or empty directory" in printed[0]
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_the_config_of_another_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grow.yaml").write_text("task: digits\n")
    assert run_here("ppo", "--config", str(tmp_path / "grow.yaml")) == 2
    assert "`job` must be 'ppo' here, got 'grow'" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("job: dance\n")
    assert run_here("resume", str(tmp_path)) == 2
    assert "must be one of grow, ppo, train, evaluate, pbt, got 'dance'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is not None, reason="moviepy is installed")
def test_video_without_moviepy_is_one_line_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("ppo", *SMALL, "--video", "--out", str(tmp_path / "run")) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and "needs moviepy" in printed[0]
    assert not (tmp_path / "run").exists()


def test_an_environment_that_fails_is_one_line_that_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    words = ("--env", "failing:Failing-v0", *SMALL[2:], "--steps", "512", "--out", "run")
    failed = run("ppo", *words, cwd=tmp_path)
    assert failed.returncode == 1
    said = failed.stderr.strip().splitlines()[-1]
    assert said.startswith("morphogen: environment ") and "the motor is on fire" in said
    assert said.endswith("Go on with: morphogen resume run")
    assert "Traceback" not in failed.stderr
    (tmp_path / "failing.py").write_text(FAILING.replace("300", "-1"))
    resumed = run("resume", "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "after 512 steps" in resumed.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*SMALL[:2], *SMALL[4:], "--steps", "1000000", "--out", str(out))
    started = subprocess.Popen(
        command("ppo", *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    log = out / "events.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and "Updated" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(number)
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == 130
    assert f"Interrupted. Go on with: morphogen resume {out}" in printed
    [checkpoint] = (out / "checkpoints").glob("*/")
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["total_steps"] = int(checkpoint.name.removeprefix("step-")) + 64  # what is left of a million would take long
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_here("resume", str(out)) == 0
