"""Run directories: made once, never overwritten, read back strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.job_config import JobConfig
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.run_directory import RunDirectory, read_config, write_bytes


def test_config_comes_back_whole(tmp_path: Path) -> None:
    config = GrowConfig(task="digits", seed=3, inject=("nan@4",)).replace(repeats=2)
    made = RunDirectory.create(tmp_path / "run", config)
    assert RunDirectory.open(tmp_path / "run", GrowConfig) == (made, config)
    assert made.read_job() == "grow"


def test_a_config_from_before_there_were_other_jobs_is_that_of_a_grow_job(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: digits\nrepeats: 2\n")
    directory, config = RunDirectory.open(tmp_path, GrowConfig)
    assert directory.read_job() == "grow"
    assert config == GrowConfig(task="digits", repeats=2)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [(GrowConfig(), PPOJobConfig), (PPOJobConfig(env="CartPole-v1"), GrowConfig)],
)
def test_the_config_of_another_job_is_refused(tmp_path: Path, config: JobConfig, wrong: type[JobConfig]) -> None:
    made = RunDirectory.create(tmp_path / "run", config)
    assert made.read_job() == config.model_dump()["job"]
    with pytest.raises(ValueError, match=f"`job` must be '{wrong.model_fields['job'].default}' here, got '{made.read_job()}'"):
        RunDirectory.open(made.path, wrong)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("job: ppo\nenv: X-v0\nppo: {learning_rate: 1e-3, gamma: .9}\n")
    _, config = RunDirectory.open(tmp_path, PPOJobConfig)
    assert (config.ppo.learning_rate, config.ppo.gamma) == (0.001, 0.9)


def test_the_pointer_keeps_one_checkpoint_and_what_it_is_told_to(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", GrowConfig())
    assert directory.read_pointer() is None
    for name in ("a", "b", "c"):
        (directory.checkpoints / name).mkdir()
    directory.point_at("b", keep=["a"], log_offset=7)
    assert directory.read_pointer() == {"checkpoint": "b", "log_offset": 7}
    assert sorted(entry.name for entry in directory.checkpoints.glob("*/")) == ["a", "b"]
    (directory.checkpoints / "current.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"current\.json: is not JSON"):
        directory.read_pointer()


def test_free_names_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [RunDirectory.create(None, GrowConfig(task="digits")).path.name for _ in range(2)]
    assert names == ["digits-heuristic-1", "digits-heuristic-2"]
    assert RunDirectory.create(None, PPOJobConfig(env="ALE/Pong-v5")).path.name == "ALE-Pong-v5-ppo-1"


def test_a_directory_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(MorphogenError, match="must be a new or empty directory"):
        RunDirectory.create(tmp_path, GrowConfig())
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MorphogenError, match="must be a new or empty directory"):
        RunDirectory.create(tmp_path / "file", GrowConfig())
    with pytest.raises(MorphogenError, match="cannot be written"):
        RunDirectory.create(tmp_path / "file" / "below", GrowConfig())


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("task: [", MorphogenError, "is not YAML"),
        ("just words", MorphogenError, "must hold"),
        ("taks: digits", ValueError, "Did you mean `task`"),
        ("repeats: 0", ValueError, "`repeats` must be greater than or equal to 1, got 0"),
        ("governor: {patiense: 3}", ValueError, "patiense"),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path: Path, text: str, kind: type[Exception], words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(kind, match=words):
        read_config(path, GrowConfig)


def test_a_missing_config_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(MorphogenError, match=r"config\.yaml: cannot be read"):
        RunDirectory.open(tmp_path, GrowConfig)


def test_a_write_that_fails_keeps_the_old_and_leaves_no_half(tmp_path: Path) -> None:
    write_bytes(tmp_path / "network", b"old")
    assert (tmp_path / "network").read_bytes() == b"old"
    (tmp_path / "taken").mkdir()
    with pytest.raises(MorphogenError, match="taken: cannot be written: Is a directory"):
        write_bytes(tmp_path / "taken", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network", "taken"]
