"""The command line as a new user meets it: real processes, exit codes, one clear line for each mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SMALL = ("--task", "digits", "--repeats", "1", "--steps", "250")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "morphogen", *words]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.mark.parametrize(
    "words",
    [("--help",), *((name, "--help") for name in ("tasks", "grow", "train", "ppo", "pbt", "resume", "report"))],
)
def test_help_fits_a_screen_and_imports_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    found = run(*words, cwd=tmp_path)
    assert found.returncode == 0
    assert "usage: morphogen" in found.stdout
    assert len(found.stdout.splitlines()) <= 40
    program = f"import sys; sys.argv = ['morphogen', *{words!r}]\nfrom morphogen.cli.main import main\ntry:\n main()\n"
    program += "except SystemExit:\n pass\nprint('torch' in sys.modules, file=sys.stderr)"
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert imported.stderr.strip() == "False"


def test_tasks_says_what_there_is_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "given"
    (place / "sotu").mkdir(parents=True)
    (place / "sotu" / "sotu.txt.gz").touch()
    monkeypatch.setenv("MORPHOGEN_DATA", str(place))
    found = run("tasks", cwd=tmp_path)
    assert found.returncode == 0
    lines = {line.split()[0]: line for line in found.stdout.splitlines()[2:] if ":" not in line.split()[0]}
    assert "comes with morphogen" in lines["mnist1d"]
    assert "perplexity" in lines["text"] and "not here" not in lines["text"]
    assert "not here" in lines["cifar10_deep"]
    assert "mnist1d: MNIST-1D" in found.stdout
    assert found.stdout.count("To get cifar10: ") == 1 and "To get sotu" not in found.stdout
    assert [path.name for path in place.rglob("*")] == ["sotu", "sotu.txt.gz"], "data was generated"


def test_grow_without_its_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path))
    found = run("grow", "--task", "cifar10", "--out", "run", cwd=tmp_path)
    assert found.returncode == 1
    assert not (tmp_path / "run").exists()
    assert "cifar10: no complete data in" in found.stderr and "cifar-10-binary.tar.gz" in found.stderr
    assert "Traceback" not in found.stderr


def test_grow_prints_the_table_and_exits_with_zero(tmp_path: Path) -> None:
    found = run("grow", *SMALL, "--inject", "nan@120", "--out", "run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for words in ("static host", "full-size reference", "grown network", "Grown against static", "report.html"):
        assert words in found.stdout
    assert "skipped step 120" in found.stderr
    again = run("report", "run", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.strip() == str(Path("run") / "report.html")


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("grow", "--task", "mnist2d"), "Did you mean 'mnist1d'?", 2),
        (("grow", "--policy", "heuristik"), "Did you mean 'heuristic'?", 2),
        (("grow", "--repeats", "0"), "`repeats` must be greater than or equal to 1, got 0", 2),
        (("grow", "--device", "cuda:77"), "`device` must", 2),
        (("grow", "--inject", "flood@3"), "nan@STEP", 2),
        (("grow", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read", 1),
        (("resume", "nowhere"), "config.yaml: cannot be read", 1),
        (("report", "nowhere"), "holds no events.jsonl", 1),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words: tuple[str, ...], said: str, code: int, tmp_path: Path) -> None:
    found = run(*words, cwd=tmp_path)
    assert found.returncode == code
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_and_an_unknown_command_are_refused(tmp_path: Path) -> None:
    for words in (("grow", "--taks", "digits"), ("grwo",)):
        found = run(*words, cwd=tmp_path)
        assert found.returncode == 2 and found.stderr


def test_an_out_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in ("file/run", "file", "/proc/run"):
        found = run("grow", *SMALL, "--out", out, cwd=tmp_path)
        assert found.returncode == 1
        assert len(found.stderr.strip().splitlines()) == 1 and out in found.stderr


def test_ctrl_c_checkpoints_says_how_to_go_on_and_that_works(tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = subprocess.Popen(
        command("grow", *SMALL, "--out", str(out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    log = out / "events.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and "TickMeasured" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == 130
    assert f"morphogen resume {out}" in printed
    found = run("resume", str(out), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "grown network" in found.stdout
    program = torch.export.load(out / "grown.pt2").module()
    assert program(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
