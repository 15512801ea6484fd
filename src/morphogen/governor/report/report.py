"""The report of a governor: what happened, as text for a terminal and as one HTML page."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from morphogen.governor.report.page import page_of
from morphogen.governor.report.text import text_of
from morphogen.governor.report.timeline import History
from morphogen.governor.report.words import GovernorSummary as GovernorSummary
from morphogen.state import checkpoint


@dataclasses.dataclass(frozen=True)
class GovernorReport:
    """What happened under a governor until the report was made; it does not change afterwards.

    Attributes:
        history: What the timeline remembers.
        summary: The governor as it stood.

    Example:
        >>> from morphogen.governor.report.timeline import Timeline
        >>> timeline = Timeline()
        >>> summary = GovernorSummary(observations=0, skipped_steps=0, rewinds=0, status="healthy")
        >>> print(GovernorReport(timeline.history(), summary))
        nothing observed yet
    """

    history: History
    summary: GovernorSummary

    def text(self) -> str:
        """Return the report for a terminal: lines of at most 100 characters."""
        return text_of(self.history, self.summary)

    def html(self) -> str:
        """Return the report as one HTML page that loads nothing."""
        return page_of(self.history, self.summary)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report to ``path``, whole or not at all: as a page to ``.html``, as text to ``.txt``.

        Returns:
            The path.

        Raises:
            ValueError: ``path`` has another suffix.
            OSError: It cannot be written; a file that was there before is as it was.
        """
        target = Path(path)
        writers = {".html": self.html, ".txt": lambda: self.text() + "\n"}
        if target.suffix not in writers:
            raise ValueError(f"`path` must end in .html or .txt, got {os.fspath(path)!r}. Name the kind of file.")
        checkpoint.write_synced(target, writers[target.suffix]().encode())
        return target

    def __str__(self) -> str:
        return self.text()
