"""The structure guard: what would corrupt the next step is stopped before it, and what was meant to change may change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from morphogen.errors import StateMismatch
from morphogen.governor import Action, Governor, GovernorConfig
from morphogen.growth import GrowthConfig, Stage
from morphogen.state import TrainingState
from morphogen.testing import LENIENT, HostCase, lead_to

KERNELS: dict[str, Callable[[Any], Optimizer]] = {
    f"{kind.__name__.lower()}-{kernel}": lambda parameters, kind=kind, kernel=kernel, extra=extra: kind(
        parameters, lr=1e-2, **({"foreach": False} if kernel == "single" else {kernel: True}), **extra
    )
    for kind, extra in ((torch.optim.Adam, {}), (torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}))
    for kernel in ("single", "foreach", "fused")
}


class Run:
    """A model of two layers that was trained for three steps; the optimizer never steps what the guard refused."""

    def __init__(self, kit: Any, kernel: str = "adam-single", model: nn.Module | None = None, **config: Any) -> None:
        self.kit = kit
        self.model = model if model is not None else kit.small_model()
        self.optimizer = KERNELS[kernel](self.model.parameters())
        self.state = TrainingState(self.model, self.optimizer)
        self.governor = Governor(self.state, GovernorConfig(**config))
        self.data = torch.Generator().manual_seed(3)
        for _ in range(3):
            assert self.step().proceed

    def backward(self) -> Tensor:
        self.model.zero_grad()
        inputs = torch.randn(8, 10, generator=self.data, dtype=next(self.model.parameters()).dtype)
        loss = self.model(inputs).square().mean()
        loss.backward()
        return loss.detach()

    def step(self) -> Any:
        verdict = self.governor.observe(self.backward())
        if verdict.proceed:
            self.optimizer.step()
        return verdict

    def problems(self) -> tuple[str, ...]:
        """What the guard says; it must change nothing, and say so again when asked again."""
        before = self.kit.contents(self.model, self.optimizer)
        said: list[tuple[str, ...]] = []
        for _ in range(2):
            with pytest.raises(StateMismatch, match="changed behind the optimizer's back") as caught:
                self.governor.observe(1.0)
            said.append(caught.value.problems)
        assert said[0] == said[1]
        assert self.kit.differences(self.kit.contents(self.model, self.optimizer), before) == []
        return said[0]


@pytest.mark.parametrize("rows", [40, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_parameter_of_another_shape_is_stopped_before_the_step(kit: Any, kernel: str, rows: int) -> None:
    """A fused step would corrupt the heap; the others fail half way."""
    run = Run(kit, kernel)
    run.backward()
    run.model[0].weight.data = torch.zeros(rows, 10)
    keys = ("momentum_buffer",) if kernel.startswith("sgd") else ("exp_avg", "exp_avg_sq")
    lines = tuple(f"misshapen: moment `{key}` of `0.weight` is (16, 10), the parameter ({rows}, 10)" for key in keys)
    assert run.problems() == (*lines, f"misshapen: the gradient of `0.weight` is (16, 10), the parameter ({rows}, 10)")


@pytest.mark.parametrize("kernel", ["adam-fused", "sgd-fused"])
def test_moments_count_without_a_gradient_and_gradients_without_moments(kit: Any, kernel: str) -> None:
    run = Run(kit, kernel)
    weight = run.model[0].weight
    run.backward()
    gradient = weight.grad
    weight.data, weight.grad = torch.zeros(40, 10), None
    assert all("moment" in line for line in run.problems())
    run.optimizer.state.clear()
    assert run.governor.observe(1.0).proceed, "without moments and gradient the optimizer can start on the new shape"
    weight.data, weight.grad = torch.zeros(16, 10), gradient
    weight.data = torch.zeros(40, 10)
    assert run.problems() == ("misshapen: the gradient of `0.weight` is (16, 10), the parameter (40, 10)",)


def test_the_same_number_of_values_in_another_shape_is_noticed(kit: Any) -> None:
    run = Run(kit)
    run.model[0].weight.data = run.model[0].weight.data.T.contiguous()
    assert "misshapen: moment `exp_avg` of `0.weight` is (16, 10), the parameter (10, 16)" in run.problems()


def test_a_checkpoint_that_is_assigned_leaves_orphans(kit: Any) -> None:
    run = Run(kit)
    run.model[0].load_state_dict(copy.deepcopy(run.model[0].state_dict()), assign=True)
    assert run.problems() == (
        "orphaned: the optimizer steps `0.weight`, which is no longer in the model",
        "orphaned: the optimizer steps `0.bias`, which is no longer in the model",
        "untracked: `0.weight` is trainable but in no optimizer",
        "untracked: `0.bias` is trainable but in no optimizer",
    )


def test_a_module_that_was_replaced_leaves_orphans(kit: Any) -> None:
    run = Run(kit)
    run.model[2] = nn.Linear(16, 5)
    assert {line.split("`")[0] + line.split("`")[1] for line in run.problems()} == {
        f"{what}2.{name}" for what in ("orphaned: the optimizer steps ", "untracked: ") for name in ("weight", "bias")
    }


@pytest.mark.parametrize("where", ["own", "in an empty table", "in a new module"])
def test_a_parameter_that_was_added_is_untracked_until_it_is_followed(kit: Any, where: str) -> None:
    run = Run(kit)
    if where == "in a new module":
        run.model[0].add_module("scale", nn.Linear(1, 1))
        names = ["0.scale.weight", "0.scale.bias"]
    else:
        owner = run.model[0] if where == "own" else run.model[1]
        owner.register_parameter("scale", nn.Parameter(torch.ones(1)))
        names = ["0.scale" if where == "own" else "1.scale"]
    assert run.problems() == tuple(f"untracked: `{name}` is trainable but in no optimizer" for name in names)
    run.state.reshape()
    assert all(run.step().proceed for _ in range(3))


@pytest.mark.parametrize("change", ["a parameter more", "a larger parameter"])
def test_a_fault_right_after_a_change_that_was_accepted_is_recovered_from(kit: Any, change: str) -> None:
    run = Run(kit)
    if change == "a parameter more":
        run.model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
        run.state.reshape()
    else:
        weight = run.model[2].weight
        weight.data, weight.grad = torch.cat([weight.data, weight.data[:2]]), None
        run.model[2].bias.data, run.model[2].bias.grad = torch.zeros(7), None
        run.optimizer.state.clear()
    assert all(run.step().proceed for _ in range(3))
    with torch.no_grad():
        run.model[0].weight.fill_(math.nan)
    assert run.step().action is Action.REWIND
    assert kit.is_finite(kit.contents(run.model, run.optimizer))


def test_what_was_added_can_be_removed_again(kit: Any) -> None:
    run = Run(kit)
    run.model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert len(run.problems()) == 1
    del run.model[0].scale
    assert run.step().proceed


def test_a_parameter_that_left_the_model_is_an_orphan(kit: Any) -> None:
    run = Run(kit)
    run.model[2].register_parameter("bias", None)
    assert run.problems() == ("orphaned: the optimizer steps `2.bias`, which is no longer in the model",)
    run.state.reshape()
    assert run.step().proceed and len(run.optimizer.param_groups[0]["params"]) == 3


def test_groups_changed_by_hand(kit: Any) -> None:
    run = Run(kit)
    group = run.optimizer.param_groups[0]
    run.optimizer.param_groups.append({**group, "params": [run.model[0].bias]})
    assert run.problems() == ("duplicated: `0.bias` is stepped 2 times",)
    run.optimizer.param_groups.pop()
    assert run.step().proceed
    left = group["params"].pop()
    assert run.problems() == ("untracked: `2.bias` is trainable but in no optimizer",)
    left.requires_grad_(False)
    assert run.governor.observe(1.0).proceed, "frozen, nobody needs to step it"


def test_a_second_optimizer_for_the_same_parameter(kit: Any) -> None:
    model = kit.small_model()
    optimizers = {"one": torch.optim.SGD(model[0].parameters(), lr=0.1), "two": torch.optim.SGD(model[2].parameters(), lr=0.1)}
    governor = Governor(TrainingState(model, optimizers))
    assert governor.observe(1.0).proceed
    optimizers["two"].add_param_group({"params": [model[0].bias]})
    with pytest.raises(StateMismatch) as caught:
        governor.observe(1.0)
    assert caught.value.problems == ("duplicated: `0.bias` is stepped 2 times",)


def test_the_guard_looks_at_every_step_even_between_checks(kit: Any) -> None:
    run = Run(kit, check_every=8)
    run.model[0].weight.data = torch.zeros(40, 10)
    assert len(run.problems()) == 3


def test_a_closure_is_not_stepped_either(kit: Any) -> None:
    run = Run(kit)

    def closure() -> Tensor:
        loss = run.backward().requires_grad_()
        run.model[0].weight.data = torch.zeros(40, 10)
        return loss

    with pytest.raises(StateMismatch):
        run.governor.step(closure)
    assert not run.model[0].weight.any()


# -- what may change ----------------------------------------------------------------------------------------------------


def test_freezing_and_thawing_what_the_optimizer_holds(kit: Any) -> None:
    run = Run(kit)
    run.model[0].requires_grad_(False)
    assert all(run.step().proceed for _ in range(3))
    run.model[0].requires_grad_(True)
    assert all(run.step().proceed for _ in range(3))


def test_moving_the_whole_model_to_another_precision_before_the_governor(kit: Any) -> None:
    run = Run(kit, model=kit.small_model().double())
    assert run.step().proceed and run.model[0].weight.dtype is torch.float64


def test_buffers_may_come_and_go(kit: Any) -> None:
    run = Run(kit)
    run.model.register_buffer("level", torch.zeros(1))
    assert run.step().proceed
    del run.model.level
    assert run.step().proceed


def test_tied_from_the_start(kit: Any) -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10))
    model[2].weight = model[0].weight
    run = Run(kit, "adam-fused", model)
    run.model[2].weight = nn.Parameter(run.model[0].weight.detach().clone())
    assert run.problems() == ("untracked: `2.weight` is trainable but in no optimizer",)
    run.model[2].weight = run.model[0].weight
    assert run.step().proceed


def test_untracked_from_the_start_is_meant_and_nothing_else_is(kit: Any) -> None:
    model = kit.small_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    governor = Governor(TrainingState(model, optimizer))
    assert governor.observe(1.0).proceed
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(StateMismatch) as caught:
        governor.observe(1.0)
    assert caught.value.problems == ("untracked: `0.scale` is trainable but in no optimizer",)


def test_a_parameter_that_grew_with_its_moments_forgotten_goes_on(kit: Any) -> None:
    run = Run(kit, "adamw-fused")
    weight = run.model[2].weight
    weight.data, weight.grad = torch.zeros(7, 16), None
    run.model[2].bias.data, run.model[2].bias.grad = torch.zeros(7), None
    run.optimizer.state.clear()
    assert all(run.step().proceed for _ in range(3))
    assert run.optimizer.state[weight]["exp_avg"].shape == (7, 16)


class Growing:
    """A growable model under a governor, with a config for its stages."""

    def __init__(self, config: GrowthConfig = LENIENT, kernel: str = "adam-fused") -> None:
        self.case = HostCase("NC")
        self.model = self.case.model(config=config)
        self.optimizer = KERNELS[kernel](self.model.parameters())
        self.state = TrainingState(self.model, self.optimizer)
        self.governor = Governor(self.state)

    def step(self) -> Any:
        self.optimizer.zero_grad()
        loss = self.model(self.case.example(num_samples=16)).square().mean()
        loss.backward()
        verdict = self.governor.observe(loss)
        self.optimizer.step()
        return verdict


@pytest.mark.parametrize("freeze_fossils", [False, True])
def test_a_growing_model_changes_structure_through_its_whole_life(kit: Any, freeze_fossils: bool) -> None:
    run = Growing(LENIENT.replace(freeze_fossils=freeze_fossils))
    host = len(run.optimizer.param_groups[0]["params"])
    stages = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    for slot, blueprint in (("early", "norm"), ("late", "low_rank")):
        run.model.germinate(slot, blueprint)
        for stage in stages:
            lead_to(run.model, slot, stage, run.case.example())
            assert run.step().proceed
    held = sum(len(group["params"]) for group in run.optimizer.param_groups)
    assert (held == host) is freeze_fossils
    for slot in ("early", "late"):
        run.model.excise(slot)
        assert run.step().proceed
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == host


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING])
def test_a_seed_may_be_pruned_between_two_steps_or_between_backward_and_observe(kit: Any, stage: Stage) -> None:
    run = Growing()
    for _ in range(3):
        run.model.germinate("late", "low_rank")
        lead_to(run.model, "late", stage, run.case.example())
        run.step()
        run.model.prune("late")
        assert run.governor.observe(1.0).proceed
        lead_to(run.model, "late", Stage.DORMANT, run.case.example())


def test_a_growing_model_is_guarded_too(kit: Any) -> None:
    run = Growing()
    run.model.germinate("late", "low_rank")
    lead_to(run.model, "late", Stage.TRAINING, run.case.example())
    run.step()
    name, parameter = run.model.owners()["late"][0]
    parameter.data = torch.zeros(*parameter.shape[:-1], 50)
    with pytest.raises(StateMismatch) as caught:
        run.governor.observe(1.0)
    assert any(f"`{name}`" in line and "misshapen: moment" in line for line in caught.value.problems)


def test_a_state_without_optimizer_or_with_one_that_is_empty(kit: Any) -> None:
    model = kit.small_model()
    governor = Governor(TrainingState(model))
    model[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert governor.observe(1.0).proceed, "nobody steps anything"
