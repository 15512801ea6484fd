"""Gradient checkpointing around blocks that hold growth points: the gradients are those without it, in every stage."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from morphogen.growth import GrowableModel, GrowthPoint, Stage
from morphogen.growth.lifecycle import ACTING
from morphogen.state import draw_from
from morphogen.testing import LENIENT, lead_to

INPUTS = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(2))
POINTS = {"early": "first", "late": "second.mix"}


class Block(nn.Module):
    """A transformer's MLP block, with a growth point in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mix(self.norm(x)).relu())


class Stack(nn.Module):
    """Two blocks between a stem and a head; ``run`` runs each block."""

    def __init__(self) -> None:
        super().__init__()
        with draw_from(torch.Generator().manual_seed(0)):
            self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.first, self.second = Block(8), Block(8)
        self.run: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.second, self.run(self.first, self.stem(x))))


def grown(stage: Stage, operator: Any = "gate") -> GrowableModel:
    points = {name: GrowthPoint(path, layout="NLC") for name, path in POINTS.items()}
    model = GrowableModel(Stack(), points, INPUTS, config=LENIENT)
    for slot in POINTS:
        model.germinate(slot, "mlp", operator=operator)
        lead_to(model, slot, stage, INPUTS)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def trained(module: nn.Module, autocast: bool = False) -> list[Tensor | None]:
    """The output and every gradient of one pass, dropout drawn alike each time."""
    with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(4)
        output = module(INPUTS)
        output.float().square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradients_are_those_without_checkpointing(kit: Any, live_stage: Stage, reentrant: bool, autocast: bool) -> None:
    plain = grown(live_stage)
    model = copy.deepcopy(plain)
    model.host.run = functools.partial(checkpoint, use_reentrant=reentrant)
    assert kit.same(trained(model, autocast), trained(plain, autocast))
    if live_stage is not Stage.GERMINATED:
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.slots.parameters())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("operator", ["add", "scale", "gate"])
def test_a_checkpointed_host_in_incubation_is_the_bare_one(kit: Any, operator: str, reentrant: bool) -> None:
    model, bare = grown(Stage.TRAINING, operator), Stack()
    for host in (model.host, bare):
        host.run = functools.partial(checkpoint, use_reentrant=reentrant)
    ours, theirs = trained(model), trained(bare)
    assert kit.same(ours[: len(theirs)], theirs)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_stage_that_changes_between_forward_and_backward_is_the_callers_error(reentrant: bool) -> None:
    """What is run again must be what was run: torch sees that other tensors were saved, where it can."""
    model = grown(Stage.HOLDING)
    model.host.run = functools.partial(checkpoint, use_reentrant=reentrant)
    loss = model(INPUTS).square().mean()
    model.prune("early")
    if reentrant:
        loss.backward()
    else:
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_transformers_model_with_its_own_switch(kit: Any, reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=11, n_positions=16, use_cache=False)
    with draw_from(torch.Generator().manual_seed(0)):
        bare = transformers.GPT2LMHeadModel(config)
    tokens = torch.arange(12).reshape(2, 6) % 11

    def passed(module: nn.Module) -> list[Tensor | None]:
        module.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            output = module(input_ids=tokens, labels=tokens)
            output.loss.backward()
        return [output.logits.detach(), *(parameter.grad for parameter in module.parameters())]

    for stage in (Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED):
        points = {f"at_{index}": GrowthPoint(f"transformer.h.{index}.mlp", layout="NLC") for index in range(2)}
        model = GrowableModel(copy.deepcopy(bare), points, {"input_ids": tokens}, config=LENIENT)
        for slot in points:
            model.germinate(slot, "low_rank")
            while model.stages()[slot] is not stage:
                passed(model)
                onward(model, slot)
        with torch.no_grad():
            for parameter in model.slots.parameters():
                parameter.fill_(0.05)
        plain = passed(model)
        model.host.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = passed(model)
        assert kit.same(found, plain)
        if stage not in ACTING:
            twin = copy.deepcopy(bare)
            twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert kit.same(found[: len(list(twin.parameters())) + 1], passed(twin))


def onward(model: GrowableModel, slot: str) -> None:
    """One step on its way, with gradients at hand: measure, and move on or tick."""
    model.sense()
    stage = model.stages()[slot]
    if model.slot(slot).state.ramp is not None:
        model.tick()
    elif stage is Stage.HOLDING:
        model.record_contribution(slot, 1.0, 0.0)
        assert model.fossilize(slot).passed
    else:
        assert model.advance(slot).passed
