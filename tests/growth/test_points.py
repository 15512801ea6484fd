"""Growth points: probed without a trace, wrong ones named, layouts found or asked for."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, GrowthPoint, Stage
from morphogen.testing import HostCase, check_host, host_cases


class Awkward(nn.Module):
    """Dropout, BatchNorm, noise in eval mode, a buffer it replaces, a buffer it writes to, keyword arguments, a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(8, 8)
        self.twice = nn.ReLU()
        self.pair = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        x = self.norm(self.stem(x + shift))
        x = x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        self.count += 1
        self.last = x.detach().mean(0)
        x = self.twice(self.drop(self.twice(x)))
        return self.head(self.pair(x.unsqueeze(1))[0].squeeze(1))


EXAMPLE: dict[str, Any] = {"x": torch.ones(3, 4), "shift": 0.5}


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_slots_and_newborn_seeds_leave_no_trace(case: HostCase) -> None:
    check_host(case.build(), case.points, case.example())


def test_an_awkward_host_passes_too() -> None:
    check_host(Awkward(), {"a": "norm", "b": "drop"}, EXAMPLE)


def test_probing_touches_nothing(kit: Any) -> None:
    host = Awkward()
    host.norm.eval()
    calls: list[str] = []
    host.stem.register_forward_hook(lambda *_: calls.append("hook"))
    host.stem.register_forward_pre_hook(lambda *_: calls.append("pre"))
    before = {name: (id(t), t.clone()) for name, t in (*host.named_parameters(), *host.named_buffers())}
    modes = {name: part.training for name, part in host.named_modules()}
    hooks = {name: (len(p._forward_hooks), len(p._forward_pre_hooks)) for name, p in host.named_modules()}
    chance = kit.chance()
    model = GrowableModel(host, {"a": "norm"}, EXAMPLE)
    model.germinate("a", "mlp")
    assert kit.same(kit.chance(), chance)
    after = {name: (id(t), t.clone()) for name, t in (*host.named_parameters(), *host.named_buffers())}
    assert kit.same(before, after)
    assert {name: part.training for name, part in host.named_modules()} == modes
    hooks["norm"] = (1, 0)
    assert {name: (len(p._forward_hooks), len(p._forward_pre_hooks)) for name, p in host.named_modules()} == hooks
    assert calls


def test_a_host_that_fails_on_the_example_is_as_before() -> None:
    host = Awkward()
    keys = {name: len(part._forward_hooks) for name, part in host.named_modules()}
    with pytest.raises(RuntimeError):
        GrowableModel(host, {"a": "norm"}, torch.ones(3, 5))
    assert {name: len(part._forward_hooks) for name, part in host.named_modules()} == keys
    assert host.training and all(part.training for part in host.modules())


@pytest.mark.parametrize(
    ("points", "error", "match"),
    [
        ({}, ValueError, "`points` must name at least one submodule"),
        ({"a": "nrom"}, SlotError, r"slot 'a': the host has no submodule `nrom`. Did you mean \['norm'\]"),
        ({"a": "zzz"}, SlotError, "named_modules"),
        ({"a": "unused"}, SlotError, "slot 'a': submodule `unused` must be called once.*was called 0 times"),
        ({"a": "twice"}, SlotError, "was called 2 times"),
        (
            {"a": "pair"},
            SlotError,
            r"slot 'a': submodule `pair` must return a tensor, returned tuple. Give GrowthPoint\('pair', outp",
        ),
        ({"a b": "norm"}, ValueError, "identifier.*'a b'"),
        ({"host": "norm"}, ValueError, "identifier.*'host'"),
        ({"a.b": "norm"}, ValueError, "identifier"),
        ({"train": "norm"}, ValueError, "no attribute of nn.ModuleDict, got 'train'"),
        ({"a": GrowthPoint("norm", layout="NCHW")}, SlotError, r"slot 'a'.*layout NCHW.*\(3, 8\)"),
    ],
)
def test_a_wrong_point_is_named(kit: Any, points: dict[str, Any], error: type[Exception], match: str) -> None:
    host = Awkward()
    before, modes, chance = copy.deepcopy(host.state_dict()), [part.training for part in host.modules()], kit.chance()
    with pytest.raises(error, match=match):
        GrowableModel(host, points, EXAMPLE)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in host.modules())
    assert kit.same(before, host.state_dict()) and kit.same(chance, kit.chance())
    assert modes == [part.training for part in host.modules()]


