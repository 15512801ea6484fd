"""What a governor remembers, as one file; its snapshots lie beside it as checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morphogen.errors import CheckpointError
from morphogen.governor.findings import Observation
from morphogen.governor.recovery import Memory
from morphogen.governor.verdicts import WatchState
from morphogen.state import Generation, checkpoint

_FILE = "governor.json"
_FORMAT = "morphogen.governor.v2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Everything a governor remembers.

    Attributes:
        watch: Its counts.
        generations: Its snapshots, oldest first.
        memories: ``Generation.observed`` -> what it knew then.
        detectors: State of each detector by name.
        sensors: What the sensors count.
        pending: Observations not judged yet, their numbers read.
        timeline: What its report is made of.
    """

    watch: WatchState
    generations: tuple[Generation, ...]
    memories: Mapping[int, Memory]
    detectors: Mapping[str, Any]
    sensors: Mapping[str, Any]
    pending: Sequence[Observation]
    timeline: Mapping[str, Any]


def write(directory: Path, record: Record) -> None:
    """Write ``record`` into ``directory``: snapshots first, then the file that names them, then what is old goes.

    Raises:
        CheckpointError: The disk refused; what was there before still loads.
    """
    for generation in record.generations:
        checkpoint.write(directory / _name(generation.observed), generation.snapshot)
    plain = json.dumps(
        {
            "watch": dataclasses.asdict(record.watch),
            "generations": [
                [
                    generation.step,
                    generation.observed,
                    generation.good,
                    dataclasses.asdict(record.memories[generation.observed]),
                ]
                for generation in record.generations
            ],
            "detectors": record.detectors,
            "sensors": record.sensors,
            "pending": [dataclasses.asdict(observation) for observation in record.pending],
            "timeline": record.timeline,
        }
    )
    content = json.loads(plain)
    whole = {"format": _FORMAT, "sha256": _digest(content), **content}
    kept = {_name(generation.observed) for generation in record.generations}
    try:
        checkpoint.write_synced(directory / _FILE, json.dumps(whole).encode())
        for old in directory.glob("generation-*"):
            if old.name not in kept:
                checkpoint.remove(old)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}. What was there before still loads.") from error


def read(directory: Path) -> Record:
    """Read what :func:`write` wrote.

    Raises:
        CheckpointError: A file is missing, damaged or of another format; it says which.
    """
    path = directory / _FILE
    try:
        saved = _verified(path)
        generations: list[Generation] = []
        memories: dict[int, Memory] = {}
        for step, observed, good, memory in saved["generations"]:
            snapshot = checkpoint.read(directory / _name(observed), {}).snapshot
            generations.append(Generation(step, snapshot, observed, good))
            memories[observed] = Memory(**memory)
        return Record(
            watch=_watch_from(saved["watch"]),
            generations=tuple(generations),
            memories=memories,
            detectors=saved["detectors"],
            sensors=saved["sensors"],
            pending=[Observation(**observation) for observation in saved["pending"]],
            timeline=saved["timeline"],
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Check the path.") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: is damaged, or of another release ({reason}). Use another checkpoint.") from error


def _watch_from(saved: Mapping[str, Any]) -> WatchState:
    numbers: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return WatchState(**numbers)


def _verified(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    found, digest = content.pop("format"), content.pop("sha256")
    if found != _FORMAT:
        raise ValueError(f"its format must be {_FORMAT}, is {found!r}")
    if digest != _digest(content):
        raise ValueError("its own sha256 does not match")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name(observed: int) -> str:
    return f"generation-{observed}"
