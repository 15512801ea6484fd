"""The command line: parse, run, print; exit code 0 only if the job is done."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from morphogen.cli.commands import Command, Grow, Report, Resume, Tasks
from morphogen.errors import MorphogenError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130

_DESCRIPTION = "Train PyTorch networks that change while they train."
_HANDLERS: dict[type, str] = {Tasks: "show_tasks", Grow: "grow", Resume: "resume", Report: "report"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Whatever is wrong is said in one line on standard error.

    Args:
        arguments: Words after ``morphogen``; those of the process by default.
    """
    command: Any = tyro.cli(Command, prog="morphogen", description=_DESCRIPTION, args=arguments)  # pyright: ignore
    handler = getattr(importlib.import_module("morphogen.cli.handlers"), _HANDLERS[type(command)])
    try:
        code = handler(command)
    except (MorphogenError, OSError) as error:
        code = _complain(error, FAILED)
    except ValueError as error:
        code = _complain(error, MISUSED)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _complain(error: Exception, code: int) -> int:
    print(f"morphogen: {' '.join(str(error).split())}", file=sys.stderr)
    return code
