"""New hidden units between two layers of the host: a seed like any other, and after a merge part of the layers themselves."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from morphogen.growth import GrowableModel, GrowthConfig, Sowing, Stage
from morphogen.state import TrainingState, draw_from
from morphogen.telemetry.events import Emit, discard
from morphogen.testing import LENIENT, lead_to

SHAPES = {"NC": (5, 4), "NLC": (5, 6, 4), "NCL": (5, 4, 8), "NCHW": (5, 4, 8, 8)}
UNITS = 4


class Mlp(nn.Module):
    """As in transformers: named layers, the nonlinearity a function or a module."""

    def __init__(self, module: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.act = nn.GELU() if module else None
        self.drop = nn.Dropout(0.0)
        self.fc2 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.drop(self.fc2(F.gelu(hidden) if self.act is None else self.act(hidden)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(4, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv_b = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_b(F.relu(self.bn(self.conv_a(x))))


PAIRS: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), {}),
    "linear over tokens": (
        "NLC",
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.SiLU(), nn.Linear(6, 5, bias=False)),
        {},
    ),
    "linear, no activation": ("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False)), {}),
    "batch norm": (
        "NC",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 5)),
        {},
    ),
    "conv1d": (
        "NCL",
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, padding=1, stride=2), nn.BatchNorm1d(6), nn.ELU(0.5), nn.Conv1d(6, 5, 3, bias=False)
        ),
        {},
    ),
    "conv2d": (
        "NCHW",
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", bias=False), nn.BatchNorm2d(6), nn.ReLU(True)),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, padding=1, dilation=1),
        ),
        {},
    ),
    "group norm": (
        "NCHW",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.LeakyReLU(0.2), nn.Conv2d(6, 5, 1)),
        {},
    ),
    "norm without weights": (
        "NCL",
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.GroupNorm(3, 6, affine=False), nn.ReLU(), nn.Conv1d(6, 5, 1)),
        {},
    ),
    "batch statistics alone": (
        "NC",
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False), nn.ReLU(), nn.Linear(6, 5)
        ),
        {},
    ),
    "mlp, module": ("NLC", Mlp, {"first": "fc1", "second": "fc2", "activation": "act"}),
    "mlp, function": ("NC", lambda: Mlp(False), {"first": "fc1", "second": "fc2", "activation": "gelu"}),
    "named norm": ("NCHW", Named, {"first": "conv_a", "second": "conv_b", "norm": "bn", "activation": "relu"}),
}


class Scale(nn.Module):
    """Something upstream that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Host(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.stem = Scale()
        self.pair = pair
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.pair(self.stem(x)), inplace=True).flatten(1))


@dataclasses.dataclass(frozen=True)
class Case:
    """What ``kit.run`` grows: a pair of layers between an input and a head."""

    layout: Any
    pair: Callable[[], nn.Module]
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    points: dict[str, str] = dataclasses.field(default_factory=lambda: {"early": "pair"})

    def example(self, seed: int = 0) -> Tensor:
        return torch.randn(SHAPES[self.layout], generator=torch.Generator().manual_seed(seed))

    def build(self) -> nn.Module:
        with draw_from(torch.Generator().manual_seed(0)):
            host = Host(self.pair())
            host(self.example())
        return host

    def model(self, *, config: GrowthConfig = LENIENT, seed: int = 0, emit: Emit = discard) -> GrowableModel:
        return GrowableModel(self.build(), self.points, self.example(), config=config, seed=seed, emit=emit)


def case_of(name: str) -> Case:
    return Case(*PAIRS[name])


def sown(kit: Any, case: Case, stage: Stage, optimizer: str = "adam", alpha: float = 1.0, **options: Any) -> Any:
    """A run with new units in ``stage``, trained in each stage on the way."""
    run = kit.run(case, optimizer)
    run.steps(3)
    told = {"units": 2 * UNITS if "group" in str(case.pair()).lower() else UNITS, **case.options, **options}
    run.model.germinate("early", Sowing(blueprint="widen", options=told, alpha_target=alpha))
    for target in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
        if target <= stage:
            lead_to(run.model, "early", target, case.example())
            run.steps(2)
    return run


def fossil(kit: Any, case: Case, optimizer: str = "adam", alpha: float = 1.0, **options: Any) -> Any:
    run = sown(kit, case, Stage.FOSSILIZED, optimizer, alpha, **options)
    with torch.no_grad():  # as after long training
        for index, parameter in enumerate(run.model.slot("early").seed.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)), alpha=0.3)
    return run


def outputs(run: Any, seed: int = 3) -> list[Tensor]:
    inputs = run.case.example(seed=seed)
    return [copy.deepcopy(run.model).train(mode)(inputs).detach() for mode in (True, False)]


