"""The tail gate counts what it says it counts, and can fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GATE = ROOT / "tools" / "tail_gate.py"


def gate(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the gate on the project under ``root``."""
    return subprocess.run([sys.executable, GATE, root], capture_output=True, text=True, check=False)


def gate_on(root: Path, code: str, folder: str = "src") -> subprocess.CompletedProcess[str]:
    """Run the gate on a project of one file."""
    file = root / folder / "package" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    return gate(root)


def function(num_code_lines: int, header: str = "def long():", start: str = "") -> str:
    """A function of that many code lines, its header among them; ``start`` comes between header and code."""
    return f"{header}\n{start}" + "    x = 1\n" * (num_code_lines - 1)


def method(num_code_lines: int) -> str:
    """A class with one such method."""
    return "class C:\n" + textwrap.indent(function(num_code_lines), "    ")


def nested(*headers: str) -> str:
    """A function in which each of ``headers`` opens a block inside the one before."""
    blocks = "".join(f"{'    ' * depth}{header}\n" for depth, header in enumerate(("def deep(x):", *headers)))
    return f"{blocks}{'    ' * (len(headers) + 1)}x()\n"


def test_this_project_passes() -> None:
    checked = gate(ROOT)
    assert checked.returncode == 0, checked.stdout


EIGHT = "a, b, c=0, /, d=0, e=0, *args, f=0, g=0, h=0, **kwargs"
ELSE = "                else:\n                    if x:\n                        x()\n"
WITHIN = {
    "empty": "",
    "file": "x = 1\n" * 500,
    "function": function(60),
    "blank lines": function(60, start="\n" * 9),
    "comments": function(60, start="    # why\n" * 9),
    "docstring": function(60, start='    """What.\n\n    More.\n    """\n'),
    "decorators": "@d\n" * 9 + function(60),
    "method": method(60),
    "parameters": f"def f({EIGHT}): ...\n",
    "self": f"class C:\n    def f(self, {EIGHT}): ...\n",
    "cls": f"class C:\n    @classmethod\n    def f(cls, {EIGHT}): ...\n",
    "nesting": nested("if x:", "for i in x:", "while x:", "with x:"),
    "elif": nested("if x:", "if x:", "if x:", "if x:") + "                elif x:\n                    x()\n" * 9,
    "inner function": nested("if x:", "if x:", "if x:", "def inner():", "if x:", "if x:"),
    "inner class": nested("if x:", "if x:", "class C:", "if x:", "if x:", "if x:", "if x:"),
}
BEYOND = {
    "file": ("x = 1\n" * 501, "module.py:1: the file has 501 lines, at most 500 are allowed."),
    "function": (function(61), "module.py:1: long has 61 code lines, at most 60 are allowed."),
    "async function": (function(61, "async def long():"), "long has 61 code lines"),
    "method": (method(61), "module.py:2: long has 61 code lines"),
    "text that is no docstring": (function(58) + '    x = """\n    a\n\n    """\n', "long has 61 code lines"),
    "parameters": (f"def f(z, {EIGHT}): ...\n", "module.py:1: f has 9 parameters, at most 8 are allowed."),
    "self outside a class": (f"def f(self, {EIGHT}): ...\n", "f has 9 parameters"),
    "nesting": (nested("if x:", "for i in x:", "while x:", "with x:", "if x:"), "deep nests 5 blocks deep"),
    "async": (nested("if x:", "if x:", "if x:", "if x:", "async for i in x:"), "deep nests 5"),
    "match": (nested("if x:", "if x:", "if x:", "match x:", "case 1:", "if x:"), "deep nests 5 blocks deep"),
    "if in else": (nested("if x:", "if x:", "if x:", "if x:") + ELSE, "deep nests 5 blocks deep"),
    "module": ("".join(f"{'    ' * depth}if x:\n" for depth in range(5)) + "    " * 5 + "x()\n", "the module nests 5"),
    "syntax": ("def f(:\n", "module.py:1: is not Python:"),
}


@pytest.mark.parametrize("code", WITHIN.values(), ids=WITHIN.keys())
def test_what_is_within_the_limits_passes(tmp_path: Path, code: str) -> None:
    checked = gate_on(tmp_path, code)
    assert (checked.returncode, checked.stdout) == (0, "tail gate: 1 files, 0 violations, 0 exemptions\n")


