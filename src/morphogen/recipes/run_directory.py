"""Where a job keeps its files: ``config.yaml``, ``events.jsonl``, ``checkpoints/``, ``networks/``, ``summary.json``, ..."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import yaml

from morphogen.errors import MorphogenError
from morphogen.recipes.config import GrowConfig


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
        """The checkpoint of the arm under way."""
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
    def create(cls, path: Path | None, config: GrowConfig) -> RunDirectory:
        """Make the directory and write the config.

        Args:
            path: Where; None for the next free ``runs/<task>-<policy>-<number>``.
            config: What will run.

        Raises:
            MorphogenError: It exists and is not empty, or cannot be written.
        """
        where = path or _next_free(Path("runs"), f"{config.task}-{config.policy}")
        if where.exists() and (not where.is_dir() or any(where.iterdir())):
            raise MorphogenError(
                f"{where}: must be a new or empty directory. Go on with `morphogen resume {where}`, or choose another --out."
            )
        directory = cls(where)
        try:
            directory.networks.mkdir(parents=True)
            directory.checkpoints.mkdir()
            write_text(directory.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        except OSError as error:
            raise MorphogenError(f"{where}: cannot be written: {error.strerror}. Choose another --out.") from error
        return directory

    @classmethod
    def open(cls, path: Path) -> tuple[RunDirectory, GrowConfig]:
        """Return an existing run directory and its config.

        Raises:
            MorphogenError: There is no run there, or its config is damaged.
        """
        directory = cls(path)
        return directory, read_config(directory.config)

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


def read_config(path: Path) -> GrowConfig:
    """Return the config in the YAML file at ``path``; unknown keys are errors.

    Raises:
        MorphogenError: The file is missing or not YAML.
        ValueError: A key is unknown or a value wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise MorphogenError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MorphogenError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise MorphogenError(f"{path}: must hold `name: value` lines, got {type(content).__name__}.")
    return GrowConfig(**content)


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
