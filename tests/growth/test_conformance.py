"""The shipped suite itself: it covers whatever is registered, and rejects each kind of broken blueprint or host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import morphogen
from morphogen.growth import blueprints
from morphogen.growth.blueprints import blueprint, registry
from morphogen.testing import CHECKS, blueprint_cases, check_blueprint, check_host

PACKAGE = Path(morphogen.__file__).parent


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test register what it likes."""
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))
    yield


def register(cls: type[nn.Module], *layouts: Any) -> None:
    blueprint("mine", layouts=layouts or ("NC",))(cls)


class Good(nn.Module):
    """The smallest blueprint of one's own: what the tests below break in one place each."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(h)))

    @staticmethod
    def parameter_count(width: int, layout: str) -> int:
        return 2 * width**2 + 2 * width


class GoodImage(Good):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        self.inner = nn.Conv2d(width, width, 1)
        self.outer = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)


def test_a_blueprint_of_ones_own_is_covered_by_registering_it() -> None:
    covered = len(blueprint_cases())
    register(Good, "NC", "NLC")
    assert len(blueprint_cases()) == covered + 2 * 3
    check_blueprint("mine")
    check_blueprint("mine", width=5)


def test_a_convolution_of_ones_own_passes() -> None:
    register(GoodImage, "NCHW")
    check_blueprint("mine")


def test_the_suite_takes_options() -> None:
    check_blueprint("conv1d", width=6, options={"kernel_size": 3})
    check_blueprint("low_rank", options={"rank": 2})


def test_options_with_few_values_get_cases_of_their_own() -> None:
    found = {str(case) for case in blueprint_cases(["attention", "conv1d"])}
    assert {"attention-add-NLC-causal=True", "attention-add-NLC-causal=True-rope=True", "conv1d-add-NCL-causal=True"} <= found
    assert {str(case) for case in blueprint_cases(["glu"])} >= {"glu-gate-NC", "glu-add-NC-gate=sigmoid"}
    assert len(found) == 3 + 3 + 2 * (3 + 1)


def test_the_cost_of_a_blueprint_is_one_file_and_one_line() -> None:
    """Each blueprint is named in its own file and in one line of the package's table, and nowhere else in these floors."""
    files = [*(PACKAGE / "growth").rglob("*.py"), *(PACKAGE / "testing").rglob("*.py")]
    for name in blueprints.names():
        lines = {
            file.relative_to(PACKAGE).as_posix(): sum(
                bool(re.search(rf"blueprint\(\"{name}\"|\b{name} as {name}\b|blueprints[.]{name}\b", line))
                for line in file.read_text("utf-8").splitlines()
                if not (file.parent.name == "blueprints" and line.startswith("from "))  # one may be built upon another
            )
            for file in files
            if file.name != "merging.py"  # knows which fossils can be folded
        }
        found = {path: count for path, count in lines.items() if count}
        assert found == {"growth/blueprints/__init__.py": 1, f"growth/blueprints/{name}.py": 1}


class ReluLast(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).relu()


class NotZero(Good):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        nn.init.normal_(self.outer.weight, std=1e-4, generator=torch.Generator().manual_seed(0))


class NormLast(Good):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        self.norm = nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(super().forward(h))

    @staticmethod
    def parameter_count(width: int, layout: str) -> int:
        return 2 * width**2 + 4 * width


class GroupNormLast(GoodImage):
    """esper-lite's bottleneck: identity at birth, then a cliff."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(super().forward(h))

    @staticmethod
    def parameter_count(width: int, layout: str) -> int:
        return 2 * width**2 + 4 * width


class TwoZeroLayers(Good):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)


class DeadForever(Good):
    def forward(self, h: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(h)) * 0.0)


class Miscounted(Good):
    @staticmethod
    def parameter_count(width: int, layout: str) -> int:
        return 2 * width**2


class OverwritesInput(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.mul_(1.5))


class Dropping(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(h, 0.1, self.training))


class OwnChance(Good):
    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        values = torch.from_numpy(np.random.default_rng().normal(size=(width, width)))
        self.inner.weight.data.copy_(values)


class Untraceable(Good):
    def forward(self, h: Tensor) -> Tensor:
        s = super().forward(h)
        return s if float(h.sum()) > 1e9 else s * 1.0


class FixedLength(GoodImage):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h[:, :, :5, :5])


class Promoting(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).unsqueeze(0).squeeze(0)[: len(h) - 1]


class BatchStatistics(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h - h.mean(0))


class DividesByDeviation(Good):
    """Finite and learnable on features that vary, a cliff after one that does not."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        self.register_buffer("var", torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        if self.training and type(h) is Tensor:
            self.var = h.detach().var(0, correction=0)
        return self.outer(self.inner(h * (self.var + 1e-12).rsqrt()))


class LooksAhead(Good):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h + h.mean(1, keepdim=True))


