"""`morphogen pbt` as a new user meets it: exit codes, one clear line for each mistake, stopping and going on."""

from __future__ import annotations

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

SMALL = (
    *("--env", "CartPole-v1", "--population", "2", "--steps", "128", "--interval", "64", "--envs", "2"),
    *("--set", "pbt.truncation_ratio=0.5", "--set", "ppo.rollout_steps=32", "--set", "ppo.epochs=1"),
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


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
def test_pbt_trains_replays_and_says_where_everything_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("pbt", *SMALL, "--seed", "7", "--set", "pbt.mode=max") == 0
    out = Path("runs") / "CartPole-v1-pbt-1"
    printed = capsys.readouterr()
    assert "Best: member " in printed.out and "learning_rate " in printed.out
    assert f"In {out}: policy, schedule.yaml, report.html, summary.json" in printed.out
    assert "interval 2/2  best " in printed.err
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["job"], config["env"], config["engine"], config["ppo"]["num_envs"]) == ("pbt", "CartPole-v1", "inline", 2)
    pbt = config["pbt"]
    assert (pbt["population_size"], pbt["total_steps"], pbt["perturbation_interval"], pbt["seed"]) == (2, 128, 64, 7)
    assert pbt["truncation_ratio"] == 0.5 and config["ppo"]["epochs"] == 1
    assert run_here("pbt", "replay", str(out)) == 0
    assert "2 of 2 scores are bit-identical to those of the run; so are the parameters at the end." in capsys.readouterr().out
    assert run_here("report", str(out)) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert run_here("resume", str(out)) == 0
    assert "Best: member " in capsys.readouterr().out


def test_a_written_config_runs_again_and_flags_win_over_it(tmp_path: Path) -> None:
    searched = "pbt.hyperparameters={clip_range: {kind: ordered, values: [0.1, 0.2, 0.3]}}"
    assert run_here("pbt", *SMALL, "--set", searched, "--out", str(tmp_path / "first")) == 0
    config = str(tmp_path / "first" / "config.yaml")
    assert run_here("pbt", "--config", config, "--out", str(tmp_path / "again")) == 0
    other = ("--seed", "1", "--set", "pbt.exploit_method=binary_tournament", "--set", "ppo.gamma=0.5")
    assert run_here("pbt", "--config", config, *other, "--out", str(tmp_path / "other")) == 2, "the ratio is in the file"
    assert run_here("pbt", "--config", config, *other[:2], *other[4:], "--out", str(tmp_path / "other")) == 0
    written = {name: yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("first", "again", "other")}
    first = written["first"]
    assert first["pbt"]["hyperparameters"]["clip_range"]["values"] == [0.1, 0.2, 0.3] and first["ppo"]["learning_rate"] == 3e-4
    assert written["again"] == first
    assert written["other"] == {**first, "pbt": {**first["pbt"], "seed": 1}, "ppo": {**first["ppo"], "gamma": 0.5}}
    scores = {name: json.loads((tmp_path / name / "summary.json").read_text())["scores"] for name in ("first", "again")}
    assert scores["again"] == scores["first"]


def test_the_controllers_of_growth_are_members_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--member", "growth", "--task", "digits", "--envs", "1", "--steps", "4", "--interval", "2", "--population", "2")
    settings = ("growth_env.total_steps=4", "growth_env.tick_steps=2", "pbt.truncation_ratio=0.5", "ppo.policy.memory_width=8")
    assert (
        run_here("pbt", *words, *(word for text in settings for word in ("--set", text)), "--out", str(tmp_path / "run")) == 0
    )
    assert f"In {tmp_path / 'run'}: policy.safetensors, schedule.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        ((), '`env` must be given with the member "ppo"', 2),
        (("--member", "growth"), '`task` must be given with the member "growth"', 2),
        (("--member", "growth", "--task", "digit"), "Did you mean 'digits'?", 2),
        (("--member", "pppo", "--env", "CartPole-v1"), "Did you mean 'ppo'?", 2),
        (("--env", "CartPole-v7"), "got 'CartPole-v7'", 2),
        (("--env", "CartPole-v1", "--engine", "proceses"), "Did you mean 'processes'?", 2),
        (("--env", "CartPole-v1", "--population", "1"), "`population_size` must be greater than or equal to 2, got 1", 2),
        (("--env", "CartPole-v1", "--population", "4"), "`truncation_ratio` must be at least 0.25 with 4 members", 2),
        (("--env", "CartPole-v1", "--steps", "100"), "`perturbation_interval` must be below total_steps, 100, got 5000", 2),
        (("--env", "CartPole-v1", "--interval", "10"), "`pbt.perturbation_interval` must be at least a rollout", 2),
        (("--env", "CartPole-v1", "--set", "pbt.quantile_fraction=0.2"), "it is called `pbt.truncation_ratio` here", 2),
        (("--env", "CartPole-v1", "--set", "pbt.popultion_size=4"), "Did you mean `pbt.population_size`?", 2),
        (("--env", "CartPole-v1", "--set", "ppo.learning_rat=1"), "Did you mean `ppo.learning_rate`?", 2),
        (("--env", "CartPole-v1", "--set", "pbt.hyperparameters.gamma=1"), "Set `pbt.hyperparameters` as a whole", 2),
        (
            ("--env", "CartPole-v1", "--set", "pbt.hyperparameters={gama: {kind: logit, low: 0.9, high: 0.99}}"),
            "Did you mean `gamma`?",
            2,
        ),
        (("--env", "CartPole-v1", "--seed", "3", "--set", "pbt.seed=4"), "`pbt.seed` must be given once", 2),
        (("--env", "CartPole-v1", "--set", "pbt.straggler_deadline=3"), "`straggler_deadline` must be left out", 2),
        (("--env", "CartPole-v1", "--engine", "processes", "--set", "engine_options={gpus: 1}"), "`options` must be those", 2),
        (("--env", "CartPole-v1", "--set", "ppo.device=cuda:77"), "`device` must", 2),
        (("replay",), "`morphogen pbt` takes options, or `replay RUN`, got 'replay'", 2),
        (("rerun", "x"), "got 'rerun x'", 2),
        (("replay", "nowhere", "--seed", "3"), "`--seed` must be left out with `replay RUN`", 2),
        (("replay", "nowhere"), "cannot be read", 1),
        (("--config", "nowhere.yaml"), "nowhere.yaml: cannot be read", 1),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: tuple[str, ...], said: str, code: int, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("pbt", *words) == code
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert not list(here.iterdir())


@pytest.mark.parametrize("engine", ["inline", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_signal_ends_the_job_and_says_how_to_go_on(engine: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "--steps", "100000", "--engine", engine, "--out", str(out)]
    started = subprocess.Popen(
        [sys.executable, "-m", "morphogen", "pbt", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    log = out / "events.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and "MemberReported" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to everybody
    printed, said = started.communicate(timeout=120)
    assert started.returncode == 130, said
    assert f"Interrupted. Go on with: morphogen resume {out}" in printed
    assert "Traceback" not in said
