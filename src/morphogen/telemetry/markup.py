"""What reports are made of: markup that escapes what is put into it, parts of a page, and the geometry of a picture.

A page is one file that loads nothing, which a content security policy holds it to. Colours are variables of its style, so
that light, dark and print are decided there alone.

Source: standard library only.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Point: TypeAlias = tuple[float, float]


class Markup(str):
    """Text that is HTML already; any other text is escaped when it is put into a :func:`tag`."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return one element; text that is not :class:`Markup` is escaped, an attribute of None is left out.

    Example:
        >>> tag("p", "a < b", class_="note", data_count=3)
        '<p class="note" data-count="3">a &lt; b</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Return ``children`` one after the other, escaped where they are not :class:`Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def _attribute(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".removesuffix(".0")
    return str(value)


def document(title: str, style: str, body: Iterable[Markup]) -> str:
    """Return a complete HTML page: ``body`` under ``title``, nothing loaded, its one script opens folded parts for printing."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = join(
        (
            Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            Markup(f"<style>{style}</style>"),
        )
    )
    content = tag("body", tag("main", *body), Markup(f"<script>{_SCRIPT}</script>"))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{content}</html>\n'


def section(heading: str, *content: Markup, id_: str | None = None) -> Markup:
    """Return a part of the page under a heading."""
    return tag("section", tag("h2", heading), *content, id=id_)


def folded(heading: str, *content: Markup, is_open: bool = False, id_: str | None = None) -> Markup:
    """Return ``content`` folded under ``heading``; it opens with a click, and for printing."""
    return tag("details", tag("summary", heading), *content, id=id_, open="" if is_open else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A named value. ``tone``: "good", "warn", "bad" or "" for how it is to be taken."""

    name: str
    value: str
    note: str = ""
    tone: str = ""


def number(figure: Figure) -> Markup:
    """Return ``figure`` as one card of a ``dl`` of class "numbers"."""
    note = tag("span", figure.note, class_="quiet") if figure.note else Markup("")
    return tag("div", tag("dt", figure.name), tag("dd", figure.value, note))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under ``columns``, those in ``numeric`` to the right; ``ids`` make rows link targets."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    ids: tuple[str, ...] = ()


def table_of(columns: str, rows: Iterable[tuple[str, ...]], *, numeric: str = "", ids: Iterable[str] = ()) -> Table:
    """Return a table; ``columns`` and ``numeric`` are names with bars between them."""
    names, numbers = columns.split("|"), frozenset(numeric.split("|"))
    return Table(columns=tuple(names), rows=tuple(rows), numeric=numbers, ids=tuple(ids))


