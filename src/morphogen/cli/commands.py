"""The commands and their flags. Importing this imports neither torch nor any recipe: ``--help`` is quick.

A flag left out keeps the config's value, so each default is declared once, in the config beside its user.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """List the built-in tasks, and whether their data is here or how to get it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow:
    """Train a network that grows, beside the static host and the full-size reference."""

    task: Annotated[str | None, arg(metavar="NAME")] = None
    """Which task; see `morphogen tasks` (default: mnist1d)."""
    policy: Annotated[str | None, arg(metavar="NAME")] = None
    """Who decides: wait, random, periodic or heuristic (default: heuristic)."""
    seed: Annotated[int | None, arg(metavar="N")] = None
    """Root seed of the first repeat (default: 0)."""
    repeats: Annotated[int | None, arg(metavar="N")] = None
    """Runs of each arm (default: 5)."""
    steps: Annotated[int | None, arg(metavar="N")] = None
    """Training steps of a run (default: the task's)."""
    device: Annotated[str | None, arg(metavar="DEVICE")] = None
    """Where to train: cpu, cuda, cuda:1, mps (default: cpu)."""
    inject: Annotated[tuple[str, ...], arg(metavar="FAULT@STEP"), tyro.conf.UseAppendAction] = ()
    """Inject nan@STEP or spike@STEP into the grown arm; may be repeated."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Run directory, new or empty (default: the next free one below runs/)."""
    config: Annotated[Path | None, arg(metavar="FILE.yaml")] = None
    """Every knob, as config.yaml of a run directory holds them; flags win over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run that was interrupted or killed; on a CPU bit-identically."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Its directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html of a run directory again, from its event log alone."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Its directory."""


Command = (
    Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Grow, tyro.conf.subcommand("grow")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
