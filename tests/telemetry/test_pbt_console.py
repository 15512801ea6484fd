"""What a person sees while a population trains, on a terminal and in a file."""

from __future__ import annotations

import io

from rich.console import Console

from morphogen.telemetry.events import Json
from morphogen.telemetry.pbt_console import PopulationConsoleSink


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def reported(member: int, interval: int, score: Json) -> dict[str, Json]:
    values: dict[str, Json] = {"lr": 0.001234, "kind": "relu"}
    return {"event": "MemberReported", "member": member, "interval": interval, "score": score, "hyperparameters": values}


def exploited(member: int, source: int, **changes: Json) -> dict[str, Json]:
    values: dict[str, Json] = {"lr": 0.5, "kind": "tanh"}
    return {
        "event": "MemberExploited", "member": member, "source": source, "step": 1000, "reason": "worse",
        "hyperparameters": values, **changes,
    }  # fmt: skip


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_elsewhere_a_line_is_printed_for_each_interval() -> None:
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    sink = PopulationConsoleSink(2, 4, console=console, clock=clock)
    for second, record in enumerate((reported(0, 1, 12.5), reported(1, 1, 20.0), exploited(0, 1), reported(0, 2, "nan"))):
        clock.seconds = second + 1.0
        sink.write(record)
    sink.write({"event": "MemberLost", "member": 1, "interval": 2, "problem": "it burns\nTraceback"})
    sink.write({"event": "SourceRefused", "member": 1, "source": 0, "reason": "damaged"})
    sink.write({"event": "PopulationFinished", "best": 0})
    sink.close()
    assert text_of(console).splitlines() == [
        "interval 1/4  best 20 (member 1)  mean 16.25  0 exploits  ETA 0:06",
        "member 1 was lost in interval 2: it burns",
        "interval 2/4  best nan (member 0)  mean -  1 exploits  ETA 0:04",
        "member 1 could not take over 0: damaged",
    ]


def test_on_a_terminal_a_table_tells_of_everybody() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    sink = PopulationConsoleSink(2, 4, console=console, clock=Clock(), mode="min")
    sink.write(reported(0, 1, 12.5))
    sink.write(reported(1, 1, 20.0))
    sink.write(exploited(0, 1))
    sink.write(exploited(1, 1, reason="explore"))
    shown = Console(file=io.StringIO(), width=120)
    shown.print(sink._view())  # pyright: ignore[reportPrivateUsage]
    sink.close()
    lines = text_of(shown).splitlines()
    assert "best 12.5 (member 0)" in lines[0], "less is better here"
    assert lines[1].split() == ["member", "interval", "score", "kind", "lr", "parent", "exploits"]
    assert lines[2].split() == ["0", "1", "12.5", "tanh", "0.5", "1", "@", "1,000", "1"]
    assert lines[3].split() == ["1", "1", "20", "tanh", "0.5", "-", "0"]
    assert "member" in text_of(console)


def test_a_resumed_run_knows_what_was_before() -> None:
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    before = [reported(0, 1, 1.0), reported(1, 1, 2.0), exploited(0, 1), reported(0, 2, 3.0), reported(1, 2, 3.0)]
    sink = PopulationConsoleSink(2, 4, console=console, clock=clock, before=before)
    clock.seconds = 10.0
    sink.write(reported(0, 3, 5.0))
    sink.write(reported(1, 3, 4.0))
    assert text_of(console).splitlines() == ["interval 3/4  best 5 (member 0)  mean 4.5  1 exploits  ETA 0:10"]
