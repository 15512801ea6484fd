"""Live progress of a population: a table of its members on a terminal, elsewhere a line for each interval."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from morphogen.telemetry.console import clock_text, number_text
from morphogen.telemetry.events import Json

_REDRAWS_PER_SECOND = 2
_UNKNOWN = "-"


@dataclasses.dataclass
class _Row:
    """What is known of a member."""

    interval: int = 0
    score: float = math.nan
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    parent: str = ""
    exploits: int = 0
    problem: str = ""


@final
class PopulationConsoleSink:
    """Shows how a population does: each member's score, hyperparameters, whom it took over last, how often it did.

    On a terminal the table is redrawn at most twice a second; elsewhere a plain line is printed when an interval is done.

    Args:
        population_size: Members.
        num_intervals: Intervals of each.
        mode: Whether "max" or "min" is better.
        before: Records of earlier sittings.
        console: Where to write; standard error by default.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        population_size: int,
        num_intervals: int,
        *,
        mode: str = "max",
        before: Sequence[Mapping[str, Json]] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display."""
        self._console = console or Console(stderr=True)
        self._clock, self._started = clock, clock()
        self._rows = [_Row() for _ in range(population_size)]
        self._num_intervals, self._sign = num_intervals, 1.0 if mode == "max" else -1.0
        for record in before:
            self._take(cast("dict[str, Any]", record))
        self._num_reports, self._shown_interval = 0, self._done
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._view, console=self._console, refresh_per_second=_REDRAWS_PER_SECOND, transient=True
            )
            self._live.start()

    def write(self, record: Mapping[str, Json]) -> None:
        """Show ``record`` if it is about a member."""
        fields = cast("dict[str, Any]", record)
        self._take(fields)
        kind = fields["event"]
        if kind == "MemberLost":
            self._say(f"member {fields['member']} was lost in interval {fields['interval']}: {_first_line(fields['problem'])}")
        elif kind == "SourceRefused":
            self._say(f"member {fields['member']} could not take over {fields['source']}: {_first_line(fields['reason'])}")
        if kind in ("MemberReported", "MemberLost"):
            self._num_reports += 1
            if self._live is None and self._done > self._shown_interval:
                self._shown_interval = self._done
                self._say(self._summary())

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()

    @property
    def _done(self) -> int:
        """Intervals that all members have behind them."""
        return min(row.interval for row in self._rows)

    def _take(self, fields: dict[str, Any]) -> None:
        """Note what ``fields`` say of a member."""
        kind = fields["event"]
        if kind not in ("MemberReported", "MemberLost", "MemberExploited"):
            return
        row = self._rows[fields["member"]]
        if kind == "MemberReported":
            row.interval, row.score, row.problem = fields["interval"], float(fields["score"]), ""
            row.hyperparameters = fields["hyperparameters"]
        elif kind == "MemberLost":
            row.interval, row.score, row.problem = fields["interval"], math.nan, "lost"
        else:
            row.hyperparameters, row.problem = fields["hyperparameters"], ""
            if fields["reason"] != "explore":
                row.parent, row.exploits = f"{fields['source']} @ {fields['step']:,}", row.exploits + 1

    def _summary(self) -> str:
        finite = [row.score for row in self._rows if math.isfinite(row.score)]
        best = max(range(len(self._rows)), key=self._rank)
        mean = number_text(sum(finite) / len(finite)) if finite else _UNKNOWN
        exploits = sum(row.exploits for row in self._rows)
        return (
            f"interval {self._done}/{self._num_intervals}  best {number_text(self._rows[best].score)} (member {best})  "
            f"mean {mean}  {exploits} exploits  ETA {clock_text(self._remaining())}"
        )

    def _rank(self, member: int) -> float:
        score = self._rows[member].score
        return self._sign * score if math.isfinite(score) else -math.inf

    def _remaining(self) -> float | None:
        """Seconds left, if the rest goes at the pace of this sitting."""
        if not self._num_reports:
            return None
        left = sum(self._num_intervals - row.interval for row in self._rows)
        return (self._clock() - self._started) * left / self._num_reports

    def _view(self) -> Group:
        """Return a line about all and a table of each."""
        names = sorted({name for row in self._rows for name in row.hyperparameters})
        table = Table(box=None, pad_edge=False)
        for column in ("member", "interval", "score", *names, "parent", "exploits"):
            table.add_column(column, justify="right")
        for member, row in enumerate(self._rows):
            values = [_text(row.hyperparameters.get(name, _UNKNOWN)) for name in names]
            score = row.problem or (number_text(row.score) if row.interval and math.isfinite(row.score) else _UNKNOWN)
            table.add_row(f"{member}", f"{row.interval}", score, *values, row.parent or _UNKNOWN, f"{row.exploits}")
        return Group(self._summary(), table)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _first_line(text: str) -> str:
    return text.split("\n")[0]
