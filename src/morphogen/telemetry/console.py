"""Live progress on a terminal: one line that moves, and one that stays for each finished arm, rewind and fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from morphogen.telemetry.events import Json
from morphogen.telemetry.metrics import metric_text

_REDRAWS_PER_SECOND = 2
_PLAIN_SECONDS = 5.0
_SHORT = {"dormant": "·", "fossilized": "fossil"}


@final
class ConsoleSink:
    """Shows how far a job is: metric, parameters, stage of each slot, governor, time left.

    On a terminal one line is redrawn at most twice a second; elsewhere a plain line is printed every few seconds.

    Args:
        num_arms: Arms of all repeats together.
        arms_done: Arms that earlier sittings finished.
        metric: What the metric is called.
        console: Where to write; standard error by default, so that standard output stays clean.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        num_arms: int,
        *,
        arms_done: int = 0,
        metric: str = "accuracy",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display."""
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._metric = metric
        self._started = clock()
        self._printed = clock()
        self._num_arms, self._arms_done, self._at_start = num_arms, arms_done, float(arms_done)
        self._total_steps = 1
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            refresh_per_second=_REDRAWS_PER_SECOND,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._row = self._progress.add_task("starting", total=1.0, state="")
        self._progress.start()

    def write(self, record: Mapping[str, Json]) -> None:
        """Show ``record`` if it is one of the kinds a person waits for."""
        fields = cast("dict[str, Any]", record)
        kind = fields["event"]
        if kind == "ArmStarted":
            self._total_steps = fields["total_steps"]
        elif kind == "TickMeasured":
            self._show(fields)
        elif kind == "ArmFinished":
            self._arms_done += 1
            metric = metric_text(fields["test_metric"], self._metric)
            self._say(
                f"{_arm(fields)}: test {metric}, {fields['parameters']:,} parameters, "
                f"{fields['wall_seconds']:.1f} s, {fields['rollbacks']} rollbacks"
            )
        elif kind == "FaultInjected":
            self._say(f"{_arm(fields)}: step {fields['train_step']}: injected {fields['fault']}")
        elif kind == "StepSkipped":
            self._say(f"{_arm(fields)}: skipped step {fields['train_step']}: {fields['reason']}")
        elif kind == "Rollback":
            self._say(f"{_arm(fields)}: rewound from {fields['from_step']} to {fields['to_step']}: {fields['reason']}")

    def close(self) -> None:
        """Take the moving line away."""
        self._progress.stop()

    def _show(self, fields: dict[str, Any]) -> None:
        done = self._arms_done + fields["train_step"] / self._total_steps
        slots = " ".join(f"{name}:{_SHORT.get(stage, stage)}" for name, stage in fields["stages"].items())
        state = (
            f"{metric_text(fields['metric'], self._metric)}  {fields['parameters']:,} par  {slots}  {fields['governor']}  "
            f"ETA {_clock_text(self._remaining(done))}"
        )
        title = f"{min(self._arms_done + 1, self._num_arms)}/{self._num_arms} {_arm(fields)}"
        share = fields["train_step"] / self._total_steps
        self._progress.update(self._row, description=title, completed=share, state=state)
        if not self._console.is_terminal and self._clock() - self._printed >= _PLAIN_SECONDS:
            self._printed = self._clock()
            self._say(f"{title} step {fields['train_step']}/{self._total_steps}  {state}")

    def _remaining(self, done: float) -> float | None:
        """Seconds left, if the rest goes at the pace of this sitting."""
        here = done - self._at_start
        return None if here <= 0 else (self._clock() - self._started) * (self._num_arms - done) / here

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _arm(fields: dict[str, Any]) -> str:
    return f"{fields['arm']} #{fields['repeat']}"


def _clock_text(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
