"""`morphogen train` as a new user meets it: exit codes, one clear line for each mistake, the commands of its page."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from morphogen.cli import main

SMALL = ("--task", "digits", "--envs", "2", "--set", "env.total_steps=6", "--set", "env.tick_steps=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
PAGE = Path(__file__).parents[2] / "docs" / "train.md"
SHORTER = {
    "train": ("--steps", "12", "--envs", "2", "--set", "env.total_steps=6"),
    "evaluate": ("--episodes", "2", "--envs", "2", "--steps", "6"),
    "grow": ("--repeats", "1", "--steps", "250"),
}
"""What is added to a command of the page to try it in seconds."""


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
def test_train_says_what_came_of_it_and_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--steps", "12", "--seed", "7", "--critic", "quantile", "--reward", "sparse", "--executor", "inline")
    assert run_here("train", *SMALL, *words, "--set", "ppo.epochs=1") == 0
    out = Path("runs") / "digits-train-1"
    said = re.sub(r"-?\d+\.\d+", "#", capsys.readouterr().out)
    assert "Last 4 episodes of 12 decisions, means: return #, accuracy #% on the decision split, " in said
    assert f"In {out}: policy.safetensors, report.html, summary.json" in said
    assert f"Compare the policy with others: morphogen evaluate {out}" in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["job"], config["task"], config["total_steps"]) == ("train", "digits", 12)
    assert (config["env"]["total_steps"], config["env"]["executor"], config["env"]["reward"]["preset"]) == (
        6,
        "inline",
        "sparse",
    )
    ppo = config["ppo"]
    assert (ppo["seed"], ppo["num_envs"], ppo["epochs"], ppo["critic"]["kind"]) == (7, 2, 1, "quantile")
    assert run_here("report", str(out)) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert run_here("resume", str(out)) == 0
    assert "Last 4 episodes of 12 decisions" in capsys.readouterr().out


def test_a_written_config_runs_again_and_flags_win_over_it(tmp_path: Path) -> None:
    assert run_here("train", *SMALL, "--steps", "12", "--out", str(tmp_path / "first")) == 0
    config = str(tmp_path / "first" / "config.yaml")
    assert run_here("train", "--config", config, "--out", str(tmp_path / "again")) == 0
    assert run_here("train", "--config", config, "--seed", "1", "--out", str(tmp_path / "other")) == 0
    policies = {name: (tmp_path / name / "policy.safetensors").read_bytes() for name in ("first", "again", "other")}
    assert policies["again"] == policies["first"] != policies["other"]


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("--task", "digts"), "Did you mean 'digits'?", 2),
        (("--reward", "shapd"), "Did you mean 'shaped'?", 2),
        (("--critic", "quantil"), "Did you mean 'quantile'?", 2),
        (("--executor", "process"), "Did you mean 'processes'?", 2),
        (("--steps", "0"), "`total_steps` must be greater than or equal to 1, got 0", 2),
        (("--envs", "0"), "`num_envs` must be greater than or equal to 1, got 0", 2),
        (("--set", "ppo.gamma=0.5"), "the discount of the reward's shaping, got 0.5", 2),
        (("--set", "ppo.epoch=1"), "Did you mean `ppo.epochs`?", 2),
        (("--seed", "1", "--set", "ppo.seed=2"), "`ppo.seed` must be given once", 2),
        (("--set", "env.num_slots=1"), "num_slots` must be", 2),
        (("--set", "env.num_workers=2"), "`num_workers` must be left out", 2),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read", 1),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: tuple[str, ...], said: str, code: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("train", *words) == code
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("number", "executor"), [(signal.SIGTERM, "inline"), pytest.param(signal.SIGINT, "processes", marks=pytest.mark.slow)]
)
def test_a_signal_checkpoints_and_says_how_to_go_on(number: signal.Signals, executor: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = (*SMALL, "--executor", executor, "--steps", "1000000", "--out", str(out))
    started = subprocess.Popen(
        [sys.executable, "-m", "morphogen", "train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip
    log, deadline = out / "events.jsonl", time.monotonic() + 120
    while not (log.exists() and "Updated" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(started.pid, number)  # Ctrl-C on a terminal goes to the workers as well
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == 130
    assert f"Interrupted. Go on with: morphogen resume {out}" in printed
    [checkpoint] = (out / "checkpoints").glob("*/")
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["total_steps"] = int(checkpoint.name.removeprefix("step-")) + 6  # what is left of a million would take long
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_here("resume", str(out)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_every_command_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^morphogen (.+?)(?:\s+#.*)?$", PAGE.read_text(), flags=re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"train", "resume", "evaluate", "grow"}
    for command in commands:
        words = shlex.split(command)
        assert run_here(*words, *SHORTER.get(words[0], ())) == 0, (command, capsys.readouterr().err)