MISUSES: dict[str, tuple[Callable[[GrowableModel], object], str]] = {
    "unknown slot": (lambda model: model.germinate("erly", "mlp"), "`slot` must be one of early, late, got 'erly'"),
    "advance nothing": (lambda model: model.advance("late"), "slot 'late' .*dormant"),
    "fossilize nothing": (lambda model: model.fossilize("late"), "slot 'late' .*dormant"),
    "prune nothing": (lambda model: model.prune("late"), "slot 'late' .*dormant"),
    "retarget nothing": (lambda model: model.set_alpha_target("late", 0.5), "slot 'late' .*dormant"),
    "excise nothing": (lambda model: model.excise("late"), "slot 'late' .*dormant"),
    "germinate twice": (lambda model: model.germinate("early", "mlp"), "slot 'early' must be dormant to germinate"),
    "fossilize too early": (lambda model: model.fossilize("early"), "slot 'early' .*training"),
    "override nothing": (lambda model: model(HostCase("NCHW").example(), alphas={"late": 0.0}), "slot 'late' .*dormant"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misuse_is_one_error_and_changes_nothing(kit: Any, misuse: str) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", Stage.TRAINING)
    run.steps(2)
    before = run.contents()
    operation, match = MISUSES[misuse]
    with pytest.raises(SlotError, match=match):
        operation(run.model)
    assert kit.differences(before, run.contents()) == []


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="`layout` must be one of NC, NCL, NLC, NCHW, LNC, got 'NHWC'"):
        GrowthPoint("norm", layout="NHWC")


def test_a_host_is_grown_by_one_model_at_a_time() -> None:
    host = Awkward()
    first = GrowableModel(host, {"a": "norm"}, EXAMPLE)
    with pytest.raises(SlotError, match="belongs to another GrowableModel"):
        GrowableModel(host, {"b": "drop"}, EXAMPLE)
    assert list(first.stages()) == ["a"]


def test_a_lazy_host_is_refused_as_it_is() -> None:
    host = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    with pytest.raises(SlotError, match="lazy"):
        GrowableModel(host, {"a": "0"}, torch.ones(2, 4))
    assert host[0].has_uninitialized_params()


def test_the_order_of_actions_is_that_of_the_points() -> None:
    case = HostCase("NCHW")
    reverse = dict(reversed(case.points.items()))
    assert list(GrowableModel(case.build(), reverse, case.example()).stages()) == ["late", "early"]
    one = GrowableModel(case.build(), {"late": "body"}, case.example())
    both = GrowableModel(case.build(), {"late": "body", "early": "norm"}, case.example())
    assert list(both.stages())[: len(one.stages())] == list(one.stages())


def test_a_point_that_returns_integers_is_named() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1, keepdim=True)

    with pytest.raises(SlotError, match="slot 'a': submodule `0` must return floating-point numbers, returns torch.int64"):
        GrowableModel(nn.Sequential(Tokens()), {"a": "0"}, torch.ones(2, 4))


class Rank3(nn.Module):
    """A feature (N, 6, 6) made by one kind of layer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


@pytest.mark.parametrize(
    ("layers", "layout"),
    [
        ((nn.Conv1d(6, 6, 3, padding=1),), "NCL"),
        ((nn.BatchNorm1d(6), nn.ReLU()), "NCL"),
        ((nn.Linear(6, 6),), "NLC"),
        ((nn.LayerNorm(6), nn.GELU()), "NLC"),
    ],
)
def test_the_layout_of_rank_3_is_told_by_the_layers(layers: tuple[nn.Module, ...], layout: str) -> None:
    model = GrowableModel(Rank3(*layers), {"a": "block"}, torch.ones(2, 6, 6))
    assert model.slot("a").site.layout == layout


@pytest.mark.parametrize("layers", [(nn.ReLU(),), (nn.Linear(6, 6), nn.Conv1d(6, 6, 1))])
def test_a_layout_that_cannot_be_told_is_asked_for(layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(SlotError, match="slot 'a'.*layout must be told.*GrowthPoint"):
        GrowableModel(Rank3(*layers), {"a": "block"}, torch.ones(2, 6, 6))
    model = GrowableModel(Rank3(*layers), {"a": GrowthPoint("block", layout="NLC")}, torch.ones(2, 6, 6))
    model.germinate("a", "norm")
    assert model.slot("a").site.width == 6


def test_an_unknown_slot_lists_the_slots() -> None:
    model = HostCase("NC").model()
    for call in (model.advance, model.fossilize, model.prune, model.excise, lambda name: model.germinate(name, "norm")):
        with pytest.raises(SlotError, match="`slot` must be one of early, late, got 'zzz'"):
            call("zzz")
