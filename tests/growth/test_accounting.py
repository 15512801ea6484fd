"""Accounting: every parameter and every operation has one owner; the sums are those of the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from morphogen.growth import GrowableModel, Sowing, Stage, count_flops, count_parameters, flop_counter
from morphogen.testing import LENIENT, HostCase, host_cases, lead_to

ACTING = (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


def spent(module: nn.Module, example: Tensor, backward: bool) -> int:
    """The operations of a copy of ``module``, counted by torch's own counter around an ordinary pass."""
    module = copy.deepcopy(module).train(backward)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        output = module(example)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops()


def sown(case: HostCase, stage: Stage, freeze: bool = False, **sowing: Any) -> GrowableModel:
    """A seed in ``stage`` at "early", another one incubating at "late"."""
    model = case.model(config=LENIENT.replace(freeze_fossils=freeze))
    for slot, until in (("early", stage), ("late", Stage.TRAINING)):
        if until is not Stage.DORMANT:
            model.germinate(slot, Sowing(blueprint="mlp", **sowing))
            lead_to(model, slot, until, case.example())
    return model


# -- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_parameters_belong_to_who_holds_them_frozen_or_not(stage: Stage) -> None:
    case = HostCase("NCHW")
    model = sown(case, stage, freeze=True, operator="gate")
    if model.slot("early").seed is not None:
        frozen = not any(p.requires_grad for _, p in model.owners()["early"])
        assert frozen is (stage is Stage.FOSSILIZED)
    found = count_parameters(model)
    assert list(found) == ["host", "early", "late"] and sum(found.values()) == model.num_parameters()
    assert found["host"] == sum(p.numel() for p in case.build().parameters())
    mlp = count_parameters(sown(case, Stage.TRAINING, operator="gate"))["early"]
    assert found == {"host": found["host"], "early": mlp if model.slot("early").seed is not None else 0, "late": mlp}
    seed = model.slot("late").seed
    assert seed is not None and seed.gate is not None and mlp == sum(p.numel() for p in seed.parameters())


def test_a_tied_parameter_counts_once() -> None:
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    model = GrowableModel(nn.Sequential(embed, nn.Linear(4, 4), head), {"late": "1"}, torch.zeros(2, 3, dtype=torch.long))
    assert count_parameters(model) == {"host": 20 + 20, "late": 0}


# -- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("case", host_cases(), ids=str)
def test_the_owners_sum_to_the_whole_and_the_host_is_the_bare_host(case: HostCase, stage: Stage, backward: bool) -> None:
    model, example = sown(case, stage, operator="gate"), case.example(num_samples=3)
    found = count_flops(model, example, backward=backward)
    assert list(found) == ["host", "early", "late"]
    assert sum(found.values()) == spent(model, example, backward)
    assert found["host"] == spent(case.build(), example, backward) > 0
    acts = stage in ACTING or (stage is Stage.TRAINING and backward)
    assert (found["early"] > 0) is acts and (found["late"] > 0) is backward


@pytest.mark.parametrize("freeze", [False, True])
def test_a_seed_costs_what_its_layers_do(freeze: bool) -> None:
    """Rank 2 at width 8, five samples: two maps forward; back, each map's input and, unless frozen, its weight."""
    case = HostCase("NC")
    model = case.model(config=LENIENT.replace(freeze_fossils=freeze))
    model.germinate("late", "low_rank", options={"rank": 2})
    lead_to(model, "late", Stage.TRAINING, case.example())
    forward = 2 * 5 * (8 * 2 + 2 * 8)
    assert count_flops(model, case.example(num_samples=5))["late"] == 0
    incubating = count_flops(model, case.example(num_samples=5), backward=True)["late"]
    assert incubating == 3 * forward - forward // 2, "nothing goes back to the host's feature"
    lead_to(model, "late", Stage.FOSSILIZED, case.example())
    assert count_flops(model, case.example(num_samples=5))["late"] == forward
    assert count_flops(model, case.example(num_samples=5), backward=True)["late"] == forward * (2 if freeze else 3)


