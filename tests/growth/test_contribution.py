"""Contribution: the fused pass equals separate ones; the error is that of a paired mean; nothing is left behind."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, Sowing, Stage, measure_contributions
from morphogen.growth.ablation import ablated_values, peak_bytes
from morphogen.growth.lifecycle import OPERATORS
from morphogen.state import draw_from
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

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


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def in_double(outputs: Tensor, targets: Tensor) -> Tensor:
    return metric(outputs.double(), targets.double())


def pass_sizes(model: GrowableModel, sizes: list[int]) -> None:
    """Note how many samples each forward pass of the host holds."""
    model.host.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("operator", ["add", "gate"])
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_any_chunking_equals_separate_passes(case: HostCase, operator: Any, dtype: torch.dtype) -> None:
    """Partial alpha, a fossil, an uneven last batch; the oracle runs the model once for each ablation."""
    model = grown(case, operator).to(dtype)
    data = [(inputs.to(dtype), targets.to(dtype)) for inputs, targets in batches(case, 5, 3)]
    need = peak_bytes(model, data[0], in_double, frozenset(["late"]))
    with torch.no_grad():
        alone = copy.deepcopy(model).eval()
        oracle = {
            slot: torch.cat([in_double(alone(x), y) - in_double(alone(x, alphas={slot: 0.0}), y) for x, y in data])
            for slot in ("early", "late")
        }
    sizes: list[int] = []
    pass_sizes(model, sizes)
    for samples in (None, 1, 7, 11):
        sizes.clear()
        budget = None if samples is None else samples * need + need // 2
        result = measure_contributions(model, data, in_double, memory_budget_bytes=budget)
        for slot, gaps in oracle.items():
            assert result.slots[slot].value == pytest.approx(float(gaps.mean()), abs=1e-6)
            assert result.slots[slot].error == pytest.approx(float(gaps.std()) / math.sqrt(8), abs=1e-6)
        assert max(sizes) == (15 if samples is None else {1: 1, 7: 6, 11: 10}[samples])
        assert sum(sizes) == 24 + (samples is not None)  # one sample more, to measure its need


def test_a_budget_bounds_what_is_allocated() -> None:
    """The profiler's account of allocations is the oracle; the host has no kernel that needs scratch memory."""
    case = HostCase("NLC", width=64)
    model, data = grown(case), batches(case, 200)
    need = peak_bytes(model, data[0], metric, frozenset(["late"]))
    for samples in (64, 256):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            measure_contributions(model, data, metric, memory_budget_bytes=samples * need)
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(event.nbytes() for event in events))
        assert 0.5 * samples * need < peak < 1.02 * samples * need + 8192


def test_without_a_budget_a_pass_holds_a_bounded_number_of_copies() -> None:
    case = HostCase("NC")
    model, data, sizes = grown(case), batches(case, 3), list[int]()
    rows = [frozenset[str](), frozenset(["early"])] * 20
    pass_sizes(model, sizes)
    values = ablated_values(model, data, metric, rows)
    assert sizes == [48, 48, 24]
    torch.testing.assert_close(values, values[:2].repeat(20, 1), rtol=1e-6, atol=1e-6)


class TokenHost(nn.Module):
    """Ids and a padding mask in, a tuple out; ``scale`` is one number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.body(self.embed(ids)).relu() * mask[..., None]
        return self.head(hidden * (1.0 if scale is None else scale)), hidden.mean(1)


def token_loss(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return -nn.functional.cross_entropy(outputs[0].mT, targets, reduction="none").mean(1)


@pytest.mark.parametrize("form", ["tuple", "dict", "with a constant"])
@pytest.mark.parametrize("samples", [None, 1, 4])
def test_token_models_are_measured(form: str, samples: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    with draw_from(generator):
        host = TokenHost()
    ids = torch.randint(11, (5, 6), generator=generator)
    mask, targets = (torch.rand(5, 6, generator=generator) > 0.3).float(), torch.randint(11, (5, 6), generator=generator)
    inputs: Any = {"tuple": (ids, mask), "dict": {"mask": mask, "ids": ids}}.get(form, (ids, mask, torch.tensor(1.5)))
    model = GrowableModel(host, {"early": "embed", "late": "body"}, inputs, config=LENIENT)
    for slot in ("early", "late"):
        model.germinate(slot, "mlp")
        lead_to(model, slot, Stage.HOLDING, inputs)
        for parameter in model.owners()[slot]:
            nn.init.normal_(parameter[1], std=0.3, generator=generator)
    call = (lambda **alphas: model(**inputs, **alphas)) if form == "dict" else (lambda **alphas: model(*inputs, **alphas))
    need = peak_bytes(model, (inputs, targets), token_loss, frozenset())
    budget = None if samples is None else samples * need * 2
    result = measure_contributions(model, [(inputs, targets)], token_loss, memory_budget_bytes=budget)
    with torch.no_grad():
        for slot, found in result.slots.items():
            gaps = token_loss(call(), targets) - token_loss(call(alphas={slot: 0.0}), targets)
            assert found.value == pytest.approx(float(gaps.mean()), abs=1e-6) and abs(found.value) > 1e-4
            assert found.error == pytest.approx(float(gaps.std()) / math.sqrt(5), abs=1e-6)


class Restless(nn.Module):
    """Writes to a buffer, replaces another and draws, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.body(x)
        self.last = hidden[0]
        return hidden + torch.rand(())


def test_a_restless_host_is_left_as_it_was(kit: Any) -> None:
    model = GrowableModel(Restless(), {"early": "body"}, torch.zeros(2, 6), config=LENIENT)
    before, chance = copy.deepcopy(dict(model.named_buffers())), kit.chance()
    measure_contributions(model, [(torch.ones(3, 6), torch.zeros(3, 4))], metric, memory_budget_bytes=10**6)
    assert kit.same(dict(model.named_buffers()), before) and kit.same(kit.chance(), chance)


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
    with pytest.raises(ValueError, match=r"`slots` must name each slot once, got \['late', 'late'\]"):
        measure_contributions(model, data, metric, slots=["late", "late"])
    with pytest.raises(ValueError, match="`batches` must hold at least one batch with samples, got none"):
        measure_contributions(model, batches(case, 0), metric)
    with pytest.raises(ValueError, match=r"inputs must have the batch as first axis, of 3 samples.*\[\(4, 6\)\]"):
        measure_contributions(model, [(data[0][0], torch.zeros(3, 3))], metric)
    with pytest.raises(ValueError, match="targets must have the batch as first axis, got a number"):
        measure_contributions(model, [(data[0][0], torch.tensor(1.0))], metric)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_a_number_of_bytes(budget: int) -> None:
    case = HostCase("NC")
    with pytest.raises(ValueError, match=f"`memory_budget_bytes` must be >= 1, got {budget}"):
        measure_contributions(grown(case), batches(case, 4), metric, memory_budget_bytes=budget)


def test_a_budget_too_small_for_one_sample_is_refused_with_what_it_takes(kit: Any) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", Stage.HOLDING)
    data = batches(run.case, 4)
    need = peak_bytes(run.model.eval(), data[0], metric, frozenset(["early"]))
    before = run.contents()
    with pytest.raises(ValueError, match=f"`memory_budget_bytes` must be >= {need}, which one sample takes, got {need - 1}"):
        measure_contributions(run.model, data, metric, memory_budget_bytes=need - 1)
    assert kit.differences(before, run.contents()) == []
    measure_contributions(run.model, data, metric, memory_budget_bytes=need)


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