def layers(pair: nn.Module) -> tuple[Any, Any]:
    found = [part for part in pair.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return found[0], found[-1]


@pytest.mark.parametrize("name", PAIRS)
def test_new_units_start_without_effect_and_with_a_gradient(kit: Any, name: str) -> None:
    run = sown(kit, case_of(name), Stage.GERMINATED)
    bare = run.case.build()
    bare.load_state_dict(run.model.host.state_dict())
    for mode in (True, False):
        expected, found = (module.train(mode)(run.case.example(4)).detach() for module in (bare, run.model))
        assert kit.same(expected, found)
    body = run.model.slot("early").seed.body
    assert not bool(body(run.case.example()).any())
    assert body.inner.weight.any() and not body.outer.weight.any()
    body.train()(run.case.example()).sum().backward()
    assert body.outer.weight.grad.any()


@pytest.mark.parametrize("name", PAIRS)
def test_incubating_units_learn_and_the_host_does_not_notice(kit: Any, name: str) -> None:
    run, bare = sown(kit, case_of(name), Stage.GERMINATED), kit.run(case_of(name))
    bare.steps(3)
    run.model.advance("early")
    before = copy.deepcopy(run.model.slot("early").seed.state_dict())
    for _ in range(4):
        assert kit.same(run.step(), bare.step())
    ours, theirs = run.contents(), bare.contents()
    for what in ("tensors", "gradients", "moments"):
        for key, value in theirs[what].items():
            if key.startswith("host."):
                assert kit.same(ours[what][key], value), (what, key)
    after = run.model.slot("early").seed.state_dict()
    assert all(not torch.equal(after[key], value) for key, value in before.items() if key.endswith(("weight", "bias")))


def test_in_a_shadow_pass_new_units_alone_learn(kit: Any) -> None:
    run = kit.run(case_of("batch norm"), config=LENIENT.replace(incubator="shadow"))
    run.steps(2)
    run.sow("early", "widen", Stage.TRAINING)
    run.model.zero_grad()
    with run.model.shadow():
        run.model(run.case.example()).square().mean().backward()
    assert all(parameter.grad is None for parameter in run.model.host.parameters())
    assert bool(run.model.slot("early").seed.body.outer.weight.grad.any())


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_new_units_under_autocast(kit: Any, name: str) -> None:
    run = sown(kit, case_of(name), Stage.BLENDING)
    with torch.autocast("cpu", torch.bfloat16):
        run.step()
    run.state.verify()


@pytest.mark.parametrize("name", PAIRS)
def test_a_blended_seed_computes_what_it_says(kit: Any, name: str) -> None:
    run = fossil(kit, case_of(name), alpha=0.6)
    body, host = run.model.slot("early").seed.body, run.model.host
    run.model.eval()
    x = run.case.example(9)
    bare = copy.deepcopy(run.case.build().pair)
    bare.load_state_dict(host.pair.state_dict())
    x = host.stem(x)
    expected = bare.eval()(x) + 0.6 * body.outer(body.middle(body.inner(x)))
    torch.testing.assert_close(host.pair(x), expected)
    plain = run.model.export()
    assert torch.equal(plain(run.case.example(9)), run.model(run.case.example(9)))


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("name", PAIRS)
def test_a_merged_fossil_is_part_of_both_layers(kit: Any, name: str, alpha: float) -> None:
    run = fossil(kit, case_of(name), alpha=alpha)
    model, expected = run.model, outputs(run)
    body = copy.deepcopy(model.slot("early").seed.body)
    (first, second), units = layers(model.host.pair), body.inner.weight.shape[0]
    old = {key: value.detach().clone() for key, value in model.host.pair.state_dict().items()}
    weights = [first.weight.detach().clone(), second.weight.detach().clone()]
    identity = {key: id(parameter) for key, parameter in model.host.named_parameters()}
    state = model.merge("early")
    assert state.stage is Stage.DORMANT and state.history[-1].reason == "merged"
    for ours, theirs in zip(outputs(run), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(first.weight, torch.cat([weights[0], body.inner.weight], 0))
    assert torch.equal(second.weight, torch.cat([weights[1], alpha * body.outer.weight], 1))
    assert {key: id(parameter) for key, parameter in model.host.named_parameters()} == identity
    for part in model.host.pair.modules():
        sizes = {key: getattr(part, key, None) for key in ("num_features", "num_channels")}
        assert all(size in (None, 6 + units) for size in sizes.values())
    assert str(6 + units) in str(first) and str(6 + units) in str(second)
    grown = {key for key, value in model.host.pair.state_dict().items() if value.shape != old[key].shape}
    for key in old.keys() - grown:
        assert torch.equal(model.host.pair.state_dict()[key], old[key])
    assert run.members() == run.owned() and {id(p) for p in run.optimizer.state} <= run.members()
    run.optimizer.state_dict()
    run.state.verify()
    run.steps(2)
    run.state.verify()


def test_the_seed_reads_the_input_of_the_submodule_also_for_host_gradients(kit: Any) -> None:
    run = fossil(kit, case_of("linear"))
    x = run.case.example().requires_grad_()
    found = torch.autograd.grad(run.model(x).sum(), x)[0]
    run.model.merge("early")
    torch.testing.assert_close(torch.autograd.grad(run.model(x).sum(), x)[0], found)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_moments_are_the_hosts_then_the_seeds(kit: Any, optimizer: str, alpha: float) -> None:
    run = sown(kit, case_of("batch norm"), Stage.FOSSILIZED, optimizer, alpha)
    model, held = run.model, run.optimizer.state
    pair, body = model.host.pair, model.slot("early").seed.body
    joined = [(pair[0].weight, body.inner.weight, 0, 1.0), (pair[0].bias, body.inner.bias, 0, 1.0)]
    joined += [(pair[1].weight, body.middle[0].weight, 0, 1.0), (pair[1].bias, body.middle[0].bias, 0, 1.0)]
    joined += [(pair[3].weight, body.outer.weight, 1, alpha)]
    expected: dict[int, dict[str, Tensor]] = {}
    for host, seed, dim, scale in joined:
        ours, theirs = held[host], held[seed]
        if optimizer == "sgd":
            expected[id(host)] = {
                "momentum_buffer": torch.cat([ours["momentum_buffer"], theirs["momentum_buffer"] / scale], dim)
            }
            continue
        assert ours["step"] > theirs["step"]
        ages = [(1 - beta ** ours["step"]) / (1 - beta ** theirs["step"]) for beta in (0.9, 0.999)]
        expected[id(host)] = {
            "step": ours["step"].clone(),
            "exp_avg": torch.cat([ours["exp_avg"], theirs["exp_avg"] / scale * ages[0]], dim),
            "exp_avg_sq": torch.cat([ours["exp_avg_sq"], theirs["exp_avg_sq"] / scale**2 * ages[1]], dim),
        }
    others = {p: copy.deepcopy(held[p]) for p in (pair[3].bias, model.host.head.weight, model.host.head.bias)}
    groups = run.contents()["groups"]
    model.merge("early")
    for host, *_ in joined:
        assert held[host].keys() == expected[id(host)].keys()
        for key, value in expected[id(host)].items():
            torch.testing.assert_close(held[host][key], value, rtol=1e-5, atol=1e-9)
    assert all(kit.same(copy.deepcopy(held[parameter]), value) for parameter, value in others.items())
    assert run.contents()["groups"] == [group for group in groups if group["owner"] == "host"]
    before = pair[0].weight.detach().clone()
    run.step()
    assert 0.0 < float((pair[0].weight.detach() - before).abs().max()) < 0.1


def test_a_frozen_fossil_brings_no_moments_and_the_next_steps_are_sane(kit: Any) -> None:
    run = kit.run(case_of("linear"), "adam", LENIENT.replace(freeze_fossils=True))
    run.steps(30)
    run.sow("early", "widen", Stage.FOSSILIZED, options={"units": 3})
    run.steps(2)
    weight = run.model.host.pair[0].weight
    old = run.optimizer.state[weight]["exp_avg_sq"].clone()
    run.model.merge("early")
    torch.testing.assert_close(run.optimizer.state[weight]["exp_avg_sq"][6:], old.mean().expand(3, 4))
    assert not run.optimizer.state[weight]["exp_avg"][6:].any()
    assert weight.requires_grad
    before = weight.detach().clone()
    run.step()
    assert float((weight.detach() - before).abs().max()) < 3 * 0.01
    run.state.verify()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["batch norm", "conv2d", "group norm", "norm without weights"])
def test_a_rewind_undoes_a_merge(kit: Any, name: str, optimizer: str) -> None:
    run, twin = (fossil(kit, case_of(name), optimizer) for _ in range(2))
    snapshot, before = run.state.capture(), run.contents()
    host = run.model.host
    identity = [id(p) for p in host.parameters()]
    for _ in range(2):
        run.model.merge("early")
        merged = run.state.capture()
        run.steps(3)
        run.state.restore(snapshot)
        run.state.verify()
        assert set(kit.differences(before, run.contents())) <= {"identity", "gradients"}
        assert [id(p) for p in host.parameters()] == identity and str(host) == str(twin.model.host)
    for each in (run, twin):
        each.model.zero_grad()
    assert kit.same(run.steps(3), twin.steps(3))
    run.state.restore(merged)
    run.state.verify()
    twin.state.restore(snapshot)
    twin.model.merge("early")
    assert kit.same(run.steps(3), twin.steps(3))


@pytest.mark.parametrize("strategy", ["reset", "keep"])
def test_a_rewind_with_other_moments_stays_sound(kit: Any, strategy: Any) -> None:
    run = fossil(kit, case_of("batch norm"))
    snapshot = run.state.capture()
    run.model.merge("early")
    run.steps(2)
    kept = copy.deepcopy(run.optimizer.state[run.model.host.head.weight])
    run.state.restore(snapshot, strategy)
    run.state.verify()
    state = run.optimizer.state
    assert run.model.host.pair[0].weight not in state
    assert kit.same(copy.deepcopy(state.get(run.model.host.head.weight)), kept if strategy == "keep" else None)
    run.steps(2)
    run.state.verify()


@pytest.mark.parametrize("name", ["batch norm", "conv2d", "group norm", "norm without weights", "mlp, function"])
def test_a_merged_checkpoint_goes_on_in_a_fresh_model(kit: Any, tmp_path: Path, name: str) -> None:
    case = case_of(name)
    run = fossil(kit, case)
    older = run.state.capture()
    run.model.merge("early")
    run.steps(1)
    units = 2 * UNITS if "group" in str(case.pair()).lower() else UNITS
    run.sow("early", "widen", Stage.BLENDING, options={"units": units, **case.options})
    run.steps(1)
    run.state.save(tmp_path / "checkpoint")
    topology = run.model.topology()
    assert json.loads(json.dumps(topology, allow_nan=False)) == topology
    fresh = kit.run(case)
    fresh.state.load(tmp_path / "checkpoint")
    fresh.state.verify()
    assert fresh.model.topology() == topology and str(fresh.model.host) == str(run.model.host)
    assert kit.same(run.steps(4), fresh.steps(4))
    before = fresh.contents()
    for each in (run, fresh):
        each.state.restore(older)
        each.state.verify()
    assert str(fresh.model.host) == str(case.build()) and before["clock"] != fresh.model.clock
    assert kit.same(run.steps(2), fresh.steps(2))


def test_merging_again_and_again(kit: Any) -> None:
    run = kit.run(case_of("conv1d"))
    for index in range(1, 4):
        run.sow("early", "widen", Stage.FOSSILIZED, options={"units": index})
        run.steps(2)
        run.model.merge("early")
        run.steps(2)
        run.state.verify()
    first, second = layers(run.model.host.pair)
    assert first.weight.shape[0] == second.weight.shape[1] == 6 + 1 + 2 + 3
    assert run.model.topology()["host"]["pair.0.out_channels"] == {"built": 6, "now": 12}


def test_a_loss_that_is_still_alive_does_not_spoil_the_next_backward(kit: Any) -> None:
    """Autograd keeps the shape of a parameter as long as a graph of it lives, as that of the last loss in any loop."""
    run = fossil(kit, case_of("linear"))
    loss = run.model(run.case.example()).square().mean()
    loss.backward()
    run.model.merge("early")
    weight = run.model.host.pair[0].weight
    assert weight.grad is None
    after = run.model(run.case.example()).square().mean()
    after.backward()
    assert weight.grad.shape == weight.shape and float(loss.detach()) == pytest.approx(float(after.detach()), rel=1e-5)


def test_groups_rates_and_schedules_survive() -> None:
    case = case_of("batch norm")
    model = case.model()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.001, "weight_decay": 0.0}], lr=0.01, fused=True
    )
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.002], total_steps=60)
    state = TrainingState(model, optimizer, schedule)
    model.germinate("early", "widen")
    for index in range(20):
        optimizer.zero_grad()
        model(case.example(index)).square().mean().backward()
        optimizer.step()
        schedule.step()
        if index == 10:
            lead_to(model, "early", Stage.FOSSILIZED, case.example())
        if index == 15:
            model.merge("early")
    state.verify()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in members] for members in (decayed, plain)
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(10 * optimizer.param_groups[1]["lr"], rel=1e-3)


def test_factored_moments_start_anew_and_an_event_says_so() -> None:
    case, events = case_of("linear"), []
    model = case.model()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    state = TrainingState(model, optimizer, emit=events.append)
    model.germinate("early", "widen")
    lead_to(model, "early", Stage.FOSSILIZED, case.example())
    for _ in range(2):
        model(case.example()).square().mean().backward()
        optimizer.step()
    model.merge("early")
    assert [(event.parameter, "factored" in event.reason) for event in events] == [
        ("host.pair.0.weight", True),
        ("host.pair.2.weight", True),
    ]
    state.verify()
    model(case.example()).square().mean().backward()
    optimizer.step()
    state.verify()


def test_pruned_units_leave_nothing_behind(kit: Any) -> None:
    run, bare = sown(kit, case_of("batch norm"), Stage.TRAINING), kit.run(case_of("batch norm"))
    run.model.prune("early")
    bare.steps(5)
    assert kit.same(run.step(), bare.step())
    assert run.members() == run.owned()
