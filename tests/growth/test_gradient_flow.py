"""From blending on gradient reaches everything upstream; fossils stay trainable unless frozen, and then wholly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphogen.growth import Stage
from morphogen.growth.lifecycle import OPERATORS, Operator, Sowing
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

LATER = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("stage", LATER, ids=lambda stage: stage.name)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_every_upstream_layer_and_seed_receives_gradient(
    case: HostCase, operator: Operator, stage: Stage, alpha: float
) -> None:
    model = case.model()
    model.germinate("early", "mlp")
    model.advance("early")
    model.germinate("late", Sowing(blueprint="mlp", operator=operator, alpha_target=alpha, blend_ticks=1))
    lead_to(model, "late", stage, case.example())
    assert model.alphas()["late"] == alpha
    awaken(model, "late")
    model.train()
    model(case.example()).square().mean().backward()
    for owner, pairs in model.owners().items():
        if owner == "early":  # at birth only the zero layer has a gradient
            assert any(p.grad is not None and bool(p.grad.any()) for _, p in pairs)
            continue
        for name, parameter in pairs:
            assert parameter.grad is not None and bool(parameter.grad.any()), f"{name} has no gradient"


def awaken(model: Any, slot: str) -> None:
    """Give the seed random weights, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.slot(slot).seed.parameters():
            parameter.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradient_of_a_blended_seed_is_that_of_plain_autograd(operator: Operator, alpha: float) -> None:
    """Against the same computation written out by hand."""
    case = HostCase("NC")
    model = case.model()
    model.germinate("late", Sowing(blueprint="low_rank", operator=operator, alpha_target=alpha, blend_ticks=1))
    lead_to(model, "late", Stage.HOLDING, case.example())
    awaken(model, "late")
    model.eval()
    model(case.example()).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    host, seed = model.host, model.slot("late").seed
    assert seed is not None
    act, body = torch.relu, host.get_submodule("body")
    inner = act(host.get_submodule("norm")(host.get_submodule("stem")(case.example())))
    h = inner @ body.weight.T + body.bias
    s = h @ seed.body.down.weight.T @ seed.body.up.weight.T
    gate = seed.gate(h) if seed.gate is not None else 1.0
    mixed = h * (1 + alpha * torch.tanh(s)) if operator == "scale" else h + alpha * gate * s
    host.get_submodule("head")(act(mixed)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_gate_parameters_are_in_the_optimizer_and_move(kit: Any, case: HostCase) -> None:
    run = kit.run(case)
    run.sow("early", "mlp", Stage.TRAINING, operator="gate")
    gate = {n: p for n, p in run.model.named_parameters() if ".gate." in n}
    assert len(gate) == 4
    assert {id(p) for p in gate.values()} <= run.members()
    before = {name: parameter.detach().clone() for name, parameter in gate.items()}
    run.steps(5)
    assert all(not torch.equal(before[name], parameter) for name, parameter in gate.items())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_fossil_keeps_training_and_keeps_its_moments(kit: Any, optimizer: str) -> None:
    run = kit.run(HostCase("NCHW"), optimizer)
    run.sow("early", "mlp", Stage.HOLDING)
    run.steps(3)
    run.model.record_contribution("early", 1.0, 0.0)
    before = run.contents()
    assert run.model.fossilize("early")
    after = run.contents()
    assert set(kit.differences(before, after)) == {"slots"}
    run.step()
    for name, parameter in run.model.owners()["early"]:
        assert not torch.equal(before["tensors"][name], parameter)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_frozen_fossil_is_wholly_frozen_and_lets_gradient_pass(kit: Any, optimizer: str) -> None:
    """Not even weight decay or momentum may move it, and it still carries gradient to what is upstream."""
    run = kit.run(HostCase("NCHW"), optimizer, LENIENT.replace(freeze_fossils=True))
    run.sow("late", "mlp", Stage.HOLDING)
    run.steps(3)
    run.model.record_contribution("late", 1.0, 0.0)
    assert run.model.fossilize("late")
    owned = run.model.owners()["late"]
    frozen = {name: parameter.detach().clone() for name, parameter in owned}
    assert not {id(parameter) for _, parameter in owned} & run.members()
    assert not {parameter for _, parameter in owned} & set(run.optimizer.state)
    run.steps(3)
    assert all(torch.equal(frozen[name], parameter) for name, parameter in owned)
    assert all(p.grad is not None and bool(p.grad.any()) for p in run.model.host.parameters())
    run.state.verify()
    run.model.excise("late")
    run.steps(1)
    run.state.verify()


@pytest.mark.parametrize("live", [True, False])
def test_pruning_and_excising_leave_no_moments_behind(kit: Any, live: bool) -> None:
    run = kit.run(HostCase("NCL"))
    run.sow("early", "conv1d", Stage.HOLDING if live else Stage.FOSSILIZED)
    run.steps(3)
    before = run.contents()["moments"]
    gone = [parameter for _, parameter in run.model.owners()["early"]]
    assert all(parameter in run.optimizer.state for parameter in gone)
    (run.model.prune if live else run.model.excise)("early")
    assert not any(parameter in run.optimizer.state for parameter in gone)
    assert not {id(parameter) for parameter in gone} & run.members()
    after = run.contents()["moments"]
    assert all(name.startswith("host.") for name in after)
    assert kit.same(after, {name: before[name] for name in after})
    assert len(run.optimizer.param_groups) == 1
