"""A governor's report as text for a terminal, at most 100 columns wide."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from morphogen.governor.report import words
from morphogen.governor.report.timeline import History
from morphogen.governor.report.words import GovernorSummary

WIDTH = 100
_LABEL = 11
_CHART = WIDTH - _LABEL - 1
_CHART_ROWS = 4
_BLOCKS = " ▁▂▃▄▅▆▇█"
_MAX_CELL = 18
_MAX_ROWS = 10


def text_of(history: History, summary: GovernorSummary) -> str:
    """Return the report as lines that end without a newline."""
    parts: list[list[str]] = [_wrapped(words.headline(history, summary))]
    collapse = history.collapse
    if collapse is not None:
        parts[0] += ["", *_wrapped(words.plain(f"Collapsed at step {words.number_text(collapse.step)}: {collapse.reason}"))]
    advice = words.advice(history, summary)
    if advice:
        parts.append(["What to do next", *(line for item in advice for line in _wrapped(item, "  - ", "    "))])
    if history.curve:
        parts.append([*_wrapped(f"Loss: {words.loss_line(history)}", "", "  "), *_chart(history)])
    rewinds, findings = history.rewinds, history.findings
    if rewinds.count:
        parts.append([f"Rewinds {words.shown(rewinds, _MAX_ROWS)}", *_table(words.REWIND_COLUMNS, words.rewind_rows(history))])
    if findings.count:
        title = f"Findings {words.shown(findings, _MAX_ROWS)}"
        parts.append([title, *_table(words.FINDING_COLUMNS, words.finding_rows(history))])
    kept = words.kept_rows(history)
    if kept:
        parts.append([f"Snapshots kept ({len(kept)})", *_table(words.KEPT_COLUMNS, kept)])
    if summary.detectors:
        parts.append(_wrapped(words.plain(f"Detectors: {', '.join(summary.detectors)}"), "", "  "))
    return "\n\n".join("\n".join(part) for part in parts)


def _wrapped(text: str, first: str = "", after: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=after) or [first]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The last rows under their columns: numbers to the right, the last column wrapped in what room is left."""
    table = [list(columns), *([*map(_cut, row[:-1]), row[-1]] for row in rows[-_MAX_ROWS:])]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns) - 1)]
    is_text = [any(_is_word(row[index]) for row in table[1:]) for index in range(len(widths))]
    indent = 2 + sum(widths) + 2 * len(widths)
    lines: list[str] = []
    for row in table:
        cells = [
            cell.ljust(width) if left else cell.rjust(width) for cell, width, left in zip(row, widths, is_text, strict=False)
        ]
        start = "  " + "".join(f"{cell}  " for cell in cells)
        lines += (line.rstrip() for line in _wrapped(row[-1], start, " " * indent))
    return lines


def _is_word(cell: str) -> bool:
    return cell[:1].isalpha() and cell not in words.NOT_FINITE


def _cut(cell: str) -> str:
    return cell if len(cell) <= _MAX_CELL else cell[: _MAX_CELL - 1] + "…"


def _chart(history: History) -> list[str]:
    """The highest loss of each column as a bar, what happened below it, and the axis."""
    columns = min(_CHART, history.observed)
    measured = [bucket for bucket in history.curve if bucket.is_measured]
    lines: list[str] = []
    is_log = False
    if measured:
        low, high = min(bucket.low for bucket in measured), max(bucket.high for bucket in measured)
        is_log = low > 0 and high > 100 * low
        tops: list[float | None] = [None] * columns
        for bucket in history.curve:
            column = _column(bucket.observed, history.observed, columns)
            known = tops[column]
            tops[column] = bucket.high if known is None else max(known, bucket.high)
        levels = [_level(top, low, high, is_log) for top in _filled(tops)]
        names = [words.number_text(high), *[""] * (_CHART_ROWS - 2), words.number_text(low)]
        for row, name in enumerate(names):
            floor = 8 * (_CHART_ROWS - 1 - row)
            lines.append(f"{name:>{_LABEL}} " + "".join(_BLOCKS[min(max(level - floor, 0), 8)] for level in levels))
    lines += _marks(history, columns)
    end = words.number_text(history.observed)
    lines += [f"{'observation':>{_LABEL}} 1{end:>{columns - 1}}"] if columns > len(end) + 1 else []
    lines.append(f"{'':{_LABEL}} (bars: highest loss{', log scale' if is_log else ''})")
    return [line.rstrip() for line in lines]


def _marks(history: History, columns: int) -> list[str]:
    """One line for each kind of mark there is; a rewind is drawn from where it happened back to its snapshot."""

    def place(observed: int) -> int:
        return _column(observed, history.observed, columns)

    rewinds = [" "] * columns
    for entry in history.rewinds.latest:
        end = place(entry.observed)
        start = end if entry.to_observed is None else place(entry.to_observed)
        rewinds[start : end + 1] = "◂" if start == end else "◂" + "─" * (end - start - 1) + "┘"
    rows = {
        "rewinds": rewinds,
        "skipped": _dotted("×", (place(entry.observed) for entry in history.skips.latest), columns),
        "not finite": _dotted("!", (place(bucket.observed) for bucket in history.curve if bucket.non_finite), columns),
        "taken out": _dotted("⊠", (place(entry.observed) for entry in history.notes.latest if entry.kind != "level"), columns),
        "new level": _dotted("=", (place(entry.observed) for entry in history.notes.latest if entry.kind == "level"), columns),
    }
    return [f"{name:>{_LABEL}} {''.join(row)}" for name, row in rows.items() if "".join(row).strip()]


def _dotted(mark: str, places: Iterable[int], columns: int) -> list[str]:
    marked = set(places)
    return [mark if column in marked else " " for column in range(columns)]


def _column(observed: int, last: int, columns: int) -> int:
    return min(max(observed - 1, 0) * columns // last, columns - 1)


def _filled(tops: Sequence[float | None]) -> list[float]:
    """Columns in which no bucket ends take the value before them; one without a finite loss stays empty, at -inf."""
    filled: list[float] = []
    for top in tops:
        before = filled[-1] if filled else -math.inf
        filled.append(before if top is None else top)
    return filled


def _level(value: float, low: float, high: float, is_log: bool) -> int:
    """Return how many eighths of a row the bar of ``value`` is high: at least one; none where nothing was measured yet."""
    if value == -math.inf:
        return 0
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    span = high / 2 - low / 2  # halved: two losses may lie further apart than a float can say
    share = (value / 2 - low / 2) / span if span > 0 else 0.5
    return 1 + round(share * (8 * _CHART_ROWS - 1))