class CausalInNameOnly(Good):
    def __init__(self, width: int, layout: str, causal: bool = False) -> None:
        super().__init__(width, layout)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h + h.mean(1, keepdim=True))

    @staticmethod
    def parameter_count(width: int, layout: str, causal: bool = False) -> int:
        return 2 * width**2 + 2 * width


class CausalWithoutEffect(CausalInNameOnly):
    """Looks at no other position, whatever the option says."""

    def forward(self, h: Tensor) -> Tensor:
        return Good.forward(self, h)


class AffineGroupNormFirst(GoodImage):
    """Correct, but torch crashes in the backward pass of a channels_last feature that needs no gradient."""

    def __init__(self, width: int, layout: str) -> None:
        super().__init__(width, layout)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.norm(h))

    @staticmethod
    def parameter_count(width: int, layout: str) -> int:
        return 2 * width**2 + 4 * width


BROKEN: list[tuple[type[nn.Module], str, str]] = [
    (ReluLast, "NC", "some gradient must be non-zero at birth"),
    (NotZero, "NC", r"s\(h\) must be 0 at birth"),
    (NormLast, "NC", "first step|move the output|norm"),
    (GroupNormLast, "NCHW", "first step|move the output|norm"),
    (TwoZeroLayers, "NC", "every parameter must have moved"),
    (DeadForever, "NC", "every parameter must have moved"),
    (Miscounted, "NC", "`parameter_count` must be"),
    (OverwritesInput, "NC", "h must not be written to"),
    (Dropping, "NC", "no global generator may move"),
    (OwnChance, "NC", "must be the same from the same generator"),
    (Untraceable, "NC", "must be traceable"),
    (FixedLength, "NCHW", "must be of shape"),
    (Promoting, "NC", "must be of shape"),
    (AffineGroupNormFirst, "NCHW", "affine=False"),
    (BatchStatistics, "NC", "other samples must not change"),
    (DividesByDeviation, "NC", "Divide by no scale that may be near zero"),
    (LooksAhead, "NLC", "must not depend on later positions"),
    (CausalInNameOnly, "NLC", "must not depend on later positions"),
    (CausalWithoutEffect, "NLC", "must depend on later positions"),
]


@pytest.mark.parametrize(("cls", "layout", "match"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_blueprint_is_rejected_for_its_fault(cls: type[nn.Module], layout: str, match: str) -> None:
    register(cls, layout)
    with pytest.raises(AssertionError, match=match):
        check_blueprint("mine")


def test_every_check_rejects_something() -> None:
    """A check that no broken blueprint trips would be decoration."""
    tripped: set[str] = set()
    for cls, layout, _ in BROKEN:
        registry._ROWS.pop("mine", None)
        register(cls, layout)
        for check in CHECKS:
            try:
                for case in blueprint_cases(["mine"]):
                    if case.operator == "add":
                        check(case)
            except (AssertionError, RuntimeError, TypeError, ValueError):
                tripped.add(check.__name__)
    assert tripped == {check.__name__ for check in CHECKS}


def test_a_host_that_remembers_its_calls_is_rejected() -> None:
    class Counting(nn.Module):
        """Feels the probe: its state is neither a buffer nor a parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.map, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.map(x) * (1.0 + self.calls)

    with pytest.raises(AssertionError, match="must be what it is without slots"):
        check_host(nn.Sequential(Counting()), {"a": "0"}, torch.ones(2, 4))


def test_a_registered_name_cannot_be_taken_twice() -> None:
    class Other(Good):
        pass

    with pytest.raises(ValueError, match="`name` must be new, got 'norm', which is Norm"):
        blueprint("norm", layouts=("NC",))(Other)
    with pytest.raises(ValueError, match="`layouts` must be some of NC, NCL, NLC, NCHW"):
        blueprint("new", layouts=("NHWC",))(Other)
    with pytest.raises(ValueError, match="`layouts`"):
        blueprint("new", layouts=())(Other)


def test_the_registry_lists_by_layout_and_describes() -> None:
    anywhere = {"glu", "low_rank", "low_rank_large", "mlp", "norm"}
    images = {"bottleneck", "conv3x3", "conv_heavy", "depthwise", "squeeze_excite"}
    sequences = {"attention", "conv1d", "flex_attention", "mlp_large", "mlp_small"}
    assert blueprints.names("NC") == tuple(sorted(anywhere | {"mlp_large", "mlp_small"}))
    assert set(blueprints.names("NCL")) == anywhere | {"conv1d", "depthwise", "squeeze_excite"}
    assert set(blueprints.names("NLC")) == anywhere | sequences
    assert set(blueprints.names("NCHW")) == anywhere | images
    for name in blueprints.names():
        row = blueprints.get(name)
        assert row.summary.startswith("s(h) = ") and row.layouts
    assert blueprints.get("squeeze_excite").options == ("reduction",)
