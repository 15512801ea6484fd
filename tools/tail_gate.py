"""Gate the tail: fail when a file, function, parameter list or nesting is longer or deeper than this project allows.

    python tools/tail_gate.py [ROOT]

Read are the Python files of src, benchmarks, examples, tests and tools under ROOT (default: this project). Limits:

    files       at most 500 lines
    functions   at most 60 code lines, from ``def`` on: blank lines, comments and docstrings are not counted
    parameters  at most 8, ``self``, ``cls``, ``*args`` and ``**kwargs`` not counted
    nesting     at most 4 of if, for, while, with, try and match inside each other

Tests are held to the first two alone. An exemption is a comment on the header of the function or class, or for a file
on or above its first statement, that names the limit and the reason::

    def attention_kernel(  # tail-gate: allow parameters>8 because the signature is flex_attention's

One without a reason, or that is not needed, is an error. The exit code is 1 when anything was found, else 0.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

LIMITS = {"files": 500, "functions": 60, "parameters": 8, "nesting": 4}
TEST_LIMITS = ("files", "functions")
FOLDERS = ("src", "benchmarks", "examples", "tests", "tools")

MARK = "tail-gate:"
EXEMPTION = re.compile(r"allow (?P<limits>[a-z]+>\d+(?:, [a-z]+>\d+)*)(?: because (?P<reason>\S.*))?")
FORM = "# tail-gate: allow functions>60 because <reason>"

NOT_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER),
}

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Scope: TypeAlias = Function | ast.ClassDef | ast.Module
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class Note:
    """One line of the report: something at a place."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Measure:
    """How much of one limit is used by one file or function, whose header lines may hold an exemption."""

    limit: str
    amount: int
    what: str
    header: range


@dataclass(frozen=True)
class Report:
    """What was found in a number of files."""

    violations: tuple[Note, ...] = ()
    exemptions: tuple[Note, ...] = ()


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code: not blank, not a comment, not part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    text = source.split("\n")
    return {line for line in lines if text[line - 1].strip()} - docstring_lines(tree)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that docstrings cover."""
    lines: set[int] = set()
    for scope in ast.walk(tree):
        if isinstance(scope, SCOPES) and ast.get_docstring(scope, clean=False) is not None:
            lines.update(range(scope.body[0].lineno, (scope.body[0].end_lineno or 0) + 1))
    return lines


def parameters(function: Function, in_class: bool) -> int:
    """Return how many parameters a caller of ``function`` may have to know."""
    positional = [*function.args.posonlyargs, *function.args.args]
    bound = in_class and bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) + len(function.args.kwonlyargs) - bound


def nesting(node: ast.AST) -> int:
    """Return how deep blocks are nested inside ``node``, functions and classes inside it left out."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SCOPES):
            continue
        is_block = isinstance(child, BLOCKS) and not is_elif(child, node)
        deepest = max(deepest, is_block + nesting(child))
    return deepest


def is_elif(node: ast.stmt, parent: ast.AST) -> bool:
    """Tell whether ``node`` is the ``elif`` of ``parent``: its alternative, at its own indentation."""
    return (
        isinstance(node, ast.If)
        and isinstance(parent, ast.If)
        and parent.orelse == [node]
        and node.col_offset == parent.col_offset
    )


