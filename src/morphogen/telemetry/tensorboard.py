"""TensorBoard files: what a job measured, over its steps: of the optimizer in a grow job, else of the environments.

Source: ``torch.utils.tensorboard``. Importing this module is slow; only recipes do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, final

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] generated
from torch.utils.tensorboard.writer import SummaryWriter

from morphogen.telemetry.events import Json

_SCALARS = ("train_loss", "metric", "parameters", "learning_rate")
_MEMBER_SCALARS = ("score", "hyperparameters", "metrics")
_NO_SCALARS = ("event", "step", "seconds")
_FLUSH_SECONDS = 10

_Lane: TypeAlias = str
_AGENT_LANES: dict[Json, _Lane] = {"Updated": "training", "Evaluated": "evaluation", "EpisodesAveraged": "episodes"}


@final
class TensorBoardSink:
    """Writes the scalars of ``TickMeasured``, ``Updated``, ``Evaluated``, ``EpisodesAveraged`` and ``MemberReported`` records.

    In a grow job each (arm, repeat) is a TensorBoard run of its own, ``<directory>/<arm>/repeat-<n>``, with the tags
    ``train_loss``, ``metric``, ``parameters``, ``learning_rate`` and ``alpha/<slot>``. Where an agent is trained, ``training``,
    ``evaluation`` and ``episodes`` are, with the fields of their records as tags. In a population each member is,
    ``member-<n>``, with ``score``, ``hyperparameters/<name>`` and ``metrics/<name>``. A run is made when its first record
    comes.
    Steps that are trained again, after a rollback or in a resumed run, replace the earlier values.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Take ``directory`` as the log directory; nothing is written before the first record."""
        self._directory = Path(directory)
        self._writers: dict[_Lane, SummaryWriter] = {}
        self._last_steps: dict[_Lane, int] = {}

    def write(self, record: Mapping[str, Json]) -> None:
        """Write the scalars of ``record``.

        Raises:
            ValueError: A measured record does not say its arm, repeat and train_step.
            OSError: The files cannot be written.
        """
        place = _place_of(record)
        if place is not None:
            writer = self._writer(*place)
            for tag, value in _scalars(record):
                writer.add_scalar(tag, value, place[1])

    def close(self) -> None:
        """Flush and close every file."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, lane: _Lane, step: int) -> SummaryWriter:
        """The writer of ``lane``; where the run went back, what it wrote from ``step`` on is purged."""
        if lane not in self._writers:
            folder = self._directory / lane
            purge_step = step if any(folder.glob("*.tfevents.*")) else None
            self._writers[lane] = SummaryWriter(folder, purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
        elif step <= self._last_steps[lane]:
            _purge(self._writers[lane], step)
        self._last_steps[lane] = step
        return self._writers[lane]


def _purge(writer: SummaryWriter, step: int) -> None:
    """Say in the file what a restarted process says: from ``step`` on, what stands here holds no more."""
    for file in (writer.all_writers or {}).values():
        file.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def _place_of(record: Mapping[str, Json]) -> tuple[_Lane, int] | None:
    """Return the run and the step that ``record`` belongs to, or None if it is not one of scalars."""
    kind, step = record.get("event"), record.get("step")
    if kind in _AGENT_LANES and isinstance(step, int):
        return _AGENT_LANES[kind], step
    if kind == "MemberReported" and isinstance(step, int):
        return f"member-{record.get('member')}", step
    if kind != "TickMeasured":
        return None
    arm, repeat, step = record.get("arm"), record.get("repeat"), record.get("train_step")
    if not (isinstance(arm, str) and isinstance(repeat, int) and isinstance(step, int)):
        raise ValueError(
            f"`TickMeasured` must carry arm, repeat and train_step, got {arm!r}, {repeat!r} and {step!r}. "
            "Emit it through `EventBus.scoped` with these."
        )
    return f"{arm}/repeat-{repeat}", step


def _scalars(record: Mapping[str, Json]) -> Iterator[tuple[str, float]]:
    """The measured values of ``record`` by tag; what was not measured is left out."""
    if record.get("event") == "TickMeasured":
        tagged = {name: record.get(name) for name in _SCALARS} | {"alpha": record.get("alphas")}
    elif record.get("event") == "MemberReported":
        tagged = {name: record.get(name) for name in _MEMBER_SCALARS}
    else:
        tagged = {name: value for name, value in record.items() if name not in _NO_SCALARS}
    for tag, value in _flat(tagged):
        if value is not None:
            yield tag, _float(value)


def _float(value: Json) -> float:
    """Return a number; NaN for what is none, such as the name of a choice."""
    if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        return float(value)
    return float("nan")


def _flat(tagged: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """The values by tag, those of a mapping below its name."""
    for name, value in tagged.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        else:
            yield name, value
