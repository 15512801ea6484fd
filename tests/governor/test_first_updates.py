"""The first update after a governed rewind, for the optimizers of torch: as large as that of a healthy run, or bounded."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from morphogen.governor import Action, Governor, GovernorConfig
from morphogen.state import TrainingState, draw_from, surgery

RATE = 1e-2
SOON = GovernorConfig(snapshot_every=10, probation_steps=15)


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer, and the largest first update after a reset, in learning rates; None: that of the gradient."""

    build: Callable[[Any], Optimizer]
    reset: float | None = 1.0 + 1e-3


TABLE: dict[str, Row] = {
    "adam": Row(lambda parameters: torch.optim.Adam(parameters, lr=RATE)),
    "adamw": Row(lambda parameters: torch.optim.AdamW(parameters, lr=RATE), 1.1),  # and the decay
    "amsgrad": Row(lambda parameters: torch.optim.Adam(parameters, lr=RATE, amsgrad=True)),
    "adam-fused": Row(lambda parameters: torch.optim.Adam(parameters, lr=RATE, fused=True)),
    "nadam": Row(lambda parameters: torch.optim.NAdam(parameters, lr=RATE), 1.1),
    "radam": Row(lambda parameters: torch.optim.RAdam(parameters, lr=RATE), None),  # no adaptation in its first steps
    "adamax": Row(lambda parameters: torch.optim.Adamax(parameters, lr=RATE)),
    "rmsprop": Row(lambda parameters: torch.optim.RMSprop(parameters, lr=RATE)),
    "rmsprop-momentum": Row(lambda parameters: torch.optim.RMSprop(parameters, lr=RATE, momentum=0.9)),
    "rmsprop-centered": Row(lambda parameters: torch.optim.RMSprop(parameters, lr=RATE, centered=True)),
    "adagrad": Row(lambda parameters: torch.optim.Adagrad(parameters, lr=RATE)),
    "adadelta": Row(lambda parameters: torch.optim.Adadelta(parameters, lr=RATE)),
    "sgd-momentum": Row(lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9), None),
    "sgd-dampened": Row(lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9, dampening=0.9), None),
    "asgd": Row(lambda parameters: torch.optim.ASGD(parameters, lr=RATE), None),
    "rprop": Row(lambda parameters: torch.optim.Rprop(parameters, lr=RATE)),
    "adafactor": Row(lambda parameters: torch.optim.Adafactor(parameters, lr=RATE)),
    "muon": Row(lambda parameters: torch.optim.Muon(parameters, lr=RATE), 1.1),
}


class Run:
    """Regression with weight matrices alone (Muon takes no others) and data of its own."""

    def __init__(self, name: str, config: GovernorConfig = SOON) -> None:
        with draw_from(torch.Generator().manual_seed(0)):
            self.model = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Tanh(), nn.Linear(16, 5, bias=False))
        self.optimizer = TABLE[name].build(self.model.parameters())
        self.data = torch.Generator().manual_seed(1)
        self.governor = Governor(TrainingState(self.model, self.optimizer, extras={"data": self.data}), config)
        self.at: dict[int, Any] = {}
        self.seen = 0

    def observe(self) -> Any:
        inputs = torch.randn(32, 10, generator=self.data)
        self.optimizer.zero_grad()
        loss = (self.model(inputs) - inputs[:, :5].sin()).square().mean()
        loss.backward()
        return self.governor.observe(loss)

    def step(self) -> Any:
        verdict = self.observe()
        if verdict.proceed:
            self.optimizer.step()
        return verdict

    def update(self) -> list[Tensor]:
        """Take one step and return how each weight moved, in learning rates."""
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        assert self.step().proceed
        pairs = zip(self.model.parameters(), before, strict=True)
        return [(now.detach() - old) / RATE for now, old in pairs]

    def rewind(self) -> int:
        with torch.no_grad():
            next(self.model.parameters()).fill_(math.nan)
        verdict = self.step()
        assert verdict.action is Action.REWIND
        return verdict.rollback.to_step

    def largest_gradient(self) -> float:
        return max(float(parameter.grad.abs().max()) for parameter in self.model.parameters())


def largest(update: list[Tensor]) -> float:
    return max(float(moved.abs().max()) for moved in update)


def trained(name: str, strategy: Any = "auto") -> Run:
    run = Run(name, SOON.replace(optimizer=strategy))
    for _ in range(60):
        assert run.step().proceed
    return run


@pytest.mark.parametrize("name", TABLE)
def test_restored_the_next_updates_are_those_of_a_healthy_twin_to_the_bit(kit: Any, name: str) -> None:
    run, twin = trained(name, "restore"), Run(name)
    to_step = run.rewind()
    assert to_step > 0
    for step in range(60):
        if step == to_step:
            twin.observe()  # drawn, and not stepped: where the snapshot was taken
            break
        assert twin.step().proceed
    for _ in range(5):
        for ours, theirs in zip(run.update(), twin.update(), strict=True):
            assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    assert kit.differences(kit.contents(run.model, run.optimizer), kit.contents(twin.model, twin.optimizer)) == []


