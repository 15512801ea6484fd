"""Contribution: the fused pass equals separate ones; the error is that of a paired mean; nothing is left behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, Sowing, Stage, measure_contributions
from morphogen.growth.lifecycle import OPERATORS
from morphogen.testing import HostCase, host_cases, lead_to

Batches = list[tuple[Tensor, Tensor]]


def metric(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs - targets).square().flatten(1).mean(1)


def grown(case: HostCase, operator: Any = "add") -> GrowableModel:
    """One slot blending at a partial alpha, one fossil at 1; both with random weights, and awkward modes."""
    model = case.model()
    generator = torch.Generator().manual_seed(0)
    for slot, stage, alpha in (("early", Stage.HOLDING, 0.37), ("late", Stage.FOSSILIZED, 1.0)):
        model.germinate(slot, Sowing(blueprint="mlp", operator=operator, alpha_target=alpha))
        lead_to(model, slot, stage, case.example())
        seed = model.slot(slot).seed
        assert seed is not None
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.normal_(std=0.3, generator=generator)
    model.train()
    model.host.get_submodule("norm").eval()
    return model


def batches(case: HostCase, *sizes: int) -> Batches:
    found: Batches = []
    for index, size in enumerate(sizes):
        inputs = case.example(num_samples=size, seed=10 + index)
        with torch.no_grad():
            shape = case.build().eval()(inputs).shape
        found.append((inputs, torch.randn(shape, generator=torch.Generator().manual_seed(index))))
    return found


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_the_fused_pass_equals_removing_each_seed(case: HostCase, operator: Any) -> None:
    """The oracle removes the seed for real, runs one pass per slot and sums by hand."""
    model, data = grown(case, operator), batches(case, 5, 3)
    result = measure_contributions(model, data, metric)

    def values(without: str | None) -> list[float]:
        twin = copy.deepcopy(model).eval()
        if without == "early":
            twin.prune("early")
        elif without == "late":
            twin.excise("late")
        with torch.no_grad():
            return [float(v) for inputs, targets in data for v in metric(twin(inputs), targets)]

    intact = values(None)
    assert result.metric == pytest.approx(sum(intact) / 8, abs=1e-6)
    assert list(result.slots) == ["early", "late"]
    for slot, found in result.slots.items():
        gaps = [with_it - without for with_it, without in zip(intact, values(slot), strict=True)]
        mean = sum(gaps) / 8
        error = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 7 / 8)
        assert found.value == pytest.approx(mean, abs=1e-6) and abs(mean) > 1e-5
        assert found.error == pytest.approx(error, abs=1e-6)


def test_measuring_leaves_no_trace(kit: Any) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", Stage.HOLDING)
    run.steps(2)
    run.step()
    run.model.host.get_submodule("norm").eval()
    before = run.contents()
    measure_contributions(run.model, batches(run.case, 4), metric)
    assert kit.differences(before, run.contents()) == []


def test_modes_come_back_when_the_metric_fails(kit: Any) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", Stage.HOLDING)
    before = run.contents()
    with pytest.raises(ZeroDivisionError):
        measure_contributions(run.model, batches(run.case, 4), lambda outputs, targets: outputs / (1 // 0))
    assert kit.differences(before, run.contents()) == []


def test_only_what_is_asked_for_is_measured() -> None:
    case = HostCase("NC")
    model, data = grown(case), batches(case, 6)
    both, late = measure_contributions(model, data, metric), measure_contributions(model, data, metric, slots=["late"])
    assert list(late.slots) == ["late"]
    assert late.slots["late"].value == pytest.approx(both.slots["late"].value, abs=1e-7)


def test_a_model_without_acting_seeds_has_a_metric_and_no_contributions() -> None:
    case = HostCase("NC")
    model, data = case.model(), batches(case, 6)
    model.germinate("early", "norm")
    result = measure_contributions(model, data, metric)
    with torch.no_grad():
        expected = float(metric(case.build().eval()(data[0][0]), data[0][1]).mean())
    assert result.metric == pytest.approx(expected, abs=1e-6) and result.slots == {}


def test_one_sample_has_no_error_estimate() -> None:
    case = HostCase("NC")
    result = measure_contributions(grown(case), batches(case, 1), metric)
    assert all(found.error == math.inf and math.isfinite(found.value) for found in result.slots.values())


def test_what_cannot_be_measured_is_refused() -> None:
    case = HostCase("NC")
    model, data = grown(case), batches(case, 4)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        measure_contributions(model, [], metric)
    with pytest.raises(SlotError, match="`slot` must be one of early, late, got 'middle'"):
        measure_contributions(model, data, metric, slots=["middle"])
    model.prune("early")
    with pytest.raises(SlotError, match="slot 'early' must hold a blended seed.*is pruned"):
        measure_contributions(model, data, metric, slots=["early"])
    with pytest.raises(ValueError, match=r"`metric` must return one value per sample, shape \(8,\), got \(\)"):
        measure_contributions(model, data, lambda outputs, targets: outputs.mean())


def test_alpha_overrides_act_per_sample_and_for_one_call_alone(kit: Any) -> None:
    case = HostCase("NCHW")
    model = grown(case).eval()
    inputs = case.example(num_samples=4)
    with torch.no_grad():
        intact = model(inputs)
        off, on = model(inputs, alphas={"late": 0.0}), model(inputs, alphas={"late": 1.0})
        mixed = model(inputs, alphas={"late": torch.tensor([0.0, 1.0, 0.0, 1.0])})
        assert kit.same(model(inputs), intact)
    torch.testing.assert_close(on, intact, rtol=0, atol=0)
    torch.testing.assert_close(mixed, torch.stack([off[0], on[1], off[2], on[3]]), rtol=1e-6, atol=1e-6)
    assert not torch.equal(off, on)


def test_an_override_that_fails_leaves_none_behind(kit: Any) -> None:
    case = HostCase("NC")
    model = grown(case).eval()
    intact = model(case.example())
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 99), alphas={"late": 0.0})
    assert kit.same(model(case.example()).detach(), intact.detach())
    with pytest.raises(SlotError, match="`slot` must be one of"):
        model(case.example(), alphas={"middle": 0.0})
    model.prune("early")
    with pytest.raises(SlotError, match="slot 'early' must hold a blended seed"):
        model(case.example(), alphas={"early": 0.0})
    with pytest.raises(ValueError, match=r"alpha of slot 'late'.*shape \(4,\).*\(3,\)"):
        model(case.example(), alphas={"late": torch.zeros(3)})


def test_a_recorded_contribution_opens_the_gate_and_goes_stale(kit: Any) -> None:
    run = kit.run(HostCase("NC"))
    run.sow("early", "mlp", Stage.HOLDING)
    run.step()
    assert not run.model.fossilize("early")
    run.model.record_contribution("early", 0.5, 0.1)
    run.steps(2)
    assert not run.model.fossilize("early")
    run.step()
    run.model.record_contribution("early", 0.5, 0.1)
    assert run.model.fossilize("early")


def test_a_contribution_of_an_empty_slot_cannot_be_recorded() -> None:
    model = HostCase("NC").model()
    with pytest.raises(SlotError, match="slot 'early' must hold a blended seed.*is dormant"):
        model.record_contribution("early", 0.5, 0.1)
