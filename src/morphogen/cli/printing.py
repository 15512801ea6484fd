"""Results in print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from morphogen import control
from morphogen.cli.codes import DONE, FAILED, INTERRUPTED


def result_console() -> Console:
    """Return where results go: standard output, as wide as a page where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 120)


def absolute(policy: str | None) -> str | None:
    """Return the path of a policy so that it holds when the run is resumed from elsewhere; the name of one as it is."""
    if policy is None or policy in control.names() or not Path(policy).exists():
        return policy
    return str(Path(policy).resolve())


def say_how_to_resume(directory: Path) -> int:
    """Say how to go on with an interrupted job; returns the exit code."""
    result_console().print(f"Interrupted. Go on with: morphogen resume {directory}", highlight=False, soft_wrap=True)
    return INTERRUPTED


def say_where(directory: Path, names: Sequence[str], lost_sinks: Sequence[str]) -> int:
    """Say which of the files ``names`` are in ``directory``, and which outputs are not whole; returns the exit code."""
    present = [name for name in names if (directory / name).exists()]
    result_console().print(f"In {directory}: {', '.join(present)}", highlight=False, soft_wrap=True)
    if lost_sinks:
        print(f"morphogen: output was lost: {', '.join(lost_sinks)} failed on the way.", file=sys.stderr)
        return FAILED
    return DONE