@pytest.mark.parametrize(("code", "message"), BEYOND.values(), ids=BEYOND.keys())
def test_what_is_beyond_a_limit_fails(tmp_path: Path, code: str, message: str) -> None:
    checked = gate_on(tmp_path, code)
    assert checked.returncode == 1, checked.stdout
    assert message in checked.stdout
    assert "1 violations, 0 exemptions" in checked.stdout


def test_tests_are_held_to_size_alone(tmp_path: Path) -> None:
    deep = nested("if x:", "if x:", "if x:", "if x:", "if x:")
    assert gate_on(tmp_path / "deep", deep + f"def f(z, {EIGHT}): ...\n", "tests").returncode == 0
    assert gate_on(tmp_path / "long", function(61), "tests").returncode == 1


@pytest.mark.parametrize("folder", ["src", "benchmarks", "examples", "tools"])
def test_each_folder_is_read(tmp_path: Path, folder: str) -> None:
    checked = gate_on(tmp_path, f"def f(z, {EIGHT}): ...\n", folder)
    assert f"{folder}/package/module.py:1: f has 9 parameters" in checked.stdout


ALLOW = "# tail-gate: allow"
EXEMPT = {
    "function": (function(61, f"def long():  {ALLOW} functions>60 because it is a table"), "functions>60 (61)"),
    "header of several lines": (
        f"def f(\n    z, {EIGHT}  {ALLOW} parameters>8 because so\n): ...\n",
        "parameters>8 (9)",
    ),
    "under the header": (function(61, start=f"    {ALLOW} functions>60 because so\n"), "functions>60 (61)"),
    "file": (f"{ALLOW} files>500 because it is generated\n" + "x = 1\n" * 500, "files>500 (501)"),
    "nesting": (
        nested(*["if x:"] * 5).replace("def deep(x):", f"def deep(x):  {ALLOW} nesting>4 because so"),
        "nesting",
    ),
}


@pytest.mark.parametrize(("code", "allowed"), EXEMPT.values(), ids=EXEMPT.keys())
def test_an_exemption_with_a_reason_passes_and_is_counted(tmp_path: Path, code: str, allowed: str) -> None:
    checked = gate_on(tmp_path, code)
    assert checked.returncode == 0, checked.stdout
    assert f"is allowed {allowed}" in checked.stdout
    assert "0 violations, 1 exemptions" in checked.stdout


def test_one_comment_may_allow_two_limits(tmp_path: Path) -> None:
    code = function(61, f"def f(z, {EIGHT}):  {ALLOW} functions>60, parameters>8 because the other side fixes it")
    checked = gate_on(tmp_path, code)
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count("because the other side fixes it") == 2
    assert "0 violations, 2 exemptions" in checked.stdout


REFUSED = {
    "no reason": (f"def long():  {ALLOW} functions>60", "the exemption gives no reason. Write: # tail-gate: allow"),
    "empty reason": (f"def long():  {ALLOW} functions>60 because", "cannot read"),
    "other limit": (f"def long():  {ALLOW} functions>90 because so", "the limits are files>500, functions>60,"),
    "unknown limit": (f"def long():  {ALLOW} lines>60 because so", "cannot read"),
    "no limit": ("def long():  # tail-gate: off", "cannot read `# tail-gate: off`"),
    "wrong limit": (f"def long():  {ALLOW} nesting>4 because so", "nothing here needs the exemption from nesting"),
    "in a string": (f'def long(x="{ALLOW} functions>60 because so"):', "long has 61 code lines"),
}


@pytest.mark.parametrize(("header", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_any_other_exemption_is_refused(tmp_path: Path, header: str, message: str) -> None:
    checked = gate_on(tmp_path, function(61, header))
    assert checked.returncode == 1
    assert message in checked.stdout
    assert "long has 61 code lines" in checked.stdout
    assert "0 exemptions" in checked.stdout


def test_an_exemption_that_is_not_needed_is_refused(tmp_path: Path) -> None:
    checked = gate_on(tmp_path, function(60, f"def long():  {ALLOW} functions>60 because it was longer once"))
    assert checked.returncode == 1
    assert "module.py:1: nothing here needs the exemption from functions. Delete it." in checked.stdout


def test_a_place_without_python_is_misuse(tmp_path: Path) -> None:
    checked = gate(tmp_path)
    assert checked.returncode == 2
    assert "`ROOT` must hold Python files" in checked.stderr
