"""What is measured of a step, against a naive reading; and measuring leaves no trace in the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.governor.config import SensorConfig
from morphogen.governor.sensors import Sensors, WeightSample
from morphogen.state import TrainingState

CPU = torch.device("cpu")
ALL = SensorConfig(state_check_every=1, sample_size=10**9)


class Rig:
    """A model, its optimizer, and sensors that look at everything in every step."""

    def __init__(self, model: nn.Module, config: SensorConfig = ALL, rate: Any = 0.1, **options: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        self.sensors = Sensors(TrainingState(model, self.optimizer), config, **options)
        self.chance = torch.Generator().manual_seed(2)

    def backward(self) -> Tensor:
        self.optimizer.zero_grad()
        first = next(self.model.parameters())
        inputs = torch.randn(8, first.shape[1], *first.shape[2:], generator=self.chance).to(first.dtype)
        loss = self.model(inputs).square().mean()
        loss.backward()
        return loss.detach()

    def measure(self, **given: Any) -> dict[str, float]:
        reading = self.sensors.measure(given.pop("loss", 1.0), **given)
        return dict(zip(reading.names, reading.values.tolist(), strict=True))


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(math.fsum(value * value for tensor in tensors for value in tensor.detach().double().flatten().tolist()))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def relative_change(now: list[Tensor], before: list[Tensor]) -> float:
    return norm([new.double() - old.double() for new, old in zip(now, before, strict=True)]) / norm(before)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "float64": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
    "bfloat16": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16(),
    "two precisions": lambda: _of_two_precisions(),
    "channels last": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last),
    "transposed in memory": lambda: _transposed(),
    "part of it frozen": lambda: _half_frozen(),
}


def _of_two_precisions() -> nn.Module:
    class Cast(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.double()

    return nn.Sequential(nn.Linear(6, 8), Cast(), nn.Linear(8, 3).double())


def _transposed() -> nn.Module:
    model = nn.Linear(6, 8)
    model.weight = nn.Parameter(torch.randn(6, 8).T)
    return model


def _half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_about_weights_and_gradients_are_those_of_a_naive_reading(kind: str) -> None:
    rig = Rig(MODELS[kind]())
    before: list[Tensor] | None = None
    for _ in range(4):
        loss = rig.backward()
        now = weights(rig.model)
        gradients = [parameter.grad for parameter in rig.model.parameters() if parameter.grad is not None]
        found = rig.measure(loss=loss)
        expected = {"loss": float(loss), "grad_norm": norm(gradients), "dead_share": 0.0, "weight_norm": norm(now)}
        if before is not None:
            expected["update"] = relative_change(now, before)
            expected["update_per_rate"] = relative_change(now, before) / 0.1
        assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-9) for name, value in expected.items()}
        before = now
        rig.optimizer.step()


def test_a_weight_that_has_gaps_in_memory_is_left_out_of_weights_but_not_of_gradients() -> None:
    model = nn.Linear(6, 8)
    model.weight = nn.Parameter(torch.randn(8, 12)[:, ::2])
    rig = Rig(model)
    for _ in range(2):
        rig.backward()
        found = rig.measure()
        assert found["grad_norm"] == pytest.approx(norm([model.weight.grad, model.bias.grad]), rel=1e-5)
        assert found["weight_norm"] == pytest.approx(norm([model.bias]), rel=1e-5)
        rig.optimizer.step()
    assert found["update"] > 0.0


def test_the_update_is_that_of_a_sample_in_large_tensors() -> None:
    rig = Rig(nn.Linear(100, 50, bias=False), ALL.replace(sample_size=64))
    rig.measure()
    with torch.no_grad():
        for start in range(0, 5000, 1250):  # 64 of 5,000 values: four stretches of 16 neighbours
            rig.model.weight.view(-1)[start : start + 16] *= 3.0
    assert rig.measure()["update"] == pytest.approx(2.0)
    with torch.no_grad():
        rig.model.weight.view(-1)[16:1250] *= 3.0
    assert rig.measure()["update"] == 0.0


def test_weights_that_were_zero_have_a_large_change_and_no_nan() -> None:
    rig = Rig(nn.Linear(6, 8))
    with torch.no_grad():
        for parameter in rig.model.parameters():
            parameter.zero_()
    rig.measure()
    assert rig.measure()["update"] == 0.0
    with torch.no_grad():
        rig.model.bias.fill_(1.0)
    assert rig.measure()["update"] == pytest.approx(math.sqrt(8) / 1e-12, rel=1e-3)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_the_largest_rate_of_all_groups_and_optimizers_counts(as_tensors: bool) -> None:
    def rate(value: float) -> Any:
        return torch.tensor(value) if as_tensors else value

    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    optimizers = {
        "one": torch.optim.Adam(
            [{"params": model[0].parameters(), "lr": rate(1e-3)}, {"params": model[1].parameters()}], lr=rate(0.5)
        ),
        "two": torch.optim.SGD(model[2].parameters(), lr=rate(0.2)),
    }
    sensors = Sensors(TrainingState(model, optimizers), ALL)
    sensors.measure(1.0)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    reading = sensors.measure(1.0)
    found = dict(zip(reading.names, reading.values.tolist(), strict=True))
    assert found["update_per_rate"] == pytest.approx(found["update"] / 0.5, rel=1e-5) and found["update"] > 0.0


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_rate_of_zero_divides_nothing_by_zero(rate: Any) -> None:
    rig = Rig(nn.Linear(2, 2), rate=rate)
    rig.measure()
    assert not math.isfinite(rig.measure().get("update_per_rate", math.inf))


def test_plain_and_tensor_rates_are_compared() -> None:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    groups = [{"params": model[0].parameters(), "lr": torch.tensor(0.1)}, {"params": model[1].parameters(), "lr": 0.5}]
    sensors = Sensors(TrainingState(model, torch.optim.SGD(groups, lr=0.1)), ALL)
    sensors.measure(1.0)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    reading = sensors.measure(1.0)
    found = dict(zip(reading.names, reading.values.tolist(), strict=True))
    assert found["update_per_rate"] == pytest.approx(found["update"] / 0.5, rel=1e-5)


@pytest.mark.parametrize("missing", ["none", "zeros"])
def test_the_dead_share_counts_tensors(missing: str) -> None:
    rig = Rig(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    rig.backward()
    for parameter in rig.model[0].parameters():
        parameter.grad = None if missing == "none" else torch.zeros_like(parameter)
    assert rig.measure()["dead_share"] == 0.5
    rig.model[0].requires_grad_(False)
    assert rig.measure()["dead_share"] == 0.0, "frozen ones are not meant to learn"
    rig.model.zero_grad()
    found = rig.measure()
    assert "grad_norm" not in found


def test_a_gradient_with_nan_is_not_dead_and_has_no_norm() -> None:
    rig = Rig(nn.Linear(6, 8))
    rig.backward()
    rig.model.bias.grad.fill_(math.nan)
    found = rig.measure()
    assert found["dead_share"] == 0.0 and math.isnan(found["grad_norm"])


def test_all_weights_are_looked_at_every_few_steps_and_single_gradients_too() -> None:
    rig = Rig(nn.Linear(6, 8), ALL.replace(state_check_every=4))
    rig.backward()
    names = [set(rig.measure(grad_norm=2.0)) for _ in range(9)]
    for number, found in enumerate(names):
        assert ("weight_norm" in found) is ("dead_share" in found) is (number % 4 == 0)
        assert "grad_norm" in found and ("update" in found) is (number > 0)
    assert rig.measure(grad_norm=2.0)["grad_norm"] == 2.0
    assert "dead_share" in rig.measure(), "for free, where the norm is computed"


def test_the_probe_is_called_every_few_steps_without_gradients() -> None:
    calls: list[bool] = []

    def probe() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return rig.model(torch.ones(1, 6)).square().mean()

    rig = Rig(nn.Linear(6, 8), ALL.replace(probe_every=3), probe=probe)
    found = ["probe_loss" in rig.measure() for _ in range(7)]
    assert found == [True, False, False, True, False, False, True] and calls == [False] * 3
    every = Rig(nn.Linear(6, 8), ALL.replace(probe_every=1), probe=lambda: 2.0)
    assert [every.measure()["probe_loss"] for _ in range(3)] == [2.0] * 3


def test_outputs_are_measured_where_they_are_given() -> None:
    rig = Rig(nn.Linear(6, 8))
    assert "output_spread" not in rig.measure()
    found = rig.measure(logits=torch.randn(16, 3), labels=torch.arange(16) % 3)
    assert {"output_spread", "prediction_entropy", "label_entropy"} <= set(found)


def test_a_sparse_gradient_has_a_norm_where_rows_repeat() -> None:
    model = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    sensors = Sensors(TrainingState(model, optimizer), ALL)
    dense = copy.deepcopy(model)
    dense.sparse = False
    for _ in range(3):
        for module in (model, dense):
            module.zero_grad()
            module(torch.tensor([1, 1, 1, 7])).square().sum().backward()
        assert model.weight.grad.is_sparse
        found = sensors.measure(1.0)
        numbers = dict(zip(found.names, found.values.tolist(), strict=True))
        assert numbers["grad_norm"] == pytest.approx(norm([dense.weight.grad]), rel=1e-5)
        assert model.weight.grad.is_sparse
        optimizer.step()
        dense.load_state_dict(model.state_dict())
    assert numbers["update"] > 0.0


def test_parameters_that_come_go_or_move_are_not_compared_with_others() -> None:
    rig = Rig(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)))
    rig.measure()
    assert "update" in rig.measure()
    rig.model[1].requires_grad_(False)
    assert "update" not in rig.measure() and "update" in rig.measure()
    rig.model[1].requires_grad_(True)
    assert "update" not in rig.measure() and "update" in rig.measure()
    rig.model[0].weight.data = torch.zeros(8, 6)
    assert "update" not in rig.measure() and "update" in rig.measure()
    rig.sensors.start_anew()
    assert "update" not in rig.measure()


def test_memory_that_is_used_again_for_a_smaller_weight_is_not_read_past_its_end() -> None:
    """Same object, same address, another shape: as after pruning in place."""
    model = nn.Linear(6, 8, bias=False)
    sample = WeightSample(10**9)
    assert sample.change(list(model.parameters()), CPU) is None
    model.weight.data = model.weight.data[:4]
    change = sample.change(list(model.parameters()), CPU)
    with torch.no_grad():
        model.weight.mul_(2.0)
    doubled = sample.change(list(model.parameters()), CPU)
    assert change is None or float(change) == 0.0
    assert float(doubled) == pytest.approx(1.0)


@pytest.mark.parametrize("moved", [False, True])
def test_sensors_that_are_loaded_measure_what_those_that_never_stopped_would(moved: bool) -> None:
    """Between the last look and the restart the step was taken."""
    rig = Rig(nn.Linear(6, 8), ALL.replace(state_check_every=4))
    for _ in range(3):
        rig.measure()
    if moved:
        with torch.no_grad():
            rig.model.weight.mul_(1.5)
    other = Rig(copy.deepcopy(rig.model), ALL.replace(state_check_every=4))
    other.measure()
    other.sensors.load_state_dict(rig.sensors.state_dict())
    for _ in range(3):
        expected = rig.measure()
        assert ("update" in expected) and other.measure() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("check_every", [1, 3])
def test_measuring_changes_no_bit_of_the_run_and_draws_nothing(kit: Any, check_every: int) -> None:
    model = kit.small_model(batch_norm=True, dropout=0.2)
    rig = Rig(model, ALL.replace(state_check_every=check_every), probe=lambda: 1.0)
    for _ in range(4):
        loss = rig.backward()
        before, chance = kit.contents(model, rig.optimizer), torch.get_rng_state()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        versions = [parameter._version for parameter in model.parameters()]
        logits = torch.randn(16, 5, generator=rig.chance)
        rig.measure(loss=loss, logits=logits, labels=torch.arange(16) % 5)
        assert kit.differences(kit.contents(model, rig.optimizer), before) == []
        assert kit.differences({name: parameter.grad for name, parameter in model.named_parameters()}, gradients) == []
        assert versions == [parameter._version for parameter in model.parameters()]
        assert torch.equal(torch.get_rng_state(), chance)
        rig.optimizer.step()


def test_measuring_between_two_backward_passes_does_not_break_the_graph() -> None:
    """As in a loop that keeps the graph: nothing is written to what autograd saved."""
    rig = Rig(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    loss = rig.model(torch.randn(8, 6)).square().mean()
    loss.backward(retain_graph=True)
    once = rig.model[0].weight.grad.clone()
    rig.measure(loss=loss)
    loss.backward()
    assert torch.equal(rig.model[0].weight.grad, 2.0 * once)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_one_number_is_refused(name: str) -> None:
    rig = Rig(nn.Linear(6, 8))
    with pytest.raises(ValueError, match=rf"`{name}` must be one number, got a tensor of shape \(3,\)"):
        rig.measure(**{name: torch.ones(3)})