def table(content: Table) -> Markup:
    """Return ``content`` as HTML, or "None." where it has no rows."""
    if not content.rows:
        return tag("p", "None.", class_="quiet")
    kinds = ["n" if column in content.numeric else None for column in content.columns]
    head = tag("tr", *(tag("th", text, class_=kind) for text, kind in zip(content.columns, kinds, strict=True)))
    ids = content.ids or (None,) * len(content.rows)
    rows = [
        tag("tr", *(tag("td", text, class_=kind) for text, kind in zip(row, kinds, strict=True)), id=anchor)
        for row, anchor in zip(content.rows, ids, strict=True)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def legend(entries: Sequence[tuple[str, str]], words: str) -> Markup:
    """Return a legend: the name and the CSS class of each key, then ``words``."""
    keys = (tag("span", tag("i", class_=kind), name) for name, kind in entries)
    return tag("p", *keys, tag("span", words), class_="legend quiet")


def yaml(values: Any, indent: str = "") -> str:
    """Return ``values``, JSON data, one to a line, nested ones indented.

    Example:
        >>> print(yaml({"a": {"b": 1}, "c": "x"}))
        a:
          b: 1
        c: "x"
    """
    if not isinstance(values, dict):
        return json.dumps(values, ensure_ascii=False)
    lines = (
        f"{indent}{key}:\n{yaml(value, indent + '  ')}"
        if isinstance(value, dict) and value
        else f"{indent}{key}: {yaml(value) or '{}'}"
        for key, value in values.items()
    )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A linear map from values to SVG units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where ``value`` lies, held within the ends."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> tuple[float, ...]:
    """Return about ``count`` round values that cover ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten.

    Example:
        >>> nice_ticks(0, 480)
        (0.0, 100.0, 200.0, 300.0, 400.0, 500.0)
    """
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    if not math.isfinite(high - low):  # out of range, or not a number: nothing round lies between
        return tuple(value for value in (low, high) if math.isfinite(value))
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def path_of(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    """Return the ``d`` of a path through ``points``."""
    return "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in points)


_SCRIPT = """
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
"""

# The colours that every page has; a page adds those of what it shows.
LIGHT = "--page: #fbfbf9; --card: #ffffff; --ink: #1b1c1a; --quiet: #62645f; --line: #dcdcd6;"
LIGHT_SIGNALS = "--good: #1a7f4b; --warn: #a86400;\n  --bad: #c6302b;"
DARK = "--page: #161715; --card: #1f201e; --ink: #ecece8;\n  --quiet: #a5a7a0; --line: #393b37;"
DARK_SIGNALS = "--good: #4cc38a; --warn: #e0a33a; --bad: #f0716b;"

BASE_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; } h2 { font-size: 18px; margin: 0 0 10px; }
header p { margin: 4px 0 0; overflow-wrap: anywhere; } .quiet { color: var(--quiet); }
section { margin-top: 34px; }
.health { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 18px 0 0; padding: 10px 0;
  border-block: 1px solid var(--line); font-size: 14px; }
.sign { display: inline-block; width: 18px; font-weight: 700; } .sign.good { color: var(--good); }
.sign.warn { color: var(--warn); } .sign.bad { color: var(--bad); }
.verdict { font-size: 19px; line-height: 1.4; margin: 20px 0; padding-left: 14px; border-left: 4px solid var(--quiet); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.numbers dt { font-size: 13px; color: var(--quiet); } .numbers dd { margin: 0; font-size: 20px; font-weight: 600; }
.numbers dd span { display: block; font-size: 12px; font-weight: 400; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 13px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 2px; } .arm { white-space: nowrap; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr:target td { background: color-mix(in srgb, var(--warn) 18%, transparent); }
.scroll { overflow-x: auto; }
figure { margin: 0 0 22px; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin: 0 0 12px; }
.swatch { display: inline-block; width: 14px; height: 10px; border-radius: 2px; margin-right: 6px;
  background: var(--c); }
.key { display: inline-block; width: 10px; height: 10px; margin: 0 7px 0 2px; background: var(--bad); }
.key.diamond { transform: rotate(45deg) scale(.85); }
.key.triangle { background: var(--warn); clip-path: polygon(50% 0, 100% 100%, 0 100%); }
details { border-top: 1px solid var(--line); } figure + details, .scroll + details { margin-top: 8px; }
details[id] { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-bottom: 10px;
  padding: 0 14px; }
details:target { border-color: var(--warn); }
summary { cursor: pointer; padding: 8px 0; font-size: 14px; font-weight: 600; }
pre { margin: 0 0 12px; padding: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.command { user-select: all; }
.story { display: flex; flex-wrap: wrap; gap: 8px 28px; padding-bottom: 8px; }
.story dl { flex: 2 1 340px; } .story figure { flex: 1 1 260px; margin: 0; }
.story figcaption { font-weight: 400; font-size: 13px; color: var(--quiet); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 14px; }
.facts dt { color: var(--quiet); } .facts dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 34px; border-top: 1px solid var(--line); font-size: 13px; } footer p { margin: 6px 0 0; }
svg { display: block; } svg a { cursor: pointer; }
.chart { width: 100%; min-width: 600px; height: auto; } .sparkline { width: 260px; max-width: 100%; height: 56px; }
.interval { width: 128px; height: 18px; margin-top: 2px; }
text { font-size: 11.5px; fill: var(--ink); } .tick { fill: var(--quiet); font-variant-numeric: tabular-nums; }
.right { text-anchor: end; } .middle { text-anchor: middle; } .name, .slot { font-size: 12px; font-weight: 600; }
.birth { fill: var(--quiet); font-size: 11px; }
path { fill: none; } .grid, .rail { stroke: var(--line); } .axis { stroke: var(--quiet); }
"""

NARROW_AND_PRINT_STYLE = """\
@media (max-width: 720px) { main { padding: 18px 12px 40px; } table { font-size: 12px; } th { font-size: 11.5px; }
  th, td { padding-right: 6px; } .picture { display: none; } .verdict { font-size: 17px; } }
@media print { body { font-size: 12px; } main { max-width: none; padding: 0; } .chart { min-width: 0; }
  figure, .story, tr { break-inside: avoid; } .scroll { overflow: visible; } }
"""
