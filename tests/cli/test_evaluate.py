"""`morphogen evaluate` and `morphogen grow --policy FILE`: flags, output, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from morphogen.cli.main import main


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_it_prints_the_table_and_the_outcome(small_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ("--against", "wait, heuristic", "--episodes", 2, "--envs", 2, "--seed", 3, "--out", out)
    assert run("evaluate", small_policy, *flags) == 0
    printed = capsys.readouterr().out
    assert "digits: " in printed and "learned" in printed and "heuristic" in printed and "FLOPs / host" in printed
    assert "Too few episodes to tell the learned policy from wait in return" in printed and "report.html" in printed
    assert "periodic" not in printed
    assert {episode["seed"] for episode in json.loads((out / "summary.json").read_text())["episodes"]} == {
        2**32 + 3_000_000,
        2**32 + 3_000_001,
    }
    assert run("resume", out) == 0  # nothing is left to do
    assert capsys.readouterr().out == printed
    assert run("report", out) == 0
    assert run("evaluate", "--config", out / "config.yaml", "--out", tmp_path / "again") == 0
    assert capsys.readouterr().out.count("heuristic") >= 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "`RUN` must be given"),
        (("nowhere",), "`policy` must be a run directory or a policy file"),
        (("{policy}", "--against", "wait,heurstic"), "Did you mean 'heuristic'?"),
        (("{policy}", "--against", ""), "`--against` must be names with commas between them"),
        (("{policy}", "--episodes", "1"), "`episodes` must be greater than or equal to 2"),
        (("{policy}", "--task", "digit"), "Did you mean 'digits'?"),
        (("{policy}", "--executor", "threads"), "`executor` must be"),
    ],
)
def test_misuse_is_said_in_one_line(
    small_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    filled = (word.format(policy=small_policy) for word in words)
    assert run("evaluate", *filled, "--out", tmp_path / "run") == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_trained_policy_grows_a_network(
    small_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_policy.parent)
    flags = ("--task", "digits", "--policy", small_policy.name, "--repeats", 1, "--steps", 8, "--out", tmp_path / "run")
    assert run("grow", *flags) == 0
    assert "grown.pt2" in capsys.readouterr().out
    assert str(small_policy) in (tmp_path / "run" / "config.yaml").read_text()  # a path that holds from elsewhere
