"""torch.compile: the same numbers, no graph for each step of a ramp, and overrides that are not lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from morphogen.growth import Stage
from morphogen.testing import HostCase, lead_to

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CASE = HostCase("NCHW")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
def test_a_compiled_step_is_the_eager_one(stage: Stage) -> None:
    model = CASE.model()
    model.germinate("early", "conv3x3", operator="gate")
    lead_to(model, "early", stage, CASE.example())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    for module in (model, compiled):
        module(CASE.example()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_a_ramp_compiles_once_and_a_stage_once_more() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    model = CASE.model()
    model.germinate("early", "conv3x3")
    lead_to(model, "early", Stage.BLENDING, CASE.example())
    compiled = torch.compile(model, backend=backend)
    compiled(CASE.example())
    first = len(graphs)
    while model.slot("early").state.ramp is not None and model.slot("early").state.ramp.tick < 4:
        model.tick()
        compiled(CASE.example())
    assert len(graphs) == first
    lead_to(model, "early", Stage.FOSSILIZED, CASE.example())
    compiled(CASE.example())
    assert first < len(graphs) <= 2 * first


@pytest.mark.parametrize("part", ["model", "host"])
def test_overrides_reach_a_compiled_model(part: str) -> None:
    model = CASE.model()
    model.germinate("early", "conv3x3")
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.eval()
    alphas = {"early": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    expected = model(CASE.example(), alphas=alphas)
    assert not torch.equal(expected, model(CASE.example()))
    (model if part == "model" else model.host).compile(backend="eager")
    model(CASE.example())
    torch.testing.assert_close(model(CASE.example(), alphas=alphas), expected)
