"""Fossils become part of the host's own layers: same function, slot free, and a refusal leaves no trace."""

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

from morphogen.errors import SlotError, StateMismatch
from morphogen.growth import GrowableModel, GrowthConfig, GrowthPoint, Sowing, Stage
from morphogen.growth.merging import plan_merge
from morphogen.state import draw_from
from morphogen.telemetry.events import Emit, discard
from morphogen.testing import LENIENT, HostCase, lead_to

SHAPES = {"NC": (5, 4), "NLC": (5, 6, 4), "NCL": (5, 4, 6), "NCHW": (5, 4, 6, 6)}
WIDTH = 8
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "NC": lambda bias: nn.Linear(4, WIDTH, bias=bias),
    "NLC": lambda bias: nn.Linear(4, WIDTH, bias=bias),
    "NCL": lambda bias: nn.Conv1d(4, WIDTH, 3, padding=1, bias=bias),
    "NCHW": lambda bias: nn.Conv2d(4, WIDTH, 3, stride=2, padding=1, padding_mode="reflect", bias=bias),
}
NORMS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "batch norm 1d": ("NC", lambda: nn.BatchNorm1d(WIDTH)),
    "batch norm over time": ("NCL", lambda: nn.BatchNorm1d(WIDTH)),
    "batch norm 2d": ("NCHW", lambda: nn.BatchNorm2d(WIDTH)),
    "group norm": ("NCHW", lambda: nn.GroupNorm(2, WIDTH)),
    "layer norm": ("NLC", lambda: nn.LayerNorm(WIDTH)),
    "layer norm without bias": ("NC", lambda: nn.LayerNorm(WIDTH, bias=False)),
}


