"""GrowableModel: copies, conversions, quarantine, sensors, several slots at once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from morphogen.growth import GateConfig, GrowableModel, GrowthConfig, Sowing, Stage
from morphogen.testing import HostCase, host_cases, lead_to

CASE = HostCase("NCHW")


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_a_deep_copy_is_the_same_and_apart_in_every_stage(kit: Any, case: HostCase, live_stage: Stage) -> None:
    run = kit.run(case)
    run.sow("early", "mlp", live_stage, operator="gate", alpha_target=0.6)
    run.step()
    before = run.contents()
    twin = copy.deepcopy(run.model)
    assert twin.topology() == run.model.topology()
    with torch.no_grad():
        assert kit.same(*(model.eval()(case.example()) for model in (run.model, twin)))
    run.model.train()
    twin.train()
    inputs = case.example(seed=9)
    for model in (run.model, twin):
        model.zero_grad()
        model(inputs).square().mean().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters()} for m in (run.model, twin)]
    assert kit.same(*gradients)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.fill_(7)
    twin.prune("early") if live_stage is not Stage.FOSSILIZED else twin.excise("early")
    twin.tick()
    changed = set(kit.differences(before, run.contents()))
    assert changed <= {"gradients", "tensors"}  # the second training pass above moved BatchNorm's statistics
    assert not any(bool((parameter == 7).all()) for parameter in run.model.parameters())
    assert run.model.stages()["early"] is live_stage


def test_a_copy_does_not_copy_who_listens() -> None:
    """An event bus holds files and threads, and belongs to the run, not to the model."""

    class Bus:
        def __init__(self) -> None:
            self.events: list[Any] = []

        def emit(self, event: Any) -> None:
            self.events.append(event)

        def __deepcopy__(self, memo: Any) -> Bus:
            raise TypeError("a bus cannot be copied")

    bus = Bus()
    model = GrowableModel(CASE.build(), CASE.points, CASE.example(), emit=bus.emit)
    copy.deepcopy(model).germinate("early", "norm")
    assert bus.events == []
    model.germinate("early", "norm")
    assert len(bus.events) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_germination_after_a_conversion(case: HostCase, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    model.germinate("early", "mlp")
    example = case.example().to(dtype)
    lead_to(model, "early", Stage.HOLDING, example)
    model(example).sum().backward()
    assert {p.grad.dtype for _, p in model.owners()["early"] if p.grad is not None} == {dtype}
    assert model(example).dtype == dtype


def test_the_host_keeps_its_keys_and_loads_its_checkpoints(kit: Any, live_stage: Stage) -> None:
    host = CASE.build(3)
    saved = copy.deepcopy(host.state_dict())
    model = CASE.model()
    model.germinate("early", "mlp")
    lead_to(model, "early", live_stage, CASE.example())
    assert list(model.host.state_dict()) == list(saved)
    model.host.load_state_dict(saved)
    assert kit.same(model.host.state_dict(), host.state_dict())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_seed_that_is_not_finite_is_pruned_and_nothing_else_notices(kit: Any, value: float) -> None:
    run, twin = kit.run(CASE), kit.run(CASE)
    for each in (run, twin):
        each.sow("early", "mlp", Stage.TRAINING)
        each.sow("late", "mlp", Stage.TRAINING)
    with torch.no_grad():
        next(iter(run.model.slot("early").seed.parameters())).fill_(value)
    for _ in range(3):
        assert kit.same(run.step(), twin.step())
        run.model.tick()
        twin.model.tick()
    assert run.model.stages() == {"early": Stage.EMBARGOED, "late": Stage.TRAINING}
    assert run.model.slot("early").state.prune_reason == "quarantined: not finite"
    assert kit.same(run.model.host.state_dict(), twin.model.host.state_dict())
    assert kit.same(run.model.slot("late").state_dict(), twin.model.slot("late").state_dict())
    assert run.members() == run.owned()
    run.state.verify()


def test_a_bad_batch_of_the_hosts_does_not_cost_a_healthy_seed(kit: Any) -> None:
    """A NaN loss makes every gradient NaN: the host's fault, for the governor to mend, and no reason to quarantine."""
    run = kit.run(CASE)
    run.sow("early", "mlp", Stage.TRAINING)
    run.model.zero_grad()
    (run.model(CASE.example()).sum() * torch.nan).backward()
    run.model.sense()
    run.model.zero_grad()
    run.model.tick()
    assert run.model.stages()["early"] is Stage.TRAINING


