"""Loops of other shapes: optimizers that need a closure, gradient accumulation, gradient scalers, a check at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from morphogen.governor import Action, Governor, GovernorConfig
from morphogen.state import TrainingState

CLOSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4),
    "lbfgs with a line search": lambda parameters: torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe"),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}


pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


class ClosedRun:
    """Regression on one batch by an optimizer with a closure, which counts how often it is evaluated."""

    def __init__(self, kit: Any, optimizer: str, **config: Any) -> None:
        self.kit = kit
        self.model = kit.small_model()
        self.optimizer = CLOSED[optimizer](self.model.parameters())
        self.inputs = torch.randn(32, 10, generator=torch.Generator().manual_seed(4))
        self.evaluations = 0
        self.fault: Callable[[Tensor], Tensor] = lambda loss: loss
        self.governor = Governor(TrainingState(self.model, self.optimizer), GovernorConfig(**config))

    def closure(self) -> Tensor:
        self.evaluations += 1
        self.optimizer.zero_grad()
        loss = self.fault(functional.mse_loss(self.model(self.inputs), self.inputs[:, :5].sin()))
        loss.backward()
        return loss

    def contents(self) -> dict[str, Any]:
        found = self.kit.contents(self.model)
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"{number} {key}": copy.deepcopy(value) for key, value in state.items() if not isinstance(value, list)}
            for key in (key for key, value in state.items() if isinstance(value, list)):
                found |= {f"{number} {key} {index}": copy.deepcopy(value) for index, value in enumerate(state[key])}
        return found


@pytest.mark.parametrize("optimizer", CLOSED)
def test_a_healthy_run_is_the_plain_loop_to_the_bit(kit: Any, optimizer: str) -> None:
    governed, plain = ClosedRun(kit, optimizer), ClosedRun(kit, optimizer)
    for _ in range(12):
        assert governed.governor.step(governed.closure).proceed
        plain.optimizer.step(plain.closure)
        assert kit.differences(governed.contents(), plain.contents()) == []
    assert governed.evaluations == plain.evaluations


def test_the_graph_is_cut_before_the_loss_becomes_a_float(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[bool] = []
    original = Tensor.__float__
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: graphs.append(tensor.requires_grad) or original(tensor))
    run = ClosedRun(kit, "lbfgs")
    run.governor.step(run.closure)
    assert not any(graphs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", CLOSED)
@pytest.mark.parametrize("at", [0, 5])
def test_a_fault_in_the_closure_changes_neither_parameters_nor_state(kit: Any, optimizer: str, at: int, value: float) -> None:
    run = ClosedRun(kit, optimizer)
    for _ in range(at):
        run.governor.step(run.closure)
    before, evaluations = run.contents(), run.evaluations
    healthy, run.fault = run.fault, lambda loss: loss * value
    verdict = run.governor.step(run.closure)
    assert verdict.action is Action.SKIP and run.evaluations == evaluations + 1
    assert kit.differences(run.contents(), before) == []
    run.fault = healthy
    assert all(run.governor.step(run.closure).proceed for _ in range(3))


def test_a_closure_works_where_gradients_are_off_around_it(kit: Any) -> None:
    run = ClosedRun(kit, "lbfgs")
    with torch.no_grad():
        assert run.governor.step(run.closure).proceed
    assert run.evaluations > 1


def test_a_rewind_restores_the_history_of_lbfgs(kit: Any) -> None:
    run = ClosedRun(kit, "lbfgs", snapshot_every=5, probation_steps=5)
    at: list[Any] = []
    for _ in range(21):
        at.append(run.contents())
        run.governor.step(run.closure)
    with torch.no_grad():
        run.model[0].weight[0, 0] = math.nan
    verdict = run.governor.step(run.closure)
    assert verdict.rollback is not None
    assert kit.differences(run.contents(), at[verdict.rollback.to_step]) == []
    for step in range(verdict.rollback.to_step, 20):
        assert run.governor.step(run.closure).proceed
        assert kit.differences(run.contents(), at[step + 1]) == []


def test_the_named_optimizer_of_several_is_stepped_and_numbers_are_the_callers(kit: Any) -> None:
    model = kit.small_model()
    optimizers = {
        "body": torch.optim.SGD(model[0].parameters(), lr=0.1),
        "head": torch.optim.SGD(model[2].parameters(), lr=0.1),
    }
    governor = Governor(TrainingState(model, optimizers))
    before = kit.contents(model)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(torch.ones(4, 10)).square().mean()
        loss.backward()
        return loss

    assert governor.step(closure, optimizer="head", step=70).step == 70
    assert set(kit.differences(kit.contents(model), before)) == {"2.weight", "2.bias"}


# -- gradient accumulation ----------------------------------------------------------------------------------------------


class Accumulating:
    """Four micro-batches for each step of the optimizer, and one observation."""

    def __init__(self, kit: Any, config: GovernorConfig | None = None, batch_norm: bool = False) -> None:
        self.loop = kit.Loop(config, model=kit.small_model(batch_norm=batch_norm))

    def step(self, faulty: int | None = None, times: float = math.nan) -> Any:
        loop = self.loop
        loop.optimizer.zero_grad()
        total = torch.zeros(())
        for number in range(4):
            inputs, targets = loop.batch()
            loss = functional.cross_entropy(loop.model(inputs * (times if number == faulty else 1.0)), targets) / 4
            loss.backward()
            total += loss.detach()
        verdict = loop.governor.observe(total)
        if verdict.proceed:
            loop.optimizer.step()
            loop.scheduler.step()
        return verdict


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("faulty", range(4))
@pytest.mark.parametrize("at", [0, 10])
def test_one_bad_micro_batch_stops_the_whole_step(kit: Any, faulty: int, at: int, batch_norm: bool) -> None:
    run = Accumulating(kit, batch_norm=batch_norm)
    for _ in range(at):
        assert run.step().proceed
    before = run.loop.contents()
    assert run.step(faulty).action is Action.SKIP
    assert kit.differences(run.loop.contents(), before) == []
    assert run.step().proceed and run.loop.governor.skipped_steps == 1


def test_an_accumulated_run_is_healthy(kit: Any) -> None:
    run = Accumulating(kit, GovernorConfig(snapshot_every=10, probation_steps=20))
    assert all(run.step().proceed for _ in range(150))
    assert run.loop.governor.status == "healthy" and run.loop.events == []


def test_a_rewind_in_the_middle_of_accumulation_leaves_no_gradient_behind(kit: Any) -> None:
    run = Accumulating(kit)
    for _ in range(10):
        run.step()
    run.loop.poison()
    assert run.step().action is Action.REWIND
    assert all(parameter.grad is None for parameter in run.loop.model.parameters())
    assert run.step().proceed


# -- gradient scalers ---------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    """A model of which part is computed in float16, so that scaled gradients overflow as they do on an accelerator."""

    def __init__(self, kit: Any) -> None:
        super().__init__()
        self.inside = kit.small_model()

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return self.inside(inputs).float()


@pytest.mark.parametrize("check_every", [1, 4])
def test_overflows_of_half_precision_are_routine(kit: Any, check_every: int) -> None:
    model = Halved(kit)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=20)
    events: list[Any] = []
    governor = Governor(
        TrainingState(model, optimizer, scaler=scaler), GovernorConfig(check_every=check_every), emit=events.append
    )
    loop, overflows = kit.Loop(), 0
    for _ in range(120):
        inputs, targets = loop.batch()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflowed = any(not bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        before = kit.contents(model, optimizer)
        verdict = governor.observe(loss)
        if verdict.proceed:
            scaler.step(optimizer)
            scaler.update()
        if overflowed:
            overflows += 1
            assert kit.differences(kit.contents(model, optimizer), before) == []
    assert overflows >= 4 and governor.rollbacks == 0 and governor.status == "healthy"
    if check_every == 1:
        assert governor.skipped_steps == overflows == len(events)
    assert kit.is_finite(kit.contents(model, optimizer)) and 1.0 < scaler.get_scale() < 2.0**22


# -- the end of a run ---------------------------------------------------------------------------------------------------

LATE = GovernorConfig(check_every=8, snapshot_every=10, probation_steps=20)


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_fault_in_the_last_steps_is_found_by_flush(kit: Any, late: int) -> None:
    loop = kit.Loop(LATE)
    loop.steps(8 * 10 + 3 - late)
    assert loop.step(gradients=kit.nan).proceed
    assert all(verdict.proceed for verdict in loop.steps(late - 1))
    assert not kit.is_finite(loop.contents())
    verdict = loop.governor.flush()
    assert verdict.action is Action.REWIND and verdict.rollback.from_step == 8 * 10 + 3 - late
    assert kit.is_finite(loop.contents()) and len(loop.rollbacks) == 1
    assert loop.governor.flush().proceed, "there is nothing more to judge"
    assert all(verdict.proceed for verdict in loop.steps(30))


def test_flush_says_nothing_about_a_healthy_run_and_changes_nothing(kit: Any) -> None:
    loop, free = kit.Loop(LATE), kit.Loop(LATE)
    for number in range(50):
        loop.step()
        free.step()
        if number % 3 == 0:
            assert loop.governor.flush().proceed
    assert kit.differences(loop.contents(), free.contents()) == []
    assert kit.Loop(LATE).governor.flush().proceed, "nothing was observed yet"


def test_flush_with_a_finite_spike_that_was_taken_rewinds(kit: Any) -> None:
    loop = kit.Loop(LATE)
    loop.steps(107)
    loop.step(loss=kit.times(1e4))
    verdict = loop.governor.flush()
    assert verdict.action is Action.REWIND and verdict.rollback.from_step == 107