class Host(nn.Module):
    """A stage that ends in what the test asks for, and a head."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stage(x)).flatten(1))


@dataclasses.dataclass(frozen=True)
class Case:
    """What ``kit.run`` grows: a host whose stage is a growth point."""

    layout: Any
    stage: Callable[[], nn.Module]
    host: Callable[[nn.Module], nn.Module] = Host
    points: dict[str, str] = dataclasses.field(default_factory=lambda: {"early": "stage"})

    def example(self, seed: int = 0) -> Tensor:
        return torch.randn(SHAPES[self.layout], generator=torch.Generator().manual_seed(seed))

    def build(self) -> nn.Module:
        with draw_from(torch.Generator().manual_seed(0)):
            host = self.host(self.stage())
            host(self.example())
        return host

    def model(self, *, config: GrowthConfig = LENIENT, seed: int = 0, emit: Emit = discard) -> GrowableModel:
        points = {name: GrowthPoint(path, self.layout) if path == "stage" else path for name, path in self.points.items()}
        return GrowableModel(self.build(), points, self.example(), config=config, seed=seed, emit=emit)


def layer_case(layout: str, bias: bool = True, nested: bool = False) -> Case:
    def stage() -> nn.Module:
        layer = LAYERS[layout](bias)
        return nn.Sequential(nn.Identity(), nn.Sequential(nn.Tanh(), layer)) if nested else layer

    return Case(layout, stage)


def norm_case(name: str) -> Case:
    layout, norm = NORMS[name]
    return Case(layout, lambda: nn.Sequential(LAYERS[layout](True), norm()))


def fossil(kit: Any, case: Case, blueprint: str = "low_rank", optimizer: str = "adam", **sowing: Any) -> Any:
    """A run with a fossil in "early" whose weights are far from zero."""
    run = kit.run(case, optimizer)
    run.steps(2)
    run.sow("early", blueprint, **sowing)
    run.steps(2)
    lead_to(run.model, "early", Stage.FOSSILIZED, case.example())
    run.steps(2)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in run.model.slot("early").seed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return run


def outputs(run: Any, seed: int = 3) -> list[Tensor]:
    """Of copies in train and in eval mode."""
    inputs = run.case.example(seed=seed)
    return [copy.deepcopy(run.model).train(mode)(inputs).detach() for mode in (True, False)]


def ending(run: Any) -> nn.Module:
    return [part for part in run.model.host.stage.modules() if not isinstance(part, nn.Sequential)][-1]


def check_merged(run: Any) -> None:
    """Merge, and look at everything that has to hold afterwards."""
    expected, clock = outputs(run), run.model.clock
    germination = run.model.slot("early").state.germination
    state = run.model.merge("early")
    for ours, theirs in zip(outputs(run), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert state.stage is Stage.DORMANT and state == run.model.slot("early").state
    assert (state.alpha, state.blueprint, state.germination) == (0.0, None, germination)
    assert state.history[-1].reason == "merged" and state.history[-1].tick == clock
    assert run.model.slot("early").seed is None and list(run.model.owners()) == ["host"]
    assert run.members() == run.owned()
    assert {id(parameter) for parameter in run.optimizer.state} <= run.members()
    run.optimizer.state_dict()
    run.state.verify()
    last = run.events[-1]
    assert (last.slot, last.previous, last.stage, last.reason) == ("early", Stage.FOSSILIZED, Stage.DORMANT, "merged")


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("nested", [False, True], ids=["layer", "nested"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYERS)
def test_low_rank_becomes_other_weights(kit: Any, layout: str, bias: bool, nested: bool, alpha: float) -> None:
    run = fossil(kit, layer_case(layout, bias, nested), alpha_target=alpha)
    body, layer = run.model.slot("early").seed.body, ending(run)
    mixing = torch.eye(WIDTH) + alpha * body.up.weight.flatten(1).detach() @ body.down.weight.flatten(1).detach()
    weight = torch.einsum("oc,c...->o...", mixing, layer.weight.detach())
    expected_bias = mixing @ layer.bias.detach() if bias else None
    names = [name for name, _ in run.model.host.named_parameters()]
    check_merged(run)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    if expected_bias is None:
        assert layer.bias is None
    else:
        torch.testing.assert_close(layer.bias.detach(), expected_bias, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in run.model.host.named_parameters()] == names
    assert run.model.topology()["host"] == {}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", LAYERS)
def test_norm_becomes_other_weights_and_a_bias(kit: Any, layout: str, bias: bool) -> None:
    run = fossil(kit, layer_case(layout, bias), "norm", alpha_target=0.6)
    body, layer = run.model.slot("early").seed.body, ending(run)
    factor = (0.6 * body.weight / torch.sqrt(body.norm.var + body.norm.eps)).flatten().detach()
    shift = (0.6 * body.bias).flatten().detach() - factor * body.norm.mean.flatten()
    weight = torch.einsum("c,c...->c...", 1 + factor, layer.weight.detach())
    old_bias = layer.bias.detach().clone() if bias else torch.zeros(WIDTH)
    check_merged(run)
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), (1 + factor) * old_bias + shift)
    assert run.model.topology()["host"] == ({} if bias else {"stage.bias": {"built": None, "now": [WIDTH]}})


@pytest.mark.parametrize("name", NORMS)
def test_norm_becomes_part_of_the_hosts_own_normalisation(kit: Any, name: str) -> None:
    run = fossil(kit, norm_case(name), "norm")
    before = {key: value.clone() for key, value in run.model.host.stage[0].state_dict().items()}
    check_merged(run)
    assert kit.same(before, dict(run.model.host.stage[0].state_dict()))
    run.steps(2)
    run.state.verify()


@pytest.mark.parametrize("blueprint", ["low_rank", "low_rank_large", "norm"])
def test_a_merged_run_goes_on_and_grows_again(kit: Any, blueprint: str) -> None:
    run = fossil(kit, layer_case("NCHW", bias=False), blueprint)
    check_merged(run)
    run.steps(2)
    run.sow("early", blueprint, Stage.FOSSILIZED)
    check_merged(run)
    assert run.model.slot("early").state.germination == 2
    assert all(bool(parameter.isfinite().all()) for parameter in run.model.parameters())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("blueprint", ["low_rank", "norm"])
def test_parameters_of_the_same_shape_keep_identity_group_and_moments(kit: Any, blueprint: str, optimizer: str) -> None:
    run = fossil(kit, layer_case("NC"), blueprint, optimizer)
    before, names = run.contents(), {id(p): name for name, p in run.model.host.named_parameters()}
    run.model.merge("early")
    after = run.contents()
    host = {name: value for name, value in before["identity"].items() if name.startswith("host.")}
    assert after["identity"] == host
    assert kit.same(after["moments"], {name: value for name, value in before["moments"].items() if name in host})
    assert [group["params"] for group in after["groups"]] == [list(host)]
    assert after["groups"][0] == before["groups"][0]
    assert {id(p) for p in run.model.host.parameters()} == set(names)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_rewind_undoes_a_merge_and_an_added_bias(kit: Any, optimizer: str) -> None:
    run, twin = (fossil(kit, layer_case("NCHW", bias=False), "norm", optimizer) for _ in range(2))
    snapshot, before = run.state.capture(), run.contents()
    run.model.merge("early")
    run.steps(3)
    run.state.restore(snapshot)
    run.state.verify()
    assert run.model.host.stage.bias is None
    assert set(kit.differences(before, run.contents())) <= {"identity", "gradients"}
    for each in (run, twin):
        each.model.zero_grad()
    assert kit.same(run.steps(3), twin.steps(3))


def test_a_merged_checkpoint_goes_on_in_a_fresh_model(kit: Any, tmp_path: Path) -> None:
    case = layer_case("NC", bias=False)
    run = fossil(kit, case, "norm")
    older = run.state.capture()
    run.model.merge("early")
    run.steps(2)
    run.sow("early", "low_rank", Stage.BLENDING)
    run.state.save(tmp_path / "checkpoint")
    topology = run.model.topology()
    assert json.loads(json.dumps(topology, allow_nan=False)) == topology
    fresh = kit.run(case)
    fresh.state.load(tmp_path / "checkpoint")
    fresh.state.verify()
    assert fresh.model.topology() == topology
    assert kit.same(run.steps(4), fresh.steps(4))
    fresh.state.restore(older)
    assert fresh.model.host.stage.bias is None and fresh.model.stages()["early"] is Stage.FOSSILIZED
    fresh.state.verify()


def test_export_after_a_merge_is_the_plain_host(kit: Any) -> None:
    run = fossil(kit, layer_case("NCHW", bias=False), "norm")
    run.model.merge("early")
    plain = run.model.export()
    assert type(plain) is Host and type(plain.stage) is nn.Conv2d and plain.stage.bias is not None
    with torch.no_grad():
        assert torch.equal(plain(run.case.example()), run.model.eval()(run.case.example()))


def test_a_new_bias_is_frozen_where_its_layer_is(kit: Any) -> None:
    run = fossil(kit, layer_case("NC", bias=False), "norm")
    run.model.host.stage.requires_grad_(False)
    run.state.reshape()
    run.model.merge("early")
    assert not run.model.host.stage.bias.requires_grad
    run.state.verify()


def test_gradients_of_changed_parameters_are_dropped(kit: Any) -> None:
    run = fossil(kit, layer_case("NC"))
    run.step()
    run.model.merge("early")
    assert run.model.host.stage.weight.grad is None and run.model.host.head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    case = layer_case("NC")
    model = GrowableModel(case.build().to(dtype), {"early": "stage"}, case.example().to(dtype), config=LENIENT)
    model.germinate("early", "low_rank")
    lead_to(model, "early", Stage.FOSSILIZED, case.example().to(dtype))
    with torch.no_grad():
        for parameter in model.get_submodule("slots.early.seed").parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        expected = model(case.example().to(dtype))
        model.merge("early")
        rtol = 1e-12 if dtype is torch.float64 else 0.1
        torch.testing.assert_close(model(case.example().to(dtype)), expected, rtol=rtol, atol=rtol)
    assert model.host.get_parameter("stage.weight").dtype is dtype


# -- refusals ------------------------------------------------------------------------------------------------------------


class Tied(Host):
    """The head reads with the stage's own weight."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__(stage)
        self.back = nn.Linear(WIDTH, 4, bias=False)
        self.back.weight = nn.Parameter(torch.zeros(4, WIDTH))
        self.tied = nn.Linear(4, WIDTH, bias=False)
        self.tied.weight = dict(stage.named_parameters())["weight"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * self.tied(x).sum(1, keepdim=True)


class SameMemory(Tied):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__(stage)
        self.tied.weight = nn.Parameter(stage.get_parameter("weight").detach())


class TwoNames(Host):
    def __init__(self, stage: nn.Module) -> None:
        super().__init__(stage)
        self.again = stage


class ReadsWeight(Host):
    """Uses the layer inside the stage in another way than by calling the stage."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.stage.get_parameter("1.weight").sum()


def hooked(stage: nn.Module, place: int) -> nn.Module:
    stage.get_submodule(str(place)).register_forward_hook(lambda module, args, output: output * 1.0)
    return stage


REFUSED: dict[str, tuple[Case, str, dict[str, Any], str]] = {
    "blueprint": (layer_case("NC"), "mlp", {}, r"must hold a seed that can be folded into linear layers \(.*\), holds 'mlp'"),
    "gate": (layer_case("NC"), "low_rank", {"operator": "gate"}, "must have operator \"add\" to be merged, has 'gate'"),
    "scale": (layer_case("NC"), "low_rank", {"operator": "scale"}, "must have operator \"add\" to be merged, has 'scale'"),
    "statistics": (layer_case("NC"), "norm", {"options": {"statistics": "sample"}}, 'must have statistics "running"'),
    "ends in ReLU": (
        Case("NC", lambda: nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU())),
        "low_rank",
        {},
        "ends in Linear, Conv1d or Conv2d to be merged, this one ends in ReLU",
    ),
    "low rank on a norm": (norm_case("batch norm 1d"), "low_rank", {}, "this one ends in BatchNorm1d"),
    "norm without weights": (
        Case("NC", lambda: nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH, affine=False))),
        "norm",
        {},
        "an affine BatchNorm, LayerNorm or GroupNorm to be merged, this one ends in BatchNorm1d",
    ),
    "norm over more axes": (
        Case("NLC", lambda: nn.Sequential(nn.Linear(4, WIDTH), nn.LayerNorm([6, WIDTH]))),
        "norm",
        {},
        "must sit at a LayerNorm over channels alone",
    ),
    "grouped": (Case("NCHW", lambda: nn.Conv2d(4, WIDTH, 3, groups=2)), "low_rank", {}, "must sit at a layer with groups=1"),
    "transposed": (Case("NCHW", lambda: nn.ConvTranspose2d(4, WIDTH, 3)), "low_rank", {}, "ends in ConvTranspose2d"),
    "weight norm": (
        Case("NC", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, WIDTH))),
        "low_rank",
        {},
        "this one ends in ParametrizedLinear",
    ),
    "tied": (Case("NC", lambda: nn.Linear(4, WIDTH, bias=False), Tied), "low_rank", {}, "share their memory"),
    "same memory": (Case("NC", lambda: nn.Linear(4, WIDTH, bias=False), SameMemory), "low_rank", {}, "share their memory"),
    "two names": (
        Case("NC", lambda: nn.Linear(4, WIDTH), TwoNames),
        "low_rank",
        {},
        "its layer is shared, as `stage` and `again`",
    ),
    "hook": (
        Case("NC", lambda: hooked(nn.Sequential(nn.Tanh(), nn.Linear(4, WIDTH)), 1)),
        "low_rank",
        {},
        "there is a hook or a seed at `stage.1`",
    ),
    "another use": (
        Case("NC", lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, WIDTH)), ReadsWeight),
        "low_rank",
        {},
        "must be mergeable without a change of the model's outputs",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_folded_is_refused_without_a_trace(kit: Any, reason: str) -> None:
    case, blueprint, sowing, match = REFUSED[reason]
    run = fossil(kit, case, blueprint, **sowing)
    run.step()
    before, events, topology = run.contents(), list(run.events), run.model.topology()
    with pytest.raises(SlotError, match=f"^slot 'early'.*{match}"):
        run.model.merge("early")
    assert kit.differences(before, run.contents()) == []
    assert run.events == events and run.model.topology() == topology
    run.steps(1)
    run.state.verify()


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage is not Stage.FOSSILIZED], ids=lambda stage: stage.name)
def test_only_a_fossil_is_merged(kit: Any, stage: Stage) -> None:
    run = kit.run(HostCase("NC"))
    if stage is not Stage.DORMANT:
        run.sow("late", "low_rank", stage)
    before = run.contents()
    with pytest.raises(SlotError, match=f"slot 'late' must hold a fossil to be merged, is {stage.name.lower()}"):
        run.model.merge("late")
    assert kit.differences(before, run.contents()) == []


def test_a_norm_that_has_seen_no_batch_is_refused() -> None:
    model = layer_case("NC").model()
    model.eval().germinate("early", "norm")
    model.advance("early")
    model.train()
    lead_to(model, "early", Stage.FOSSILIZED, layer_case("NC").example())
    model.get_buffer("slots.early.seed.body.norm.num_batches").zero_()
    with pytest.raises(SlotError, match="must have seen a batch in training mode"):
        model.merge("early")


def test_a_seed_before_it_at_the_same_point_is_in_the_way(kit: Any) -> None:
    case = dataclasses.replace(layer_case("NC"), points={"first": "stage", "early": "stage"})
    run = fossil(kit, case)
    run.sow("first", "low_rank", Stage.TRAINING)
    before = run.contents()
    with pytest.raises(SlotError, match="slot 'early' must be alone at `stage` to be merged"):
        run.model.merge("early")
    assert kit.differences(before, run.contents()) == []
    run.model.prune("first")
    run.model.merge("early")


def test_a_seed_inside_the_point_is_in_the_way_and_an_empty_slot_is_not(kit: Any) -> None:
    stage = lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, WIDTH))  # noqa: E731
    run = fossil(kit, Case("NC", stage, points={"early": "stage", "inner": "stage.1"}))
    run.sow("inner", "low_rank")
    with pytest.raises(SlotError, match="there is a hook or a seed at `stage.1`"):
        run.model.merge("early")
    run.model.prune("inner")
    run.model.merge("early")


@pytest.mark.parametrize("blueprint", ["low_rank", "norm"])
def test_a_follower_that_refuses_undoes_the_merge(kit: Any, blueprint: str) -> None:
    run = fossil(kit, layer_case("NC", bias=False), blueprint)
    run.step()

    def refuse() -> None:
        raise StateMismatch("no")

    run.model.on_topology_change(refuse)
    before, events, topology = run.contents(), list(run.events), run.model.topology()
    with pytest.raises(StateMismatch, match="no"):
        run.model.merge("early")
    assert kit.differences(before, run.contents()) == []
    assert run.events == events and run.model.topology() == topology and run.model.grafts() == ()


def test_a_topology_of_another_host_is_refused(kit: Any, tmp_path: Path) -> None:
    run = fossil(kit, layer_case("NC", bias=False), "norm")
    run.model.merge("early")
    topology = run.model.topology()
    with_bias = layer_case("NC").model()
    with pytest.raises(StateMismatch, match=r"(?s)grew from another host.*`stage.bias` is built as \(8,\) here, and as None"):
        with_bias.plan_topology(topology)
    elsewhere = {**topology, "host": {"stage.training": {"built": 1, "now": 2}, "x.y": {"built": None, "now": [2]}}}
    with pytest.raises(StateMismatch, match=r"(?s)`stage.training`, which the host lacks.*`x.y`, which the host lacks"):
        with_bias.plan_topology(elsewhere)
    with pytest.raises(StateMismatch, match="entry of the host was not written by this release"):
        with_bias.plan_topology({**topology, "host": {"stage.bias": 3}})


def test_a_copy_goes_on_by_itself(kit: Any) -> None:
    run = fossil(kit, layer_case("NC", bias=False), "norm")
    run.model.merge("early")
    twin = copy.deepcopy(run.model)
    assert twin.topology() == run.model.topology()
    before = run.contents()
    twin.germinate("early", Sowing(blueprint="norm"))
    lead_to(twin, "early", Stage.FOSSILIZED, run.case.example())
    twin.merge("early")
    assert kit.differences(before, run.contents()) == []


@pytest.mark.parametrize(
    ("blueprint", "match"),
    [
        ("norm", "each has running statistics of its own data"),
        ("widen", "which DistributedDataParallel has fixed"),
        ("low_rank", ""),
    ],
)
def test_several_processes_keep_the_hosts_shapes(kit: Any, blueprint: str, match: str) -> None:
    run = fossil(kit, Case("NC", lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, WIDTH))), blueprint)
    slot = run.model.slot("early")
    if not match:
        assert plan_merge(run.model.host, slot, {"early": slot}, shared=True).values.keys() == {
            "stage.1.weight",
            "stage.1.bias",
        }
        return
    with pytest.raises(SlotError, match=f"slot 'early' must not be merged where several processes train.*{match}"):
        plan_merge(run.model.host, slot, {"early": slot}, shared=True)
