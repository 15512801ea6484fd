"""`morphogen resume` and `morphogen report`: what can be done with any run directory."""

from __future__ import annotations

import importlib

from morphogen.cli.codes import DONE
from morphogen.cli.commands import Report, Resume
from morphogen.errors import MorphogenError
from morphogen.recipes.run_directory import RunDirectory
from morphogen.telemetry.report import write_report

_JOBS = ("grow", "ppo", "train", "evaluate", "pbt")
"""Each is a module here with a function ``resume``."""


def resume(command: Resume) -> int:
    """Go on with a job of whichever kind."""
    job = RunDirectory(command.run).read_job()
    if job not in _JOBS:
        raise ValueError(f"{command.run}: `job` in config.yaml must be one of {', '.join(_JOBS)}, got {job!r}. Restore it.")
    if command.accept_changes and job != "pbt":
        raise ValueError(f"`--accept-changes` must be left out: no setting of a job `{job}` can change once it has begun.")
    return importlib.import_module(f"morphogen.cli.{job}").resume(command)


def report(command: Report) -> int:
    """Write the report again."""
    if not RunDirectory(command.run).events.exists():
        raise MorphogenError(f"{command.run}: holds no events.jsonl, so there is nothing to report. Check the path.")
    print(write_report(command.run))
    return DONE
