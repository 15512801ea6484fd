"""Run directories: made once, never overwritten, read back strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphogen.errors import MorphogenError
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.run_directory import RunDirectory, read_config, write_bytes


def test_config_comes_back_whole(tmp_path: Path) -> None:
    config = GrowConfig(task="digits", seed=3, inject=("nan@4",)).replace(repeats=2)
    made = RunDirectory.create(tmp_path / "run", config)
    assert RunDirectory.open(tmp_path / "run") == (made, config)


def test_free_names_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [RunDirectory.create(None, GrowConfig(task="digits")).path.name for _ in range(2)]
    assert names == ["digits-heuristic-1", "digits-heuristic-2"]


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
        read_config(path)


def test_a_missing_config_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(MorphogenError, match=r"config\.yaml: cannot be read"):
        RunDirectory.open(tmp_path)


def test_a_write_that_fails_keeps_the_old_and_leaves_no_half(tmp_path: Path) -> None:
    write_bytes(tmp_path / "network", b"old")
    assert (tmp_path / "network").read_bytes() == b"old"
    (tmp_path / "taken").mkdir()
    with pytest.raises(MorphogenError, match="taken: cannot be written: Is a directory"):
        write_bytes(tmp_path / "taken", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network", "taken"]