def measures(source: str, tree: ast.Module) -> Iterator[Measure]:
    """Yield every measure of a file, its own first."""
    head = range(1, tree.body[0].lineno + 1 if tree.body else 2)
    yield Measure("files", len(source.removesuffix("\n").split("\n")), "the file", head)
    yield Measure("nesting", nesting(tree), "the module", head)
    code = code_lines(source, tree)
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            header = range(node.lineno, max(node.lineno + 1, node.body[0].lineno))
            if not isinstance(node, ast.ClassDef):
                length = len(code.intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
                yield Measure("functions", length, node.name, header)
                yield Measure("parameters", parameters(node, isinstance(parent, ast.ClassDef)), node.name, header)
            yield Measure("nesting", nesting(node), node.name, header)


def excess(measure: Measure) -> str:
    """Return the sentence for a measure above its limit."""
    most = LIMITS[measure.limit]
    used = {
        "files": f"has {measure.amount} lines, at most {most} are allowed. Split it by topic",
        "functions": f"has {measure.amount} code lines, at most {most} are allowed. Split it",
        "parameters": f"has {measure.amount} parameters, at most {most} are allowed. Pass a config or a record",
        "nesting": f"nests {measure.amount} blocks deep, at most {most} are allowed. Return early or split it",
    }
    form = FORM.replace("functions>60", f"{measure.limit}>{most}")
    return f"{measure.what} {used[measure.limit]}, or say why not: {form}"


def read_exemptions(path: Path, source: str) -> tuple[dict[tuple[int, str], str], list[Note]]:
    """Return the reason of every exemption by line and limit, and a violation for each that is not well-formed."""
    reasons: dict[tuple[int, str], str] = {}
    malformed: list[Note] = []
    known = {f"{limit}>{most}": limit for limit, most in LIMITS.items()}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        comment = token.string.removeprefix("#").strip()
        if token.type != tokenize.COMMENT or not comment.startswith(MARK):
            continue
        line = token.start[0]
        match = EXEMPTION.fullmatch(comment.removeprefix(MARK).strip())
        named = match["limits"].split(", ") if match else []
        if match is None or not all(limit in known for limit in named):
            text = f"cannot read `{token.string}`. Write: {FORM}; the limits are {', '.join(known)}."
            malformed.append(Note(path, line, text))
        elif not match["reason"]:
            malformed.append(Note(path, line, f"the exemption gives no reason. Write: {FORM}"))
        else:
            reasons.update({(line, known[limit]): match["reason"] for limit in named})
    return reasons, malformed


def check(path: Path, source: str, limits: tuple[str, ...] = tuple(LIMITS)) -> Report:
    """Return what is wrong in one file, and what was let pass."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return Report(violations=(Note(path, error.lineno or 1, f"is not Python: {error.msg}. Repair it."),))
    reasons, violations = read_exemptions(path, source)
    exemptions: list[Note] = []
    unused = dict(reasons)
    for measure in measures(source, tree):
        if measure.limit not in limits or measure.amount <= LIMITS[measure.limit]:
            continue
        exempt = next((line for line in measure.header if (line, measure.limit) in reasons), None)
        if exempt is None:
            violations.append(Note(path, measure.header[0], excess(measure)))
            continue
        reason = reasons[exempt, measure.limit]
        unused.pop((exempt, measure.limit), None)
        amount = f"{measure.limit}>{LIMITS[measure.limit]} ({measure.amount})"
        exemptions.append(Note(path, exempt, f"{measure.what} is allowed {amount} because {reason}"))
    for line, limit in unused:
        violations.append(Note(path, line, f"nothing here needs the exemption from {limit}. Delete it."))
    return Report(tuple(violations), tuple(exemptions))


def check_tree(root: Path) -> tuple[int, Report]:
    """Return the number of files read under ``root`` and what was found in them."""
    violations: list[Note] = []
    exemptions: list[Note] = []
    num_files = 0
    for folder in FOLDERS:
        limits = TEST_LIMITS if folder == "tests" else tuple(LIMITS)
        for file in sorted((root / folder).rglob("*.py")):
            report = check(file.relative_to(root), file.read_text(encoding="utf-8"), limits)
            violations += report.violations
            exemptions += report.exemptions
            num_files += 1
    return num_files, Report(tuple(violations), tuple(exemptions))


def main(arguments: list[str] | None = None) -> int:
    """Print every violation and exemption, then their numbers; return the exit code."""
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1], metavar="ROOT")
    root: Path = parser.parse_args(arguments).root
    num_files, report = check_tree(root)
    if num_files == 0:
        parser.error(f"`ROOT` must hold Python files in one of {', '.join(FOLDERS)}, got {root}.")
    for note in (*report.violations, *report.exemptions):
        print(note)
    print(f"tail gate: {num_files} files, {len(report.violations)} violations, {len(report.exemptions)} exemptions")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
