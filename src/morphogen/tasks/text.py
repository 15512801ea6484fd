"""Text: the State of the Union speeches, one symbol after the other, as characters or as bytes.

Source: The State of the Union addresses since 1790, in the public domain.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from morphogen.errors import DataError
from morphogen.growth import GrowthPoint, Sowing
from morphogen.tasks.base import Task
from morphogen.tasks.data import TaskData
from morphogen.tasks.hosts import TransformerHost
from morphogen.tasks.objectives import LanguageModelling
from morphogen.tasks.sources import Source, read_gzip
from morphogen.tasks.tokens import windows

Level = Literal["character", "byte"]

_FILE = "sotu.txt.gz"
SOURCE = Source(
    name="sotu",
    layouts=((_FILE,),),
    how_to_get="Put a gzipped UTF-8 text, for example of all State of the Union addresses, there under this name.",
)
_CONTEXT_LENGTH = 64
_DECISION_WINDOWS, _TEST_WINDOWS = 500, 2000
_NUM_BYTES = 256


def load(path: Path | None = None, level: Level = "character") -> TaskData:
    """Windows of 64 symbols, each with the symbols that follow them.

    The text is cut in its order into train, decision and test; a split ends with its last whole window.

    Args:
        path: Directory that holds ``sotu.txt.gz``; None to look in $MORPHOGEN_DATA (or else the user's cache) and in the
            platform's directory of data sets.
        level: "character" for the characters that occur in the text, in the order of their code points, or "byte" for the 256
            bytes of its UTF-8 form.

    Returns:
        500 decision windows and 2,000 test windows, but no more than a tenth of the text each, and the rest to train on;
        int64, on the CPU, the same at every call.

    Raises:
        DataError: The file is missing, damaged or too short.
    """
    name = SOURCE.require(path) / _FILE
    symbols, vocab_size = encoded(name, level)
    num_windows = (len(symbols) - 1) // _CONTEXT_LENGTH
    decision, test = (min(wanted, num_windows // 10) for wanted in (_DECISION_WINDOWS, _TEST_WINDOWS))
    if decision == 0:
        needed = 10 * _CONTEXT_LENGTH + 1
        raise DataError(f"{name}: must hold at least {needed} symbols, has {len(symbols)}. Use a longer text.")
    ends = np.cumsum([0, num_windows - decision - test, decision, test]) * _CONTEXT_LENGTH
    tokens = torch.from_numpy(symbols)
    splits = [windows(tokens[start : end + 1], _CONTEXT_LENGTH) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return TaskData(*splits, num_classes=vocab_size)


def encoded(path: Path, level: Level) -> tuple[npt.NDArray[np.int64], int]:
    """Return the symbols of a gzipped text as numbers from 0, shape (num_symbols,), and how many kinds there are."""
    content = read_gzip(path)
    if level == "byte":
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64), _NUM_BYTES
    try:
        points = np.frombuffer(content.decode("utf-8").encode("utf-32-le"), dtype="<u4")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text: {error}. Convert it, or use byte level.") from error
    occurs = np.bincount(points) > 0
    return (np.cumsum(occurs) - 1)[points], int(occurs.sum())


BLUEPRINTS = (
    Sowing(blueprint="conv1d", options={"causal": True}, blend_ticks=3),
    Sowing(blueprint="mlp", options={"expansion": 4}, blend_ticks=3),
    Sowing(blueprint="attention", options={"num_heads": 4, "causal": True}, blend_ticks=3),
    Sowing(blueprint="glu", blend_ticks=3),
    Sowing(blueprint="low_rank", options={"rank": 16}, blend_ticks=3),
)
"""What may be sown behind a causal transformer block: nothing that sees a later token."""

_POINTS = {"block1": "blocks.0", "block2": "blocks.1"}


def task(level: Level = "character", path: Path | None = None) -> Task:
    """Return the task on characters or on bytes, of the corpus at ``path`` or of the one that is found."""
    return Task(
        name="text" if level == "character" else f"text_{level}",
        summary=f"next {level} of the State of the Union speeches; a host of two narrow transformer blocks",
        load=functools.partial(load, path, level),
        make_host=lambda data: TransformerHost(data.num_classes, 32, num_layers=2, num_heads=4, context_length=_CONTEXT_LENGTH),
        points={name: GrowthPoint(path) for name, path in _POINTS.items()},
        blueprints=BLUEPRINTS,
        reference=dict.fromkeys(_POINTS, BLUEPRINTS[0]),
        batch_size=32,
        total_steps=1600,
        tick_steps=40,
        learning_rate=4e-3,
        weight_decay=1e-2,
        objective=LanguageModelling(),
        source=SOURCE,
    )


TASK = task()
BYTE = task("byte")