@pytest.mark.parametrize("frozen", ["host", "fossil", "both", "stem"])
@pytest.mark.parametrize("operator", ["add", "gate"])
def test_frozen_parts_add_up_too(frozen: str, operator: Any) -> None:
    case = HostCase("NCHW")
    model = sown(case, Stage.FOSSILIZED, freeze=frozen in ("fossil", "both"), operator=operator)
    for name, parameter in model.host.named_parameters():
        if frozen in ("host", "both") or (frozen == "stem" and name.startswith(("stem", "norm"))):
            parameter.requires_grad_(False)
    for backward in (False, True):
        found = count_flops(model, case.example(), backward=backward)
        assert sum(found.values()) == spent(model, case.example(), backward)
        assert found["early"] > 0 and found["host"] > 0
    assert count_flops(model, case.example())["host"] == spent(case.build(), case.example(), False)


def test_dormant_alone_is_the_host_in_bf16_and_eval_mode() -> None:
    case = HostCase("NLC")
    model = case.model().to(torch.bfloat16).eval()
    found = count_flops(model, case.example().to(torch.bfloat16), backward=True)
    assert found == {"host": spent(case.build(), case.example(), True), "early": 0, "late": 0}
    assert not model.training


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.HOLDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
@pytest.mark.parametrize("backward", [False, True])
def test_counting_leaves_no_trace(kit: Any, stage: Stage, backward: bool) -> None:
    run = kit.run(HostCase("NCHW"))
    run.sow("early", "mlp", stage)
    run.steps(2)
    run.step()
    run.model.host.get_submodule("norm").eval()
    fused, before = torch.backends.mha.get_fastpath_enabled(), run.contents()
    hooks = [list(part._forward_pre_hooks) for part in run.model.modules()]
    count_flops(run.model, run.case.example(), backward=backward)
    with pytest.raises(RuntimeError):
        count_flops(run.model, torch.zeros(3, 99), backward=backward)
    assert kit.differences(before, run.contents()) == []
    assert hooks == [list(part._forward_pre_hooks) for part in run.model.modules()]
    assert torch.backends.mha.get_fastpath_enabled() is fused


class Wrapped(nn.Module):
    """Gives out its output in a box that torch does not look into."""

    class Box:
        def __init__(self, content: Tensor) -> None:
            self.content = content

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.Box(self.body(x)) if y is None else {"sum": self.body(x) + y, "rest": None}


def test_an_output_without_a_tensor_has_no_backward_pass_to_count() -> None:
    x = torch.ones(2, 4)
    model = GrowableModel(Wrapped(), {"late": "body"}, x)
    assert count_flops(model, x) == {"host": 64, "late": 0}
    with pytest.raises(TypeError, match="the output must hold a tensor to go back from, got Box"):
        count_flops(model, x, backward=True)
    assert count_flops(model, (x, x), backward=True) == count_flops(model, {"y": x, "x": x}, backward=True)
    assert count_flops(model, (x, x), backward=True) == {"host": 128, "late": 0}


def test_an_example_that_wants_a_gradient_gets_none_and_costs_none() -> None:
    case = HostCase("NC")
    model, plain = sown(case, Stage.HOLDING), case.example()
    wants = plain.clone().requires_grad_()
    assert count_flops(model, wants, backward=True) == count_flops(model, plain, backward=True)
    assert wants.grad is None and wants.requires_grad


# -- what the counter sees --------------------------------------------------------------------------------------------


def test_attention_is_counted_in_training_and_in_evaluation() -> None:
    """Width 8, hidden 16, two samples of three tokens: four maps of a token, and two products for each pair of tokens."""
    host = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    example = torch.ones(2, 3, 8)
    model = GrowableModel(host, {"late": "linear2"}, example)
    expected = 2 * 6 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 4 * 2 * 3 * 3 * 8
    assert count_flops(model.eval(), example)["host"] == expected
    with flop_counter() as counter:
        host.train()(example)
    assert counter.get_total_flops() == expected
    trained = count_flops(model, example, backward=True)["host"]
    assert expected * 2.5 < trained < expected * 3.2


def test_lstm_layers_are_counted_forward_and_back() -> None:
    lstm, x = nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), torch.ones(2, 3, 4)
    expected = 2 * 2 * 3 * sum(p.numel() for name, p in lstm.named_parameters() if "weight" in name)
    with flop_counter() as counter:
        output = lstm(x)[0]
        assert counter.get_total_flops() == expected
        output.sum().backward()
    assert counter.get_total_flops() == 3 * expected