def test_sensors_against_a_naive_reading(kit: Any) -> None:
    run = kit.run(CASE)
    run.sow("early", "mlp", Stage.TRAINING, operator="gate")
    run.step()
    sensors = run.model.slot("early").sensors

    def rms(owner: str) -> float:
        values = [v for _, p in run.model.owners()[owner] if p.grad is not None for v in p.grad.flatten().tolist()]
        return math.sqrt(sum(v * v for v in values) / len(values))

    assert sensors.gradient_norm.value == pytest.approx(rms("early"), rel=1e-5)
    assert sensors.gradient_ratio.value == pytest.approx(rms("early") / rms("host"), rel=1e-5)
    assert sensors.finite.value == 1.0
    assert {r.tick for r in (sensors.gradient_norm, sensors.gradient_ratio, sensors.finite)} == {run.model.clock}
    assert run.model.slot("late").sensors.finite is None


def test_a_large_gradient_in_half_precision_is_finite_all_the_same() -> None:
    """The norm of a float16 gradient overflows float16 long before the gradient does."""
    model = HostCase("NC").model().half()
    model.germinate("early", "mlp")
    model.advance("early")
    model(HostCase("NC").example().half()).sum().backward()
    for _, parameter in model.owners()["early"]:
        parameter.grad = torch.full_like(parameter, 3e4)
    model.sense()
    sensors = model.slot("early").sensors
    assert sensors.finite is not None and sensors.finite.value == 1.0
    assert sensors.gradient_norm is not None and sensors.gradient_norm.value == pytest.approx(3e4, rel=1e-2)


def test_nothing_is_measured_before_the_first_gradient(kit: Any) -> None:
    run = kit.run(CASE)
    run.sow("early", "mlp")
    run.model.sense()
    sensors = run.model.slot("early").sensors
    assert sensors.gradient_norm is None and sensors.gradient_ratio is None
    run.model.advance("early")
    run.step()
    run.model.sense()
    assert run.model.slot("early").sensors.gradient_norm is not None
    run.model.prune("early")
    assert run.model.slot("early").sensors.gradient_norm is None


def test_parameters_are_counted_by_ownership(kit: Any) -> None:
    run = kit.run(CASE)
    host = sum(p.numel() for p in CASE.build().parameters())
    assert run.model.num_parameters() == host
    run.sow("early", "mlp", Stage.FOSSILIZED)
    seed = sum(p.numel() for _, p in run.model.owners()["early"])
    for _, parameter in run.model.owners()["early"]:
        parameter.requires_grad_(False)
    assert run.model.num_parameters() == host + seed
    assert list(run.model.owners()) == ["host", "early"]


def test_a_gate_refused_changes_nothing_and_says_why(kit: Any) -> None:
    run = kit.run(CASE, config=GrowthConfig(gates=GateConfig(min_training_ticks=5)))
    run.model.germinate("early", "mlp")
    assert run.model.advance("early")
    before = run.contents()
    gate = run.model.advance("early")
    assert not gate and len(gate.refusals) == 3
    assert kit.differences(before, run.contents()) == []
    event = run.events[-1]
    assert type(event).__name__ == "GateRefused" and event.gate is Stage.BLENDING and len(event.reasons) == 3


def test_alpha_of_the_slot_is_that_of_its_state_at_every_tick(kit: Any) -> None:
    run = kit.run(CASE)
    run.sow("early", "mlp", Stage.BLENDING, blend_ticks=7, curve="cosine")
    for _ in range(8):
        assert float(run.model.slot("early").alpha) == pytest.approx(run.model.alphas()["early"], abs=1e-7)
        run.steps(1)
    assert run.model.alphas() == {"early": 1.0, "late": 0.0}


