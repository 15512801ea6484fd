"""Live progress on a terminal: one line that moves, and one that stays for whatever a person should not miss."""

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
    """Shows how far a grow job is: metric, parameters, stage of each slot, governor, time left.

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
        self._line = _MovingLine(console, clock)
        self._clock = clock
        self._metric = metric
        self._started = clock()
        self._num_arms, self._arms_done, self._at_start = num_arms, arms_done, float(arms_done)
        self._total_steps = 1

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
            self._line.say(
                f"{_arm(fields)}: test {metric}, {fields['parameters']:,} parameters, "
                f"{fields['wall_seconds']:.1f} s, {fields['rollbacks']} rollbacks"
            )
        elif kind == "FaultInjected":
            self._line.say(f"{_arm(fields)}: step {fields['train_step']}: injected {fields['fault']}")
        elif kind == "StepSkipped":
            self._line.say(f"{_arm(fields)}: skipped step {fields['train_step']}: {fields['reason']}")
        elif kind == "Rollback":
            self._line.say(f"{_arm(fields)}: rewound from {fields['from_step']} to {fields['to_step']}: {fields['reason']}")

    def close(self) -> None:
        """Take the moving line away."""
        self._line.close()

    def _show(self, fields: dict[str, Any]) -> None:
        step, total = fields["train_step"], self._total_steps
        slots = " ".join(f"{name}:{_SHORT.get(stage, stage)}" for name, stage in fields["stages"].items())
        state = (
            f"{metric_text(fields['metric'], self._metric)}  {fields['parameters']:,} par  {slots}  {fields['governor']}  "
            f"ETA {clock_text(self._remaining(self._arms_done + step / total))}"
        )
        title = f"{min(self._arms_done + 1, self._num_arms)}/{self._num_arms} {_arm(fields)}"
        self._line.show(title, step / total, state, plain=f"{title} step {step}/{total}  {state}")

    def _remaining(self, done: float) -> float | None:
        """Seconds left, if the rest goes at the pace of this sitting."""
        here = done - self._at_start
        return None if here <= 0 else (self._clock() - self._started) * (self._num_arms - done) / here


@final
class PPOConsoleSink:
    """Shows how far a PPO job is: return, length, KL, explained variance, speed, time left.

    Lines are redrawn or printed as by :class:`ConsoleSink`.

    Args:
        total_steps: Environment steps of the job.
        console: Where to write; standard error by default.
        clock: Seconds from any origin.
    """

    def __init__(
        self, total_steps: int, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the display."""
        self._line = _MovingLine(console, clock)
        self._pace = _Pace(total_steps, clock)

    def write(self, record: Mapping[str, Json]) -> None:
        """Show ``record`` if it is one of the kinds a person waits for."""
        fields = cast("dict[str, Any]", record)
        kind = fields["event"]
        if kind == "Updated":
            self._show(fields)
        elif kind == "Evaluated":
            spread = f"{number_text(fields['mean_return'])} ± {number_text(fields['std_return'])}"
            self._line.say(f"step {fields['step']:,}: return {spread} over {fields['episodes']} evaluation episodes")
        _say_trouble(self._line, fields, "step")

    def close(self) -> None:
        """Take the moving line away."""
        self._line.close()

    def _show(self, fields: dict[str, Any]) -> None:
        state = (
            f"return {number_text(fields['mean_return'])}  length {number_text(fields['mean_length'])}  {_learning(fields)}  "
            f"{fields['steps_per_second']:,.0f} steps/s"
        )
        self._line.go_on("step", self._pace, fields, state)


@final
class TrainConsoleSink:
    """Shows how far a train job is: what the networks came to, KL, explained variance, speed, time left.

    Lines are redrawn or printed as by :class:`ConsoleSink`.

    Args:
        total_steps: Decisions of the job.
        metric: What the metric is called.
        console: Where to write; standard error by default.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        metric: str = "accuracy",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display."""
        self._line = _MovingLine(console, clock)
        self._pace = _Pace(total_steps, clock)
        self._metric = metric
        self._networks = "no network done yet"

    def write(self, record: Mapping[str, Json]) -> None:
        """Show ``record`` if it is one of the kinds a person waits for."""
        fields = cast("dict[str, Any]", record)
        if fields["event"] == "EpisodesAveraged":
            value = fields["metric"]
            metric = metric_text(None if isinstance(value, str) else value, self._metric)
            self._networks = f"{metric}  {fields['parameters']:,.0f} par  {fields['rollbacks']} faults"
        elif fields["event"] == "Updated":
            state = (
                f"return {number_text(fields['mean_return'])}  {self._networks}  {_learning(fields)}  "
                f"{fields['steps_per_second']:.3g} decisions/s"
            )
            self._line.go_on("decision", self._pace, fields, state)
        _say_trouble(self._line, fields, "decision")

    def close(self) -> None:
        """Take the moving line away."""
        self._line.close()


