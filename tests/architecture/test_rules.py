"""Rules that every module of the package keeps, read from its syntax tree; each rule is shown to fail on a breach."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "morphogen"
MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Module:
    """One module as the rules see it; ``path`` is relative to the package."""

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def imported(self) -> dict[str, str]:
        """The dotted name behind each name that an import binds anywhere in the module."""
        names: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    names[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        return names

    @cached_property
    def comments(self) -> dict[int, str]:
        """The comment on each line that has one."""
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}

    def dotted(self, node: ast.AST) -> str:
        """The full dotted name that ``node`` refers to ("torch.nn.init.normal_"), or "" where it is no import."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, "")
        if isinstance(node, ast.Attribute):
            owner = self.dotted(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        return ""

    def is_explained(self, node: ast.stmt | ast.expr | ast.ExceptHandler, mark: str) -> bool:
        """Tell whether the first line of ``node`` has the comment ``# <mark>: <reason>``."""
        return re.search(rf"# {mark}: \S", self.comments.get(node.lineno, "")) is not None


Breach = tuple[int, str]
Rule = Callable[[Module], Iterator[Breach]]


def terminal_name(node: ast.AST) -> str:
    """The last name of an expression: ``optimizers`` for ``self.optimizers["a"]``, ``build`` for ``cls.build()``."""
    if isinstance(node, (ast.Subscript, ast.Starred)):
        return terminal_name(node.value)
    if isinstance(node, ast.Call):
        return terminal_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def attributes(module: Module) -> Iterator[tuple[int, ast.expr, str]]:
    """Every attribute read, written or fetched by ``getattr`` and its kin with a literal name: line, owner, name."""
    for node in module.nodes:
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.value, node.attr
        elif isinstance(node, ast.Call) and terminal_name(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            match node.args:
                case [owner, ast.Constant(value=str(name)), *_]:
                    yield node.lineno, owner, name
                case _:
                    pass


def surgery_alone_touches_optimizers(module: Module) -> Iterator[Breach]:
    if module.path.startswith("state/surgery"):
        return
    for line, owner, name in attributes(module):
        if name == "param_groups":
            yield line, "`.param_groups` is touched by state/surgery*.py alone. Call one of its functions."
        if name == "state" and re.search("optim|^opt$", terminal_name(owner), re.IGNORECASE):
            yield line, "an optimizer's `.state` is touched by state/surgery*.py alone. Call one of its functions."


PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "joblib"}
HARMLESS = "pickle.UnpicklingError"  # what torch.load raises when it refuses a file


def nothing_is_unpickled(module: Module) -> Iterator[Breach]:
    for node in module.nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(name.partition(".")[0] in PICKLES and name != HARMLESS for name in names):
            yield node.lineno, f"`{', '.join(names)}` executes what it reads. Use safetensors and JSON."
        if isinstance(node, ast.Call):
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("weights_only")
            is_load = module.dotted(node.func) in ("torch.load", "torch.serialization.load")
            if safe != "True" and (is_load or safe is not None):
                yield node.lineno, "torch.load must be given weights_only=True, literally."


SEEDS = {"manual_seed", "manual_seed_all", "seed", "seed_all"}
OWN_STREAMS = {
    "random": {"Random", "SystemRandom", "getstate", "setstate"},
    "numpy.random": {
        *("BitGenerator", "Generator", "MT19937", "PCG64", "PCG64DXSM", "Philox", "RandomState", "SFC64"),
        *("SeedSequence", "default_rng", "bit_generator", "get_state", "set_state"),
    },
}
TORCH_DRAWS = {
    f"torch.{name}" for name in ("bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm")
} | {f"torch.{name}_like" for name in ("rand", "randint", "randn")}
TENSOR_DRAWS = {
    *("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"),
    *("trunc_normal_", "orthogonal_", "sparse_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
}


def global_streams_are_left_alone(module: Module) -> Iterator[Breach]:
    for node in module.nodes:
        if isinstance(node, (ast.Attribute, ast.Name)):
            owner, _, name = module.dotted(node).rpartition(".")
            is_torch = owner.partition(".")[0] == "torch" and name in SEEDS
            is_shared = is_torch or (owner in OWN_STREAMS and name not in OWN_STREAMS[owner])
            if is_shared and not module.is_explained(node, "shared"):
                yield node.lineno, f"`{owner}.{name}` uses a generator that others share. Use a stream of your own."
        elif isinstance(node, ast.Call) and not any(keyword.arg == "generator" for keyword in node.keywords):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = module.dotted(node.func)
            if name in TORCH_DRAWS or method in TENSOR_DRAWS or name.rpartition(".")[2] in TENSOR_DRAWS:
                yield node.lineno, f"`{ast.unparse(node.func)}` draws from the global generator. Pass generator=."


def caught(kind: ast.expr | None) -> set[str]:
    """The last names of the exceptions that an ``except kind`` or ``suppress(kind)`` catches; a bare one: {""}."""
    if kind is None:
        return {""}
    return {terminal_name(one) for one in (kind.elts if isinstance(kind, ast.Tuple) else [kind])}


def is_blind(handler: ast.ExceptHandler) -> bool:
    """Tell whether ``handler`` may hide a fault, as one that only tidies up after BaseException does not."""
    kinds = caught(handler.type)
    last = handler.body[-1]
    raises_again = isinstance(last, ast.Raise) and last.exc is None
    return bool(kinds & {"", "Exception"}) or ("BaseException" in kinds and not raises_again)


def nothing_is_caught_blindly(module: Module) -> Iterator[Breach]:
    for node in module.nodes:
        if isinstance(node, ast.ExceptHandler) and is_blind(node) and not module.is_explained(node, "border"):
            yield node.lineno, "a broad `except` needs `# border: <reason>` on its line. Catch what you expect."
        if isinstance(node, ast.Call) and module.dotted(node.func) == "contextlib.suppress":
            if any(caught(kind) & {"Exception", "BaseException"} for kind in node.args):
                yield node.lineno, "contextlib.suppress hides everything here. Name what you expect."


def imports_stand_at_the_top(module: Module) -> Iterator[Breach]:
    if module.path.startswith(("integrations/", "pbt/engines/")):
        return
    functions = (node for node in module.nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    local = {node for function in functions for node in ast.walk(function)}
    for node in local:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not module.is_explained(node, "optional"):
            yield node.lineno, "an import inside a function needs `# optional: <reason>`. Move it to the top."


RULES = (
    surgery_alone_touches_optimizers,
    nothing_is_unpickled,
    global_streams_are_left_alone,
    nothing_is_caught_blindly,
    imports_stand_at_the_top,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    assert MODULES, f"no module under {PACKAGE}"
    breaches = [
        f"src/morphogen/{path}:{line}: {text}"
        for path, source in ((file.relative_to(PACKAGE).as_posix(), file.read_text("utf-8")) for file in MODULES)
        for line, text in sorted(rule(Module(path, source)))
    ]
    assert not breaches, "\n".join(breaches)


BREACHES: list[tuple[Rule, str]] = [
    (surgery_alone_touches_optimizers, "optimizer.param_groups[0]['lr'] = 1"),
    (surgery_alone_touches_optimizers, "anything.param_groups"),
    (surgery_alone_touches_optimizers, "getattr(anything, 'param_groups')"),
    (surgery_alone_touches_optimizers, "self._optimizer.state[p]"),
    (surgery_alone_touches_optimizers, "self.innerOptimizer.state.clear()"),
    (surgery_alone_touches_optimizers, "for p in self.optimizers['main'].state: ..."),
    (surgery_alone_touches_optimizers, "opt.state = {}"),
    (surgery_alone_touches_optimizers, "getattr(inner_optimizer, 'state', None)"),
    (nothing_is_unpickled, "import pickle"),
    (nothing_is_unpickled, "from pickle import loads"),
    (nothing_is_unpickled, "from pickle import UnpicklingError, Unpickler"),
    (nothing_is_unpickled, "import os, cloudpickle.compat as c"),
    (nothing_is_unpickled, "import torch\ntorch.load(path)"),
    (nothing_is_unpickled, "import torch as th\nth.load(path, weights_only=False)"),
    (nothing_is_unpickled, "from torch import load\nload(path, weights_only=trusted)"),
    (nothing_is_unpickled, "reader(path, weights_only=False)"),
    (global_streams_are_left_alone, "import torch\ntorch.manual_seed(0)"),
    (global_streams_are_left_alone, "import torch\ntorch.seed()"),
    (global_streams_are_left_alone, "import torch.cuda\ntorch.cuda.manual_seed_all(0)"),
    (global_streams_are_left_alone, "from torch import manual_seed\nmanual_seed(0)"),
    (global_streams_are_left_alone, "import torch\ntorch.default_generator.manual_seed(0)"),
    (global_streams_are_left_alone, "import torch\ntorch.randn(3)"),
    (global_streams_are_left_alone, "import torch\ntorch.rand_like(x)"),
    (global_streams_are_left_alone, "from torch import nn\nnn.init.kaiming_uniform_(w, a=5)"),
    (global_streams_are_left_alone, "from torch.nn.init import normal_\nnormal_(w)"),
    (global_streams_are_left_alone, "weight.data.uniform_(-1, 1)"),
    (global_streams_are_left_alone, "import numpy as np\nnp.random.seed(0)"),
    (global_streams_are_left_alone, "import numpy as np\nx = np.random.normal(size=3)"),
    (global_streams_are_left_alone, "from numpy import random\nrandom.permutation(3)"),
    (global_streams_are_left_alone, "import random\nrandom.shuffle(x)"),
    (global_streams_are_left_alone, "import random\ndraw = random.random"),
    (global_streams_are_left_alone, "import random\ndraw = random.random()  # shared:"),
    (global_streams_are_left_alone, "from random import choice\nchoice(x)"),
    (nothing_is_caught_blindly, "try: x()\nexcept: pass"),
    (nothing_is_caught_blindly, "try: x()\nexcept Exception: raise"),
    (nothing_is_caught_blindly, "try: x()\nexcept (ValueError, Exception) as e: pass"),
    (nothing_is_caught_blindly, "try: x()\nexcept BaseException: y()"),
    (nothing_is_caught_blindly, "try: x()\nexcept Exception:  # border:\n  pass"),
    (nothing_is_caught_blindly, "try: x()\nexcept Exception:  # it is fine\n  pass"),
    (nothing_is_caught_blindly, "import contextlib\nwith contextlib.suppress(Exception): x()"),
    (imports_stand_at_the_top, "def f():\n    import ray"),
    (imports_stand_at_the_top, "class C:\n    async def f(self):\n        if x:\n            from os import path"),
    (imports_stand_at_the_top, "def f():\n    import ray  # optional:"),
]
KEPT: list[tuple[Rule, str]] = [
    (surgery_alone_touches_optimizers, "self.state.capture()\ngovernor.state\nslot.state = 3"),
    (surgery_alone_touches_optimizers, "optimizer.state_dict()\nsnapshot['param_groups']"),
    (surgery_alone_touches_optimizers, "option.state\nadopt.state\nsurgery.reset_moments(optimizer)"),
    (nothing_is_unpickled, "import torch\ntorch.load(path, weights_only=True, map_location='cpu')"),
    (nothing_is_unpickled, "from pickle import UnpicklingError"),
    (nothing_is_unpickled, "import json\njson.load(file)\nstate.load(path)"),
    (global_streams_are_left_alone, "import torch\ng = torch.Generator().manual_seed(0)\ntorch.randn(3, generator=g)"),
    (global_streams_are_left_alone, "import torch\ntorch.get_rng_state()\ntorch.set_rng_state(x)\ntorch.zeros(3)"),
    (global_streams_are_left_alone, "from torch import nn\nnn.init.zeros_(w)\nnn.init.normal_(w, generator=g)"),
    (global_streams_are_left_alone, "import numpy as np\nnp.random.default_rng(seed).normal()"),
    (global_streams_are_left_alone, "import numpy as np\ndef f(rng: np.random.Generator): rng.shuffle(x)"),
    (global_streams_are_left_alone, "import random\nrandom.Random(3).shuffle(x)\nrandom.getstate()"),
    (global_streams_are_left_alone, "def f(random): random.shuffle(x)"),
    (global_streams_are_left_alone, "import random\ndraw = random.random()  # shared: what is checked is who else draws"),
    (nothing_is_caught_blindly, "try: x()\nexcept (OSError, ValueError): pass"),
    (nothing_is_caught_blindly, "try: x()\nexcept Exception:  # border: a sink must not stop training\n  pass"),
    (nothing_is_caught_blindly, "try: x()\nexcept BaseException:\n  y()\n  raise"),
    (nothing_is_caught_blindly, "import contextlib\nwith contextlib.suppress(OSError): x()"),
    (imports_stand_at_the_top, "import typing\nif typing.TYPE_CHECKING:\n    import torch"),
    (imports_stand_at_the_top, "def f():\n    import ray  # optional: only this engine needs it"),
]


@pytest.mark.parametrize(("rule", "source"), BREACHES)
def test_a_breach_is_found(rule: Rule, source: str) -> None:
    assert list(rule(Module("growth/model.py", source)))


@pytest.mark.parametrize(("rule", "source"), KEPT)
def test_what_is_allowed_is_let_pass(rule: Rule, source: str) -> None:
    assert not list(rule(Module("growth/model.py", source)))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (surgery_alone_touches_optimizers, "state/surgery.py", "optimizer.param_groups\noptimizer.state"),
        (imports_stand_at_the_top, "integrations/ray_tune.py", "def f():\n    import ray"),
        (imports_stand_at_the_top, "pbt/engines/ray.py", "def f():\n    import ray"),
    ],
)
def test_a_rule_knows_its_one_place(rule: Rule, path: str, source: str) -> None:
    assert not list(rule(Module(path, source)))
    assert list(rule(Module(f"other/{path}", source)))


def test_public_names_are_loaded_by_importlib() -> None:
    """A lazy ``__getattr__`` of the package calls importlib.import_module: an import statement would be eager."""
    init = PACKAGE / "__init__.py"
    module = Module("__init__.py", init.read_text("utf-8") if init.exists() else "")
    lazy = [node for node in module.tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    for function in lazy:
        called = {module.dotted(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        assert "importlib.import_module" in called