@pytest.mark.parametrize("curve", ["linear", "cosine", "sigmoid"])
def test_the_output_is_continuous_across_ticks_and_stages(kit: Any, curve: Any) -> None:
    """No tick moves the output further than its step of alpha allows, and no change of stage moves it at all."""
    run = kit.run(HostCase("NC"))
    case = run.case
    run.sow("early", "mlp", Stage.TRAINING, blend_ticks=40, curve=curve, steepness=6.0)
    run.steps(20)
    run.step()
    run.model.eval()

    def output() -> torch.Tensor:
        with torch.no_grad():
            return run.model(case.example())

    outputs, alphas = [output()], [0.0]
    run.model.advance("early")
    for _ in range(50):
        outputs.append(output())
        alphas.append(run.model.alphas()["early"])
        run.model.tick()
    moves = [float((b - a).norm()) for a, b in zip(outputs, outputs[1:], strict=False)]
    steps = [b - a for a, b in zip(alphas, alphas[1:], strict=False)]
    whole = float((outputs[-1] - outputs[0]).norm())
    assert whole > 0
    assert all(move <= 5 * step * whole + 1e-6 for move, step in zip(moves, steps, strict=True))
    run.model.advance("early")
    assert kit.same(output(), outputs[-1])
    run.model.sense()
    run.model.record_contribution("early", 1.0, 0.0)


def test_two_models_over_equal_hosts_do_not_meet(kit: Any) -> None:
    one, other = CASE.model(), CASE.model()
    one.germinate("early", "mlp")
    lead_to(one, "early", Stage.FOSSILIZED, CASE.example())
    assert other.stages() == {"early": Stage.DORMANT, "late": Stage.DORMANT}
    with torch.no_grad():
        assert kit.same(other.eval()(CASE.example()), CASE.build().eval()(CASE.example()))


def test_a_module_that_returns_a_tuple_in_training_alone_is_named() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.map(x)
            return (x, x) if self.training else x

    model = GrowableModel(nn.Sequential(Moody()), {"a": "0"}, torch.ones(2, 4))
    model.germinate("a", "norm")
    model.advance("a")
    with pytest.raises(TypeError, match="slot 'a'.*must return a tensor, returned tuple"):
        model(torch.ones(2, 4))


def test_sowing_says_how_the_seed_will_blend() -> None:
    model = CASE.model()
    model.germinate("early", Sowing(blueprint="mlp", alpha_target=0.5, blend_ticks=2, curve="linear"))
    lead_to(model, "early", Stage.BLENDING, CASE.example())
    assert model.alphas()["early"] == 0.25
    model.tick()
    assert model.alphas()["early"] == 0.5 and model.slot("early").state.ramp is None


def test_tick_tells_whose_stage_changed(kit: Any) -> None:
    run = kit.run(CASE)
    run.sow("early", "mlp", Stage.PRUNED)
    assert run.model.tick() == {"early": Stage.EMBARGOED}
    assert run.model.tick() == {}
    assert run.model.clock == run.model.topology()["clock"]


def test_every_knob_can_be_changed_by_assigning_a_config() -> None:
    model = CASE.model()
    model.germinate("early", "mlp")
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    model.config = model.config.replace(
        incubation_ratio=0.7, pruned_ticks=3, freeze_fossils=True, gates=GateConfig(min_holding_ticks=50)
    )
    assert {slot.incubation_ratio for slot in (model.slot("early"), model.slot("late"))} == {0.7}
    assert not model.fossilize("early")
    model.prune("early")
    assert [model.tick() for _ in range(3)] == [{}, {}, {"early": Stage.EMBARGOED}]
    assert copy.deepcopy(model).slot("late").incubation_ratio == 0.7


def test_the_example_is_the_models_own() -> None:
    """A view of a large data set must not keep it alive or be copied with the model, nor may writing to it matter."""
    data = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    case = HostCase("NC")
    model = GrowableModel(case.build(), case.points, data[:2])
    data.fill_(torch.nan)
    model.germinate("early", "mlp")
    sizes = [tensor.untyped_storage().nbytes() for tensor in (model._example, copy.deepcopy(model)._example)]
    assert sizes == [2 * 6 * 4] * 2 and bool(model._example.isfinite().all())