class _Pace:
    """How long the rest of a job takes."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def remaining(self, step: int, speed: float) -> float | None:
        """Seconds left at the pace since the first update of this sitting; at the pace within it while there is no other."""
        now = self._clock()
        left = max(self.total_steps - step, 0)
        if self._first is None:
            self._first = (now, step)
            return left / speed if speed > 0 else None
        started, first = self._first
        return (now - started) * left / (step - first)


@final
class EvaluationConsoleSink:
    """Shows how far an evaluation is: who has played what last, time left.

    Lines are redrawn or printed as by :class:`ConsoleSink`.

    Args:
        num_episodes: Of all players together.
        episodes_done: Those of earlier sittings.
        metric: What the metric is called.
        console: Where to write; standard error by default.
        clock: Seconds from any origin.
    """

    def __init__(
        self,
        num_episodes: int,
        *,
        episodes_done: int = 0,
        metric: str = "accuracy",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display."""
        self._line = _MovingLine(console, clock)
        self._clock = clock
        self._metric = metric
        self._started = clock()
        self._num_episodes, self._done, self._at_start = num_episodes, episodes_done, episodes_done

    def write(self, record: Mapping[str, Json]) -> None:
        """Show ``record`` if it is an episode."""
        fields = cast("dict[str, Any]", record)
        if fields["event"] != "EpisodePlayed":
            return
        self._done += 1
        here = self._done - self._at_start
        left = (self._clock() - self._started) * (self._num_episodes - self._done) / here
        metric = metric_text(fields["test_metric"], self._metric)
        title = f"episode {self._done}/{self._num_episodes}"
        state = f"{fields['player']}: test {metric}, return {number_text(fields['total_return'])}  ETA {clock_text(left)}"
        self._line.show(title, self._done / self._num_episodes, state, plain=f"{title}  {state}")

    def close(self) -> None:
        """Take the moving line away."""
        self._line.close()


class _MovingLine:
    """One line that is redrawn in place on a terminal; elsewhere a plain one is printed every few seconds."""

    def __init__(self, console: Console | None, clock: Callable[[], float]) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._printed = clock()
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

    def show(self, title: str, share: float, state: str, *, plain: str) -> None:
        """Show that ``share`` of the work is done; ``plain`` is the whole line where none can be redrawn."""
        self._progress.update(self._row, description=title, completed=share, state=state)
        if not self._console.is_terminal and self._clock() - self._printed >= _PLAIN_SECONDS:
            self._printed = self._clock()
            self.say(plain)

    def go_on(self, unit: str, pace: _Pace, fields: dict[str, Any], state: str) -> None:
        """Show an update, and how long the rest takes."""
        step, total = fields["step"], pace.total_steps
        state = f"{state}  ETA {clock_text(pace.remaining(step, fields['steps_per_second']))}"
        title = f"{unit} {step:,}/{total:,}"
        self.show(title, min(step / total, 1.0), state, plain=f"{title}  {state}")

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the line away."""
        self._progress.stop()


def _arm(fields: dict[str, Any]) -> str:
    return f"{fields['arm']} #{fields['repeat']}"


def _learning(fields: dict[str, Any]) -> str:
    return f"KL {number_text(fields['kl'])}  EV {number_text(fields['explained_variance'])}"


def _say_trouble(line: _MovingLine, fields: dict[str, Any], unit: str) -> None:
    """Say what a person who trains an agent should not miss."""
    if fields["event"] == "Updated" and fields["skipped_minibatches"]:
        line.say(f"{unit} {fields['step']:,}: {fields['skipped_minibatches']} minibatches were not finite, skipped")
    elif fields["event"] == "EpisodesRestarted":
        line.say(f"{unit} {fields['step']:,}: episodes under way were begun anew: {fields['reason']}")


def number_text(value: float | str) -> str:
    """Return ``value`` to four digits; records name what is not finite, and NaN means that there is nothing yet."""
    if isinstance(value, str):
        return "-" if value == "nan" else value
    return f"{value:.4g}"


def clock_text(seconds: float | None) -> str:
    """Return ``seconds`` as minutes and seconds."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
