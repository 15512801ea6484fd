"""Germination: nothing else notices, no stream moves, and a failed one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, Sowing, Stage
from morphogen.growth.blueprints import blueprint, registry
from morphogen.testing import HostCase, host_cases, lead_to


@pytest.fixture
def odd_blueprints(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blueprints that do what none may do; gone after the test."""
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))

    class Odd(nn.Module):
        def __init__(self, width: int, layout: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))

        @staticmethod
        def parameter_count(width: int, layout: str) -> int:
            return width

    @blueprint("longer", layouts=("NCHW",))
    class Longer(Odd):
        def forward(self, h: Tensor) -> Tensor:
            return torch.cat([h, h], 2)

    @blueprint("pair", layouts=("NCHW",))
    class Pair(Odd):
        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return h, h

    @blueprint("fails", layouts=("NCHW",))
    class Fails(Odd):
        def forward(self, h: Tensor) -> Tensor:
            raise RuntimeError("this blueprint is broken")

    @blueprint("unbuildable", layouts=("NCHW",))
    class Unbuildable(Odd):
        def __init__(self, width: int, layout: str) -> None:
            raise RuntimeError("this blueprint cannot be built")

    @blueprint("overwrites", layouts=("NCHW",))
    class Overwrites(Odd):
        def forward(self, h: Tensor) -> Tensor:
            return h.mul_(0.0)

    yield


FAILURES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"blueprint": "conv3x4"}, ValueError, "`blueprint` must be one of .*got 'conv3x4'. Did you mean 'conv3x3'"),
    (
        {"blueprint": "conv1d"},
        ValueError,
        "`blueprint` must work on layout NCHW, got 'conv1d' for NCL, NLC. Use one of: bottleneck",
    ),
    ({"blueprint": "mlp", "options": {"rank": 2}}, ValueError, r"`options` of 'mlp' must be among \['expansion'\]"),
    ({"blueprint": "mlp", "operator": "multiply"}, ValueError, "`operator` must be one of add, scale, gate"),
    ({"blueprint": Sowing(blueprint="mlp"), "operator": "gate"}, ValueError, "must be left out with a Sowing"),
    ({"blueprint": "mlp", "seed": -1}, ValueError, "`root_seed`"),
    ({"blueprint": "longer"}, SlotError, r"slot 'early' needs .*of shape \(4, 8, 5, 5\), got \(4, 8, 10, 5\)"),
    ({"blueprint": "pair"}, SlotError, "slot 'early' needs .*is a tensor.*got tuple"),
    ({"blueprint": "overwrites"}, SlotError, "slot 'early'.*must not write to its input"),
    ({"blueprint": "fails"}, RuntimeError, "this blueprint is broken"),
    ({"blueprint": "unbuildable"}, RuntimeError, "cannot be built"),
]


