"""Where data files are looked for, and what is said when they are not there or damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path

from morphogen.errors import DataError
from morphogen.tasks.data import cache_directory

PLATFORM_DIRECTORY = Path("/usr/share/datasets")
"""Where Debian's dataset packages install."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Data that others publish: a directory's name, what must be in it, and how to get it.

    Attributes:
        name: Name of the directory.
        layouts: Sets of relative paths, one of which must be there whole; a ``*`` stands for any name.
        how_to_get: One or two sentences.
    """

    name: str
    layouts: tuple[tuple[str, ...], ...]
    how_to_get: str

    def directories(self) -> tuple[Path, ...]:
        """Return where the files are looked for, in this order: $MORPHOGEN_DATA or else the user's cache, the platform's."""
        roots = [PLATFORM_DIRECTORY]
        with contextlib.suppress(RuntimeError):  # a user without a home directory has no cache
            roots.insert(0, cache_directory())
        return tuple(root / self.name for root in roots)

    def locate(self) -> Path | None:
        """Return the first directory that holds every file; None if there is none."""
        return next((directory for directory in self.directories() if self._complete(directory)), None)

    def require(self, path: Path | None = None) -> Path:
        """Return the directory with the files: ``path`` if given, else what :meth:`locate` finds.

        Raises:
            DataError: It is not there; the message says where was looked and how to get the data.
        """
        found = self.locate() if path is None else path if self._complete(path) else None
        if found is None:
            wanted = "; or ".join(", ".join(layout) for layout in self.layouts)
            looked = " or ".join(map(str, (path,) if path else self.directories()))
            raise DataError(f"{self.name}: no complete data in {looked}, which must hold {wanted}. {self.how_to_get}")
        return found

    def _complete(self, directory: Path) -> bool:
        return any(all(any(directory.glob(pattern)) for pattern in layout) for layout in self.layouts)


def read_gzip(path: Path) -> bytes:
    """Return the content of a gzip file.

    Raises:
        DataError: It cannot be read or is damaged.
    """
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}). Get the file again.") from error


def check_digest(path: Path, content: bytes, digests: Mapping[str, str]) -> None:
    """Raise DataError unless the SHA-256 of ``content`` is that of the published file of the name of ``path``."""
    found = hashlib.sha256(content).hexdigest()
    if found != digests[path.name]:
        raise DataError(
            f"{path}: its content must have the SHA-256 {digests[path.name]}, has {found}: it is damaged or another data set. "
            "Get the file again."
        )
