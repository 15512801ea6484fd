"""What a person sees while a job runs, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from morphogen.rl.events import EpisodesRestarted, Updated
from morphogen.telemetry.console import ConsoleSink, PPOConsoleSink, TrainConsoleSink
from morphogen.telemetry.events import Json, record_of


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plain() -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def update(step: int, **values: float) -> dict[str, Json]:
    numbers = dict.fromkeys(
        ("mean_return", "mean_length", "policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "gradient_norm",
         "explained_variance", "explained_variance_after", "learning_rate", "clip_range", "entropy_coef"),
        0.25,
    )  # fmt: skip
    counts = {"update": 1, "episodes": 3, "epochs": 4, "skipped_minibatches": 0, "steps_per_second": 1000.0}
    return record_of(Updated(step=step, **{**numbers, **counts, **values}))  # pyright: ignore[reportArgumentType]


def test_a_line_every_few_seconds_tells_how_ppo_goes(plain: Console, clock: Clock) -> None:
    sink = PPOConsoleSink(10_000, console=plain, clock=clock)
    for second in range(0, 14, 2):
        clock.seconds = second
        sink.write(update(1000 + 500 * second, mean_return=12.345, mean_length=20.0, kl=0.0123, explained_variance=0.5))
    sink.close()
    assert printed(plain) == [
        "step 4,000/10,000  return 12.35  length 20  KL 0.0123  EV 0.5  1,000 steps/s  ETA 0:12",
        "step 7,000/10,000  return 12.35  length 20  KL 0.0123  EV 0.5  1,000 steps/s  ETA 0:06",
    ]


def test_the_first_eta_comes_from_the_first_update(plain: Console, clock: Clock) -> None:
    sink = PPOConsoleSink(61_000, console=plain, clock=clock)
    clock.seconds = 5.0
    sink.write(update(1000, mean_return=float("nan")))
    assert printed(plain) == ["step 1,000/61,000  return -  length 0.25  KL 0.25  EV 0.25  1,000 steps/s  ETA 1:00"]


def test_what_nobody_should_miss_stays(plain: Console, clock: Clock) -> None:
    sink = PPOConsoleSink(1000, console=plain, clock=clock)
    sink.write(update(100, skipped_minibatches=2))
    sink.write({"event": "Evaluated", "step": 100, "episodes": 5, "mean_return": 3.5, "std_return": 0.5, "mean_length": 9.0})
    sink.write(record_of(EpisodesRestarted(step=100, reason="it differs")))
    sink.write({"event": "PPOFinished", "step": 1000})
    sink.close()
    assert printed(plain) == [
        "step 100: 2 minibatches were not finite, skipped",
        "step 100: return 3.5 ± 0.5 over 5 evaluation episodes",
        "step 100: episodes under way were begun anew: it differs",
    ]


def test_a_line_tells_what_networks_come_to(plain: Console, clock: Clock) -> None:
    sink = TrainConsoleSink(100, metric="accuracy", console=plain, clock=clock)
    clock.seconds = 6.0
    sink.write(update(20, mean_return=float("nan"), kl=0.01, explained_variance=0.5, steps_per_second=2.5))
    sink.write({"event": "EpisodesAveraged", "step": 40, "metric": 0.625, "parameters": 1234.4, "rollbacks": 3})
    clock.seconds = 12.0
    sink.write(update(40, mean_return=1.5, kl=0.01, explained_variance=0.5, steps_per_second=2.5, skipped_minibatches=1))
    sink.write({"event": "EpisodesAveraged", "step": 60, "metric": "nan", "parameters": 10.0, "rollbacks": 3})
    clock.seconds = 18.0
    sink.write(update(60, mean_return=1.5, kl=0.01, explained_variance=0.5, steps_per_second=2.5))
    sink.close()
    assert printed(plain) == [
        "decision 20/100  return -  no network done yet  KL 0.01  EV 0.5  2.5 decisions/s  ETA 0:32",
        "decision 40/100  return 1.5  62.5%  1,234 par  3 faults  KL 0.01  EV 0.5  2.5 decisions/s  ETA 0:18",
        "decision 40: 1 minibatches were not finite, skipped",
        "decision 60/100  return 1.5  n/a  10 par  3 faults  KL 0.01  EV 0.5  2.5 decisions/s  ETA 0:12",
    ]


def test_on_a_terminal_the_line_is_redrawn_and_taken_away(clock: Clock) -> None:
    terminal = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    sink = PPOConsoleSink(1000, console=terminal, clock=clock)
    for step in (100, 200):
        clock.seconds = step
        sink.write(update(step))
    sink.close()
    assert isinstance(terminal.file, io.StringIO)
    shown = terminal.file.getvalue()
    assert "step 200/1,000" in shown and "\x1b[" in shown
    assert shown.rstrip().endswith("\x1b[2K"), "nothing is left of it"


def test_the_line_of_a_grow_job(plain: Console, clock: Clock) -> None:
    sink = ConsoleSink(4, arms_done=1, console=plain, clock=clock)
    base: dict[str, Json] = {"arm": "grown", "repeat": 0, "train_step": 50}
    sink.write({"event": "ArmStarted", **base, "total_steps": 100})
    clock.seconds = 6.0
    measured: dict[str, Json] = {"metric": 0.5, "parameters": 1234, "stages": {"early": "dormant"}, "governor": "healthy"}
    sink.write({"event": "TickMeasured", **base, **measured})
    sink.write({"event": "Rollback", **base, "from_step": 50, "to_step": 20, "reason": "a spike"})
    sink.close()
    assert printed(plain) == [
        "2/4 grown #0 step 50/100  50.0%  1,234 par  early:·  healthy  ETA 0:30",
        "grown #0: rewound from 50 to 20: a spike",
    ]
