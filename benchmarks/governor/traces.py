"""What a governor could see of each run, step by step: recording, files, and the records around them.

A cache directory holds ``index.json``, one record per trace, and files ``*.npz``. In a file, "columns" names the measured
numbers; for each key, "KEY.values" is (steps, columns) and "KEY.present" says which numbers there were in a step. The trace
of a fault or a benign event is the shared part before it ("prefix" names its key) followed by its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tasks import Run
from torch import Tensor

from morphogen.governor.findings import Observation
from morphogen.governor.sensors import Sensors


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a trace is of.

    Attributes:
        role: "healthy", "fault" or "benign"; "shift" for a healthy run whose data changes abruptly at ``start``.
        split: "tune", "held_out", or "never_tuned" for the task that no threshold has seen.
        kind: Kind of healthy run, fault or benign event.
        key: Of the trace in its file.
        weak: Whether the fault's strength is not the default but a weaker one.
        prefix: Key of what came before it; None for runs recorded from their first step.
        start: Step of the fault or event.
        lasted_steps: How many steps it was at work in.
        twin_loss: Evaluation of the healthy twin, ``eval_loss`` that of this run, at the end.
        excess: By what share ``eval_loss`` is worse, by the task's rule.
        initial_loss: Evaluation before the first step.
    """

    role: str
    split: str
    task: str
    kind: str
    seed: int
    file: str
    key: str
    family: str = ""
    weak: bool = False
    prefix: str | None = None
    start: int = 0
    lasted_steps: int = 0
    eval_loss: float = 0.0
    twin_loss: float = 0.0
    excess: float = 0.0
    initial_loss: float = 0.0

    @property
    def damaging(self) -> bool:
        """Whether the run is more than 10 % worse than its healthy twin, or not finite."""
        return not self.excess <= 0.1


@dataclass(frozen=True)
class Trace:
    """One trace: the shared observations before ``record.start``, and those from there on."""

    record: Record
    before: tuple[Observation, ...]
    after: tuple[Observation, ...]


class Recorder:
    """Looks at each step between ``backward`` and ``step`` with the governor's own sensors, and never interferes."""

    def __init__(self, run: Run) -> None:
        """Start to measure ``run``."""
        self._run = run
        self._sensors = Sensors(run.state)
        self.observations: list[Observation] = []

    def look(self, step: int, loss: Tensor, norm: Tensor | None, outputs: Tensor, labels: Tensor) -> bool:
        """Record one step."""
        reading = self._sensors.measure(loss.detach(), grad_norm=norm, **self._run.shown(outputs, labels))
        self.observations.append(reading.observation(step))
        return True


def as_arrays(key: str, observations: Sequence[Observation], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the two arrays of one trace."""
    values = np.zeros((len(observations), len(columns)))
    present = np.zeros(values.shape, dtype=bool)
    for row, observation in enumerate(observations):
        numbers = {"loss": observation.loss, "grad_norm": observation.grad_norm, **observation.signals}
        for column, name in enumerate(columns):
            value = numbers.get(name)
            present[row, column] = value is not None
            values[row, column] = 0.0 if value is None else value
    return {f"{key}.values": values, f"{key}.present": present}


def write_file(path: Path, traces: Mapping[str, Sequence[Observation]]) -> None:
    """Write traces by key."""
    names = {name: None for trace in traces.values() for observation in trace for name in observation.signals}
    columns = ["loss", "grad_norm", *names]
    arrays = {name: array for key, trace in traces.items() for name, array in as_arrays(key, trace, columns).items()}
    np.savez_compressed(path, columns=np.array(columns), **arrays)


def write_index(cache: Path, records: Iterable[Record]) -> None:
    """Write the list of all traces."""
    lines = ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records)
    (cache / "index.json").write_text(f"[\n{lines}\n]\n")


def read_index(cache: Path) -> list[Record]:
    """Return the records of all traces in ``cache``."""
    path = cache / "index.json"
    return [Record(**record) for record in json.loads(path.read_text())] if path.exists() else []


def load(cache: Path, records: Sequence[Record] | None = None) -> list[Trace]:
    """Return the traces of ``records``, by default all in ``cache``; what comes before several is one object."""
    records = read_index(cache) if records is None else records
    traces: list[Trace] = []
    for name in dict.fromkeys(record.file for record in records):
        with np.load(cache / name) as file:
            arrays = {key: file[key] for key in file.files}
        shared: dict[str, tuple[Observation, ...]] = {}
        for record in (record for record in records if record.file == name):
            if record.prefix is not None and record.prefix not in shared:
                shared[record.prefix] = _observations(arrays, record.prefix, 0)
            before = shared[record.prefix] if record.prefix is not None else ()
            traces.append(Trace(record, before, _observations(arrays, record.key, len(before))))
    return traces


def _observations(arrays: Mapping[str, np.ndarray], key: str, first_step: int) -> tuple[Observation, ...]:
    columns = arrays["columns"].tolist()
    made: list[Observation] = []
    rows = zip(arrays[f"{key}.values"].tolist(), arrays[f"{key}.present"].tolist(), strict=True)
    for step, (values, present) in enumerate(rows, start=first_step):
        numbers = {name: value for name, value, there in zip(columns, values, present, strict=True) if there}
        loss, norm = numbers.pop("loss"), numbers.pop("grad_norm", None)
        made.append(Observation(step=step, loss=loss, grad_norm=norm, signals=numbers))
    return tuple(made)