@pytest.mark.usefixtures("odd_blueprints")
@pytest.mark.parametrize(("arguments", "error", "match"), FAILURES)
def test_a_failed_germination_changes_nothing(kit: Any, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("late", "mlp", Stage.TRAINING)
    run.steps(2)
    run.step()
    before, events = run.contents(), list(run.events)
    with pytest.raises(error, match=match):
        run.model.germinate("early", **arguments)
    assert kit.differences(before, run.contents()) == [] and run.events == events
    run.model.germinate("early", "mlp")
    assert run.model.stages()["early"] is Stage.GERMINATED


def test_germinating_an_occupied_slot_changes_nothing(kit: Any, live_stage: Stage) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", live_stage)
    before = run.contents()
    with pytest.raises(SlotError, match=f"slot 'early' must be dormant to germinate, is {live_stage.name.lower()}"):
        run.model.germinate("early", "norm")
    assert kit.differences(before, run.contents()) == []


OPERATIONS = {
    "germinate": lambda model: model.germinate("late", "mlp"),
    "prune": lambda model: model.prune("early"),
    "tick that ends a prune ramp": lambda model: model.tick(),
    "freeze": lambda model: model.fossilize("early"),
    "excise": lambda model: model.excise("early"),
}


@pytest.mark.parametrize("last", [True, False], ids=["refuses last", "refuses first"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_a_follower_refuses_changes_nothing(kit: Any, operation: str, last: bool) -> None:
    """The run's optimizer follows before or after the one who refuses; either way its moments and groups are as before."""

    class Refusal(Exception):
        pass

    def refuse() -> None:
        raise Refusal

    run = kit.run(HostCase("NCHW"))
    run.model.config = run.model.config.replace(freeze_fossils=True)
    run.sow("early", "mlp", Stage.FOSSILIZED if operation == "excise" else Stage.HOLDING)
    run.steps(3)
    if operation == "tick that ends a prune ramp":
        run.model.prune("early", over=1)
    run.step()
    run.model.record_contribution("early", 1.0, 0.0)
    before, events = run.contents(), list(run.events)
    run.model.on_topology_change(refuse)
    if not last:
        run.model.followers._callbacks.reverse()
    with pytest.raises(Refusal):
        OPERATIONS[operation](run.model)
    assert kit.differences(before, run.contents()) == [] and run.events == events
    run.state.verify()


def test_a_dead_follower_is_forgotten() -> None:
    class Follower:
        calls = 0

        def follow(self) -> None:
            Follower.calls += 1

    model, follower = HostCase("NC").model(), Follower()
    model.on_topology_change(follower.follow)
    model.germinate("early", "norm")
    assert Follower.calls == 1
    del follower
    model.prune("early")
    assert Follower.calls == 1


@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_germination_shifts_no_random_stream_and_changes_no_output(kit: Any, case: HostCase) -> None:
    run, twin = kit.run(case), kit.run(case)
    chance = kit.chance()
    run.sow("early", "mlp", operator="gate")
    assert kit.same(kit.chance(), chance)
    assert kit.same(run.data.get_state(), twin.data.get_state())
    for _ in range(3):
        assert kit.same(run.step(), twin.step())
    assert kit.same(run.model.host.state_dict(), twin.model.host.state_dict())


def weights(model: GrowableModel, slot: str) -> dict[str, Tensor]:
    seed = model.slot(slot).seed
    assert seed is not None
    return {name: tensor.clone() for name, tensor in seed.state_dict().items()}


def test_initialisation_depends_on_seed_slot_and_germination_alone(kit: Any) -> None:
    case = HostCase("NCHW")

    def sown(root: int = 0, *, first: bool = False, again: bool = False, seed: int | None = None) -> dict[str, Tensor]:
        model = case.model(seed=0)
        model = GrowableModel(case.build(), case.points, case.example(), config=model.config, seed=root)
        if first:
            model.germinate("late", "conv3x3")
        if again:
            model.germinate("early", "norm")
            lead_to(model, "early", Stage.DORMANT, case.example())
        model.germinate("early", "mlp", seed=seed)
        return weights(model, "early")

    reference = sown()
    assert kit.same(sown(), reference) and kit.same(sown(first=True), reference)
    assert not kit.same(sown(1), reference) and not kit.same(sown(again=True), reference)
    assert kit.same(sown(seed=7), sown(1, seed=7)) and not kit.same(sown(seed=7), reference)


def test_a_newborn_takes_over_mode_dtype_and_device_of_the_feature(kit: Any) -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for case in host_cases():
            model = case.model().to(dtype)
            model.eval()
            model.germinate("early", "mlp", operator="gate")
            seed = model.slot("early").seed
            assert seed is not None and not any(part.training for part in seed.modules())
            assert {parameter.dtype for parameter in seed.parameters()} == {dtype}
            assert {parameter.device.type for parameter in seed.parameters()} == {"cpu"}
            assert model(case.example().to(dtype)).dtype == dtype


def test_the_newborn_policy_is_the_runs(kit: Any) -> None:
    from_birth = {"lr": 0.123}
    run = kit.run(HostCase("NC"))
    state = type(run.state)(run.model, run.optimizer, newborn_options=lambda owner: from_birth)
    run.state = state
    run.sow("early", "mlp")
    assert state.learning_rates() == {"host": 0.01, "early": 0.123}
