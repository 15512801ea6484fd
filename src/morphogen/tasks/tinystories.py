"""TinyStories: short stories in the words of small children, tokenised once and memory-mapped.

Source: Eldan and Li, "TinyStories", arXiv 2305.07759; https://huggingface.co/datasets/roneneldan/TinyStories.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from morphogen.errors import DataError
from morphogen.growth import GrowthPoint
from morphogen.tasks import tables
from morphogen.tasks.base import Task
from morphogen.tasks.data import TaskData, cache_directory
from morphogen.tasks.hosts import TransformerHost
from morphogen.tasks.objectives import LanguageModelling
from morphogen.tasks.sources import Source
from morphogen.tasks.text import BLUEPRINTS
from morphogen.tasks.tokens import END, PADDING, ByteTokenizer, FileTokenizer, TokenFile, Tokenizer, windows

_CONTEXT_LENGTH = 128
_DECISION_ROWS, _TEST_ROWS = 500, 2000
_READ_CHARACTERS = 1 << 20
_TEXTS = {
    "train": ("TinyStoriesV2-GPT4-train.txt", "TinyStories-train.txt"),
    "validation": ("TinyStoriesV2-GPT4-valid.txt", "TinyStories-valid.txt"),
}

SOURCE = Source(
    name="tinystories",
    layouts=(*zip(_TEXTS["train"], _TEXTS["validation"], strict=True), *tables.layouts("train", "validation")),
    how_to_get=(
        "Put the two text files, or the parquet files, of https://huggingface.co/datasets/roneneldan/TinyStories into "
        "$MORPHOGEN_DATA/tinystories."
    ),
)


def load(path: Path | None = None, tokenizer: Path | None = None) -> TaskData:
    """Rows of 128 tokens, each with the tokens that follow them; stories behind each other, an end-of-text token after each.

    The first call reads all stories and writes their tokens to the user's cache; later calls map that file. The last row of
    a file is filled up with padding, token 0, which the objective ignores.

    Args:
        path: Directory of the published text files (stories parted by ``<|endoftext|>``), or of a Hugging Face data set in
            parquet or arrow with a column ``text``; None to look in $MORPHOGEN_DATA (or else the user's cache) and in the
            platform's directory of data sets.
        tokenizer: A Hugging Face ``tokenizer.json``; None for bytes.

    Returns:
        The training stories, whose last 500 rows (a tenth at most) form the decision split, and the first 2,000 rows of the
        validation stories as test split; int16 or int32, on the CPU, the same at every call.

    Raises:
        DataError: The files are missing, damaged or too short, or the cache cannot be written.
    """
    directory = SOURCE.require(path)
    chosen = FileTokenizer(tokenizer) if tokenizer else ByteTokenizer()
    train, test = (windows(_tokens(directory, split, chosen), _CONTEXT_LENGTH) for split in ("train", "validation"))
    num_decision = min(_DECISION_ROWS, len(train) // 10)
    if num_decision == 0:
        raise DataError(f"{directory}: must hold at least 10 rows of {_CONTEXT_LENGTH} tokens, has {len(train)}. Get it again.")
    cut = len(train) - num_decision
    return TaskData(
        train.part(slice(0, cut)),
        train.part(slice(cut, None)),
        test.part(slice(0, _TEST_ROWS)),
        num_classes=chosen.vocab_size,
    )


def _tokens(directory: Path, split: str, tokenizer: Tokenizer) -> torch.Tensor:
    """Return the tokens of a split, from the cache if they are there."""
    files = _files(directory, split)
    what = [tokenizer.identity, _CONTEXT_LENGTH, [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    try:
        kept = TokenFile(cache_directory() / f"tinystories-{split}-{key}.bin")
        if not kept.path.exists():
            kept.write(_stories(directory, split), tokenizer, _CONTEXT_LENGTH)
        return kept.read()
    except (OSError, RuntimeError) as error:
        message = f"the tokens of {directory} cannot be kept: {error}. Set MORPHOGEN_DATA to a directory with room."
        raise DataError(message) from error


def _files(directory: Path, split: str) -> list[Path]:
    texts = [directory / name for name in _TEXTS[split] if (directory / name).exists()]
    return texts[:1] or tables.files(directory, split)


def _stories(directory: Path, split: str) -> Iterator[str]:
    """Yield the stories of a split without surrounding blanks; empty ones are left out."""
    file = _files(directory, split)[0]
    found = _parted(file) if file.suffix == ".txt" else (text for (text,) in tables.rows(directory, split, ("text",)))
    yield from (story for story in map(str.strip, found) if story)


def _parted(path: Path) -> Iterator[str]:
    """Yield what stands between the end-of-text marks of a file."""
    rest = ""
    try:
        with path.open(encoding="utf-8") as file:
            while chunk := file.read(_READ_CHARACTERS):
                *whole, rest = (rest + chunk).split(END)
                yield from whole
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text: {error}. Get the file again.") from error
    yield rest


_POINTS = {f"block{number + 1}": f"blocks.{number}" for number in range(4)}


def task(path: Path | None = None, tokenizer: Path | None = None) -> Task:
    """Return the task on the stories at ``path`` or those that are found, in bytes or in the tokens of a tokenizer."""
    return Task(
        name="tinystories",
        summary="TinyStories, next byte (or token) of short stories; a host of four transformer blocks",
        load=functools.partial(load, path, tokenizer),
        make_host=lambda data: TransformerHost(data.num_classes, 64, num_layers=4, num_heads=4, context_length=_CONTEXT_LENGTH),
        points={name: GrowthPoint(path) for name, path in _POINTS.items()},
        blueprints=BLUEPRINTS,
        reference=dict.fromkeys(_POINTS, BLUEPRINTS[0]),
        batch_size=32,
        total_steps=10_000,
        tick_steps=250,
        learning_rate=3e-3,
        weight_decay=1e-2,
        objective=LanguageModelling(ignore_index=PADDING),
        source=SOURCE,
    )


TASK = task()
