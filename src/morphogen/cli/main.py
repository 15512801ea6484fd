"""The command line: parse, run, print; exit code 0 only if the job is done."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from morphogen.cli.codes import FAILED, INTERRUPTED, MISUSED
from morphogen.cli.commands import PBT, PPO, Command, Evaluate, Grow, Report, Resume, Tasks, Train
from morphogen.errors import MorphogenError

_DESCRIPTION = "Train PyTorch networks that change while they train."
_HANDLERS: dict[type, tuple[str, str]] = {
    Tasks: ("tasks", "show_tasks"),
    Grow: ("grow", "grow"),
    Train: ("train", "train"),
    Evaluate: ("evaluate", "evaluate"),
    PPO: ("ppo", "ppo"),
    PBT: ("pbt", "pbt"),
    Resume: ("runs", "resume"),
    Report: ("runs", "report"),
}
"""The module below ``morphogen.cli`` that does what a command says, imported when it is given, and its function."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit. Whatever is wrong is said in one line on standard error.

    Args:
        arguments: Words after ``morphogen``; those of the process by default.
    """
    command: Any = tyro.cli(Command, prog="morphogen", description=_DESCRIPTION, args=arguments)  # pyright: ignore
    module, function = _HANDLERS[type(command)]
    handler = getattr(importlib.import_module(f"morphogen.cli.{module}"), function)
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
    said = " ".join([str(error), *getattr(error, "__notes__", ())])
    print(f"morphogen: {' '.join(said.split())}", file=sys.stderr)
    return code
