"""torch.compile: the same numbers in one graph, no graph for each step of a ramp, and overrides that are not lost."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from morphogen.growth import GrowableModel, Sowing, Stage
from morphogen.state import TrainingState
from morphogen.testing import HostCase, host_cases, lead_to

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CASE, TOKENS = HostCase("NCHW"), HostCase("NLC")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that counts its graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def outside(model: GrowableModel, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, **options)


def in_place(model: GrowableModel, **options: Any) -> Callable[[Tensor], Tensor]:
    model.compile(**options)
    return model


def host_in_place(model: GrowableModel, **options: Any) -> Callable[[Tensor], Tensor]:
    model.host.compile(**options)
    return model


def host_before(model: GrowableModel, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model.host, **options)


WAYS = (outside, in_place, host_in_place, host_before)


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def check_equal(run: Callable[[Tensor], Tensor], compiled: nn.Module, eager: nn.Module, inputs: Tensor) -> None:
    """Outputs and gradients of one training pass; ``run`` runs ``compiled``."""
    for module in (compiled, eager):
        module.zero_grad()
    outputs = [run(inputs), eager(inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().mean().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("stage", "way"),
    [*((stage, outside) for stage in Stage), *((stage, way) for way in WAYS[1:] for stage in (Stage.TRAINING, Stage.BLENDING))],
)
def test_a_compiled_step_is_the_eager_one_in_one_graph(stage: Stage, way: Callable[..., Any]) -> None:
    model = CASE.model()
    if stage is not Stage.DORMANT:
        model.germinate("early", "conv3x3", operator="gate")
        lead_to(model, "early", stage, CASE.example())
        model.germinate("late", "mlp", operator="scale")
        lead_to(model, "late", Stage.HOLDING, CASE.example())
    stir(model.slots)
    twin = copy.deepcopy(model)
    check_equal(way(twin, backend="aot_eager", fullgraph=True), twin, model, CASE.example(seed=1))


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_incubation_leaves_the_compiled_host_as_it_is(kit: Any, case: HostCase) -> None:
    model, bare = case.model(), case.build()
    model.germinate("early", "mlp")
    model.advance("early")
    stir(model.slots)
    results: list[list[Tensor | None]] = []
    for module, host in ((model, model.host), (bare, bare)):
        output = torch.compile(module, backend="eager", fullgraph=True)(case.example())
        output.square().mean().backward()
        results.append([output.detach(), *(parameter.grad for parameter in host.parameters())])
    assert kit.same(*results)
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in model.owners()["early"])


@pytest.mark.parametrize(
    ("way", "target", "training"),
    [(outside, 1.0, True), (outside, 0.6, False), (in_place, 0.6, True), (host_in_place, 1.0, True)],
)
def test_a_ramp_makes_no_graph_and_a_stage_at_most_one(way: Callable[..., Any], target: float, training: bool) -> None:
    model, graphs = CASE.model(), Graphs()
    compiled = way(model, backend=graphs, fullgraph=True)
    new: dict[str, list[int]] = {}

    def run(what: str) -> None:
        before = graphs.count
        model.train(training)
        compiled(CASE.example())
        new.setdefault(what, []).append(graphs.count - before)

    model.train(training)
    run("dormant")
    model.germinate("early", Sowing(blueprint="conv3x3", alpha_target=target, blend_ticks=12))
    stir(model.slots)
    run("germinated")
    for stage in (Stage.TRAINING, Stage.BLENDING):
        lead_to(model, "early", stage, CASE.example())
        run(stage.name)
    while model.slot("early").state.ramp is not None:
        model.tick()
        run("up")
    assert model.alphas()["early"] == target
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    run("HOLDING")
    model.set_alpha_target("early", 0.5, over=5)
    while model.slot("early").state.ramp is not None:
        model.tick()
        run("down")
    lead_to(model, "early", Stage.FOSSILIZED, CASE.example())
    run("FOSSILIZED")
    assert new.pop("dormant") == [1] and len(new["up"]) == 11 and len(new["down"]) == 5
    assert set(new.pop("up") + new.pop("down")) == {0}
    assert all(made[0] <= 1 for made in new.values()), new
    assert counters["stats"]["unique_graphs"] == graphs.count <= 4 and not counters["graph_break"]


@pytest.mark.parametrize("way", WAYS)
def test_growing_after_compiling(way: Callable[..., Any]) -> None:
    """A second seed of the same kind runs in the graph of the first, with weights of its own."""
    model, twin, graphs = TOKENS.model(), TOKENS.model(), Graphs()
    compiled = way(model, backend=graphs, fullgraph=True)
    counts: list[int] = []
    for life in range(2):
        check_equal(compiled, model, twin, TOKENS.example(seed=life))
        for each in (model, twin):
            each.germinate("early", "low_rank", operator="gate", seed=life)
            stir(each.slots)
        for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING):
            for each in (model, twin):
                lead_to(each, "early", stage, TOKENS.example())
            check_equal(compiled, model, twin, TOKENS.example(seed=life))
        for each in (model, twin):
            lead_to(each, "early", Stage.DORMANT, TOKENS.example())
        counts.append(graphs.count)
    assert counts[0] == counts[1]


def test_more_kinds_of_graphs_than_torch_keeps_still_compute_the_same() -> None:
    model, twin, graphs = TOKENS.model(), TOKENS.model(), Graphs()
    compiled = torch.compile(model, backend=graphs)
    for name in ("low_rank", "mlp", "norm"):
        for each in (model, twin):
            each.germinate("early", name)
            stir(each.slots)
        for stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.DORMANT):
            for each in (model, twin):
                lead_to(each, "early", stage, TOKENS.example())
            check_equal(compiled, model, twin, TOKENS.example())
    assert 0 < graphs.count <= torch._dynamo.config.recompile_limit


@pytest.mark.parametrize("way", [outside, in_place, host_in_place])
def test_overrides_reach_a_compiled_model(way: Callable[..., Any]) -> None:
    model, graphs = CASE.model(), Graphs()
    model.germinate("early", "conv3x3")
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    stir(model.slots)
    model.eval()
    alphas = {"early": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    expected, plain = model(CASE.example(), alphas=alphas), model(CASE.example())
    assert not torch.equal(expected, plain)
    compiled = way(model, backend=graphs)
    for _ in range(2):
        torch.testing.assert_close(compiled(CASE.example()), plain)
        torch.testing.assert_close(compiled(CASE.example(), alphas=alphas), expected)
    assert graphs.count == 1, "calls with overrides run uncompiled and disturb no graph"


def test_the_run_of_a_compiled_model_follows_its_growth() -> None:
    model = TOKENS.model()
    state = TrainingState(torch.compile(model, backend="eager"), torch.optim.Adam(model.parameters()))
    model.germinate("early", "low_rank")
    snapshot = state.capture()
    weights = [parameter.detach().clone() for parameter in model.slots.parameters()]
    model.prune("early")
    assert list(state.learning_rates()) == ["host"]
    state.restore(snapshot)
    assert list(state.learning_rates()) == ["host", "early"] and model.stages()["early"] is Stage.GERMINATED
    assert all(map(torch.equal, weights, model.slots.parameters()))
    state.verify()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_code_that_inductor_writes() -> None:
    model = TOKENS.model()
    for slot, stage in (("early", Stage.BLENDING), ("late", Stage.TRAINING)):
        model.germinate(slot, "low_rank", operator="gate")
        lead_to(model, slot, stage, TOKENS.example())
    stir(model.slots)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(2):
        check_equal(compiled, twin, model, TOKENS.example())
        for each in (model, twin):
            each.tick()
    assert counters["stats"]["unique_graphs"] == 1
