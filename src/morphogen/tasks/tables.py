"""Columns of Hugging Face datasets on disk: parquet as published on the hub, or arrow as ``save_to_disk`` writes it.

The files are read with pyarrow, which the ``datasets`` extra brings: no hub is asked and nothing is copied to a cache.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from morphogen.errors import DataError, MorphogenError

PARQUET, ARROW = ("{split}-*.parquet", "*/{split}-*.parquet"), ("{split}/*.arrow",)


def layouts(*splits: str) -> tuple[tuple[str, ...], ...]:
    """Return the sets of files that a dataset with these splits may consist of, as of ``Source.layouts``."""
    return tuple(tuple(pattern.format(split=split) for split in splits) for pattern in (*PARQUET, *ARROW))


def files(directory: Path, split: str) -> list[Path]:
    """Return the files of ``split`` in ``directory``, in the order of their names; none if it is no such data set."""
    for patterns in (PARQUET, ARROW):
        found = sorted(path for pattern in patterns for path in directory.glob(pattern.format(split=split)))
        if found:
            return found
    return []


def rows(directory: Path, split: str, columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of ``columns`` in each row of a split, in the order of the files' names.

    Raises:
        DataError: A column is missing, or a file is damaged.
        MorphogenError: pyarrow is not installed.
    """
    for path in files(directory, split):
        for batch in _batches(path, columns):
            yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)


def decode_image(path: Path, content: bytes) -> npt.NDArray[np.uint8]:
    """Return an encoded image as (height, width, 3)."""
    try:
        from PIL import Image  # optional: only image datasets in Hugging Face format need it
    except ImportError as error:
        raise MorphogenError("Pillow is needed for image datasets in Hugging Face format. Run `pip install pillow`.") from error
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: holds an image that cannot be decoded ({error}). Get the data set again.") from error


def _batches(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    try:
        import pyarrow  # optional: the `datasets` extra brings it
        import pyarrow.parquet  # optional: as above
    except ImportError as error:
        message = f"{path}: pyarrow is needed to read it. Run `pip install 'morphogen[datasets]'`."
        raise MorphogenError(message) from error
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            _check_columns(path, columns, file.schema_arrow.names)
            yield from file.iter_batches(columns=list(columns))
        else:
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                _check_columns(path, columns, stream.schema.names)
                yield from stream
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Get the data set again.") from error


def _check_columns(path: Path, wanted: tuple[str, ...], found: list[str]) -> None:
    if not set(wanted) <= set(found):
        raise DataError(
            f"{path}: must have the columns {', '.join(wanted)}, has {', '.join(found)}. Use the data set as published."
        )
