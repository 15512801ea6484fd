"""Where a job keeps its files: ``config.yaml``, ``events.jsonl``, ``checkpoints/``, ``networks/``, ``summary.json``, ..."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.recipes.job_config import JobConfig
from morphogen.recipes.yaml_text import parse_yaml
from morphogen.telemetry.events import Json

_JOB_OF_OLD_CONFIGS = "grow"  # those written when there was no other job
_Kind = TypeVar("_Kind", bound=JobConfig)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The layout of one run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole config; reloadable."""
        return self.path / "config.yaml"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoint to resume from, and which it is."""
        return self.path / "checkpoints"

    @property
    def networks(self) -> Path:
        """The grown network of every repeat."""
        return self.path / "networks"

    @property
    def summary(self) -> Path:
        """Results so far; complete at the end."""
        return self.path / "summary.json"

    @classmethod
    def create(cls, path: Path | None, config: JobConfig) -> RunDirectory:
        """Make the directory and write the config.

        Args:
            path: Where; None for the next free ``runs/<run_name>-<number>``.
            config: What will run.

        Raises:
            MorphogenError: It exists and is not empty, or cannot be written.
        """
        where = path or _next_free(Path("runs"), config.run_name)
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            raise MorphogenError(
                f"{where}: must be a new or empty directory. Go on with `morphogen resume {where}`, or choose another --out."
            )
        directory = cls(where)
        content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        try:
            directory.checkpoints.mkdir(parents=True)
            write_text(directory.config, content)
        except OSError as error:
            raise MorphogenError(f"{where}: cannot be written: {error.strerror}. Choose another --out.") from error
        return directory

    @classmethod
    def open(cls, path: Path, kind: type[_Kind]) -> tuple[RunDirectory, _Kind]:
        """Return an existing run directory and its config.

        Raises:
            MorphogenError: There is no run there, or its config is damaged.
            ValueError: It is the run of another kind of job.
        """
        directory = cls(path)
        return directory, read_config(directory.config, kind)

    def read_job(self) -> str:
        """Return which kind of job ran here, as its config says.

        Raises:
            MorphogenError: There is no run here, or its config is damaged.
        """
        return str(_content(self.config).get("job", _JOB_OF_OLD_CONFIGS))

    def read_summary(self) -> dict[str, Any]:
        """Return what :meth:`write_summary` wrote, or an empty dict."""
        if not self.summary.exists():
            return {}
        try:
            return json.loads(self.summary.read_text())
        except ValueError as error:
            raise MorphogenError(f"{self.summary}: is not JSON: {error}. Restore it, or start a new run.") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace the summary."""
        write_text(self.summary, json.dumps(summary, indent=1))

    def read_pointer(self) -> dict[str, Any] | None:
        """Return what :meth:`point_at` wrote, the name under ``checkpoint``; None if there is no checkpoint yet.

        Raises:
            CheckpointError: It is damaged.
        """
        path = self._pointer
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON: {error}. Delete it to begin anew what was under way.") from error

    def point_at(self, checkpoint: str, *, keep: Collection[str] = (), **facts: Json) -> None:
        """Make ``checkpoint``, which must be whole, the one to resume from; then remove all others but those to ``keep``."""
        write_text(self._pointer, json.dumps({"checkpoint": checkpoint, **facts}))
        self.remove_checkpoints({checkpoint, *keep})

    def remove_checkpoints(self, keep: Collection[str] = ()) -> None:
        """Remove all checkpoints but those to ``keep``."""
        for old in self.checkpoints.iterdir():
            if old.is_dir() and old.name not in keep:
                shutil.rmtree(old)

    @property
    def _pointer(self) -> Path:
        return self.checkpoints / "current.json"


def read_config(path: Path, kind: type[_Kind]) -> _Kind:
    """Return the config in the YAML file at ``path``; unknown keys are errors.

    Raises:
        MorphogenError: The file is missing or not YAML.
        ValueError: It is the config of another kind of job, a key is unknown or a value wrong.
    """
    content = _content(path)
    job, wanted = content.get("job", _JOB_OF_OLD_CONFIGS), kind.model_fields["job"].default
    if job != wanted:
        raise ValueError(f"{path}: `job` must be {wanted!r} here, got {job!r}. Use `morphogen {job}`, or another file.")
    return kind(**content)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text())
    except OSError as error:
        raise MorphogenError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except ValueError as error:
        raise MorphogenError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise MorphogenError(f"{path}: must hold `name: value` lines, got {type(content).__name__}.")
    return {str(name): value for name, value in cast("dict[object, Any]", content).items()}


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path``; see :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file at ``path``; it holds the old or the new content at any moment.

    Raises:
        MorphogenError: The disk refused; the old content is still there, and no half of the new.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise MorphogenError(f"{path}: cannot be written: {error.strerror}. What was there before is whole.") from error


def _next_free(parent: Path, stem: str) -> Path:
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"
