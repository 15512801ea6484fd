"""Streams of tokens: text into tokens once, kept in a memory-mapped file, and cut into rows to train on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from morphogen.errors import DataError, MorphogenError
from morphogen.tasks.data import Split

PADDING = 0
"""Token that fills up the last row of a stream; every tokenizer here counts from 1."""
END = "<|endoftext|>"

_FORMAT = 1
_DTYPES: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "int16": (np.int16, torch.int16),
    "int32": (np.int32, torch.int32),
}
_CHUNK_TOKENS = 1 << 22


class Tokenizer(Protocol):
    """Turns a document into tokens from 1; :data:`PADDING` is no token of it."""

    @property
    def vocab_size(self) -> int:
        """Tokens lie in [0, ``vocab_size``), padding included."""
        ...

    @property
    def identity(self) -> str:
        """A text that is another one for every tokenizer that gives other tokens."""
        ...

    def encode(self, document: str) -> npt.NDArray[np.int64]:
        """Return the tokens of a document, the end-of-text token behind them."""
        ...


class ByteTokenizer:
    """The bytes of UTF-8, from 1, and one token for the end of a text.

    Example:
        >>> ByteTokenizer().encode("ab").tolist()
        [98, 99, 257]
    """

    vocab_size = 258
    identity = "bytes-1"

    def encode(self, document: str) -> npt.NDArray[np.int64]:
        """Return the bytes of a document, the end-of-text token behind them."""
        content = np.frombuffer(document.encode("utf-8"), dtype=np.uint8).astype(np.int64)
        return np.append(content + 1, self.vocab_size - 1)


class FileTokenizer:
    """A Hugging Face tokenizer from its ``tokenizer.json``, which must know ``<|endoftext|>``.

    Args:
        path: The file.

    Raises:
        DataError: The file cannot be read, or has no end-of-text token.
        MorphogenError: tokenizers is not installed.
    """

    def __init__(self, path: Path) -> None:
        """Read the file."""
        try:
            from tokenizers import Tokenizer as HuggingFaceTokenizer  # optional: only a tokenizer of one's own needs it
        except ImportError as error:
            raise MorphogenError("a tokenizer.json needs the tokenizers library. Run `pip install tokenizers`.") from error
        try:
            content = path.read_bytes()
            self._tokenizer: Any = HuggingFaceTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # border: the library raises plain Exception
            raise DataError(f"{path}: cannot be read as a tokenizer.json ({error}). Give another file.") from error
        end = self._tokenizer.token_to_id(END)
        if end is None:
            raise DataError(f"{path}: must have the token {END}, has not. Add it to the tokenizer.")
        self._end = int(end)
        self.vocab_size = int(self._tokenizer.get_vocab_size()) + 1
        self.identity = hashlib.sha256(content).hexdigest()

    def encode(self, document: str) -> npt.NDArray[np.int64]:
        """Return the tokens of a document, the end-of-text token behind them."""
        return np.array([*self._tokenizer.encode(document).ids, self._end], dtype=np.int64) + 1


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Tokens in a file without header; a manifest of the same name ending in ``.json`` says what they are."""

    path: Path

    def read(self) -> Tensor:
        """Return the tokens, memory-mapped: int16 or int32, shape (num_tokens,). Writing to it does not reach the file.

        Raises:
            DataError: There is no such file, or it is not what its manifest says.
        """
        try:
            manifest = json.loads(self.path.with_suffix(".json").read_text())
            numpy_dtype, dtype = _DTYPES[manifest["dtype"]]
            size, expected = self.path.stat().st_size, manifest["num_tokens"] * np.dtype(numpy_dtype).itemsize
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error!r}). Delete it, and it is made again.") from error
        if size != expected:
            raise DataError(f"{self.path}: must have {expected:,} bytes, has {size:,}. Delete it, and it is made again.")
        return torch.from_file(str(self.path), shared=False, size=manifest["num_tokens"], dtype=dtype)

    def write(self, documents: Iterable[str], tokenizer: Tokenizer, context_length: int) -> None:
        """Tokenise ``documents`` and write them behind each other, padded to whole rows; whole or not at all.

        Raises:
            DataError: There is no document.
            OSError: The disk refused.
        """
        name = "int16" if tokenizer.vocab_size <= np.iinfo(np.int16).max else "int32"
        numpy_dtype = _DTYPES[name][0]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        num_tokens = 0
        try:
            with temporary.open("xb") as file:
                for chunk in _chunks(documents, tokenizer):
                    file.write(chunk.astype(numpy_dtype).tobytes())
                    num_tokens += len(chunk)
                if num_tokens == 0:
                    raise DataError(f"{self.path.stem}: must hold at least one text, holds none. Get the data again.")
                missing = -(num_tokens - 1) % context_length
                file.write(np.full(missing, PADDING, dtype=numpy_dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
            manifest = {"format": _FORMAT, "dtype": name, "num_tokens": num_tokens + missing}
            self.path.with_suffix(".json").write_text(json.dumps(manifest))
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _chunks(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the tokens of all documents in arrays that are worth a write."""
    waiting: list[npt.NDArray[np.int64]] = []
    length = 0
    for document in documents:
        waiting.append(tokenizer.encode(document))
        length += len(waiting[-1])
        if length >= _CHUNK_TOKENS:
            yield np.concatenate(waiting)
            waiting, length = [], 0
    if waiting:
        yield np.concatenate(waiting)


def windows(tokens: Tensor, context_length: int) -> Split:
    """Cut a stream of tokens into rows of ``context_length``, each with the same row one token later as its target.

    The rows are views of ``tokens``, which may lie in a memory-mapped file: nothing is copied until rows are asked for.

    Args:
        tokens: Shape (num_tokens,), int64, int32, int16 or uint8. What does not fill a row is left out.
        context_length: Tokens in a row, >= 1.

    Raises:
        ValueError: There are not enough tokens for one row.

    Example:
        >>> split = windows(torch.arange(8), 3)
        >>> split.inputs.tolist(), split.targets.tolist()
        ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    if len(tokens) <= context_length or context_length < 1:
        raise ValueError(
            f"`tokens` must hold more than `context_length` >= 1 tokens, got {len(tokens)} for {context_length}. "
            "Give a longer text or a shorter context."
        )
    rows = tokens.unfold(0, context_length + 1, context_length)
    return Split(rows[:, :-1], rows[:, 1:])