@pytest.mark.parametrize("name", TABLE)
def test_reset_the_first_update_is_bounded(kit: Any, name: str) -> None:
    run = trained(name, "reset")
    run.rewind()
    assert not run.optimizer.state
    moved = largest(run.update())
    bound = TABLE[name].reset
    assert 0.0 < moved <= (bound if bound is not None else 1.001 * run.largest_gradient())
    later = [largest(run.update()) for _ in range(5)]
    assert all(math.isfinite(size) for size in later)
    assert kit.is_finite(kit.contents(run.model, run.optimizer))


@pytest.mark.parametrize("name", TABLE)
def test_without_momentum_the_first_update_is_finite_and_no_longer_than_usual(kit: Any, name: str) -> None:
    run = Run(name, SOON.replace(optimizer="zero_momentum"))
    usual = max(largest(run.update()) for _ in range(60))
    run.rewind()
    moved = largest(run.update())
    assert math.isfinite(moved) and moved <= 1.01 * usual
    assert kit.is_finite(kit.contents(run.model, run.optimizer))


# -- RMSprop has no bias correction --------------------------------------------------------------------------------------

RMSPROPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "both": {"momentum": 0.9, "centered": True},
    "single": {"foreach": False, "momentum": 0.5},
    "slow": {"alpha": 0.999},
    "several groups": {},
}


def rmsprop(kind: str) -> tuple[nn.Module, Optimizer]:
    with draw_from(torch.Generator().manual_seed(0)):
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 5))
    parameters: Any = model.parameters()
    if kind == "several groups":
        parameters = [{"params": model[0].parameters(), "momentum": 0.9}, {"params": model[2].parameters(), "centered": True}]
    optimizer = torch.optim.RMSprop(parameters, lr=RATE, **RMSPROPS[kind])
    model(torch.ones(4, 10)).square().mean().backward()
    return model, optimizer


def moved_by_a_step(model: nn.Module, optimizer: Optimizer) -> float:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    return max(float((now.detach() - old).abs().max()) / RATE for now, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", RMSPROPS)
def test_softened_the_first_step_is_one_learning_rate_long_and_ten_without(kind: str) -> None:
    model, optimizer = rmsprop(kind)
    hard_model, hard = copy.deepcopy((model, optimizer))
    for parameter, other in zip(hard_model.parameters(), model.parameters(), strict=True):
        parameter.grad = other.grad.clone()
    assert moved_by_a_step(hard_model, hard) > 9.0
    assert surgery.soften_first_step(optimizer) == 4
    assert 0.9 <= moved_by_a_step(model, optimizer) <= 1.0 + 1e-3
    keys = [set(values) for values in hard.state.values()]
    assert keys == [set(values) for values in optimizer.state.values()], "the state is complete"
    assert all(int(values["step"]) == 1 for values in optimizer.state.values())


def test_only_what_has_a_gradient_and_no_moments_is_softened() -> None:
    model, optimizer = rmsprop("plain")
    optimizer.step()
    kept = {parameter: values["square_avg"].clone() for parameter, values in optimizer.state.items()}
    assert surgery.soften_first_step(optimizer) == 0
    assert all(torch.equal(optimizer.state[parameter]["square_avg"], value) for parameter, value in kept.items())
    surgery.reset_moments(optimizer, model[2].parameters())
    model[2].bias.grad = None
    assert surgery.soften_first_step(optimizer) == 1 and model[2].bias not in optimizer.state


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("rmsprop")])
def test_other_optimizers_are_left_alone(name: str) -> None:
    run = Run(name)
    run.observe()
    before = {id(parameter): dict(values) for parameter, values in run.optimizer.state.items()}
    assert surgery.soften_first_step(run.optimizer) == 0
    assert {id(parameter): dict(values) for parameter, values in run.optimizer.state.items()} == before


def test_the_first_step_is_softened_where_a_fault_comes_between_it_and_the_rewind() -> None:
    """What is skipped after the rewind does not use it up."""
    run = trained("rmsprop", "reset")
    run.rewind()
    run.optimizer.zero_grad()
    assert run.governor.observe(math.nan).action is Action.SKIP
    assert not run.optimizer.state
    assert largest(run.update()) <= 1.0 + 1e-3


def test_an_owner_alone_that_is_reset_is_softened_too() -> None:
    run = trained("rmsprop", {"group0": "reset"})
    run.rewind()
    assert largest(run.update()) <= 1.0 + 1e-3
