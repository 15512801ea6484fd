"""A non-finite loss or gradient is stopped before the step; nothing that was trained changes by a bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from morphogen.errors import StateMismatch, TrainingCollapsed
from morphogen.governor import Action, Governor, GovernorConfig, StepSkipped
from morphogen.state import TrainingState

FAULTS: dict[str, dict[str, Any]] = {
    "nan loss": {"loss": lambda loss: loss * math.nan},
    "inf loss": {"loss": lambda loss: loss + math.inf},
    "-inf loss": {"loss": lambda loss: loss - math.inf},
    "nan gradients": {"gradients": lambda gradient: gradient * math.nan},
    "one nan in one gradient": {"gradients": lambda gradient: gradient.clone().index_fill_(0, torch.tensor([0]), math.nan)},
    "inf gradients": {"gradients": lambda gradient: torch.full_like(gradient, math.inf)},
    "one -inf in one gradient": {"gradients": lambda gradient: gradient.clone().index_fill_(0, torch.tensor([0]), -math.inf)},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw_single", "rmsprop", "adagrad"])
@pytest.mark.parametrize("at", [0, 30])
def test_the_step_is_stopped_and_nothing_trained_changes(kit: Any, fault: str, optimizer: str, at: int) -> None:
    loop = kit.Loop(optimizer=optimizer)
    assert all(verdict.proceed for verdict in loop.steps(at))
    before = loop.contents()
    verdict = loop.step(**FAULTS[fault])
    assert verdict.action is Action.SKIP and not verdict.proceed
    assert verdict.findings[0].detector == "non_finite" and verdict.findings[0].non_finite
    assert kit.differences(loop.contents(), before) == []
    assert [type(event) for event in loop.events] == [StepSkipped]
    assert loop.events[0].step == at and ("loss" in verdict.reason) == ("loss" in fault)
    assert loop.governor.skipped_steps == 1 and loop.governor.rollbacks == 0
    assert loop.step().proceed and kit.is_finite(loop.contents())


@pytest.mark.parametrize("at", [0, 30])
def test_a_damaged_weight_is_rewound_at_once(kit: Any, at: int) -> None:
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(at)
    loop.poison()
    verdict = loop.step()
    assert verdict.action is Action.REWIND and verdict.rollback is loop.rollbacks[0]
    assert kit.is_finite(loop.contents())
    assert all(parameter.grad is None for parameter in loop.model.parameters())
    assert all(verdict.proceed for verdict in loop.steps(30)) and kit.is_finite(loop.contents())


@pytest.mark.parametrize("at", [0, 30])
def test_batch_norm_buffers_poisoned_by_the_forward_are_put_back_with_the_step(kit: Any, at: int) -> None:
    """A skipped step is as if the batch had never been: buffers too."""
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(at)
    before = loop.contents()
    assert loop.step(inputs=kit.nan).action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []
    assert all(verdict.proceed for verdict in loop.steps(30)) and kit.is_finite(loop.contents())


def test_a_nan_batch_without_batch_norm_costs_one_step(kit: Any) -> None:
    loop, twin = kit.Loop(), kit.Loop()
    loop.steps(30), twin.steps(30)
    loop.step(inputs=kit.nan), twin.observe()
    loop.steps(10), twin.steps(10)
    assert kit.differences(loop.contents(), twin.contents()) == []


def test_a_spike_that_never_was_learned_does_not_blind_the_detectors(kit: Any) -> None:
    loop, twin = kit.Loop(), kit.Loop()
    loop.steps(60), twin.steps(60)
    loop.step(loss=kit.nan), twin.observe(loss=kit.nan)
    for _ in range(20):
        for run in (loop, twin):
            run.step()
    assert [v.action for v in loop.verdicts] == [v.action for v in twin.verdicts]
    assert loop.step(loss=lambda loss: loss + 1e4).action is Action.SKIP


def test_nan_for_ever_ends_in_a_collapse_with_a_report(kit: Any) -> None:
    config = GovernorConfig(max_rewinds=3)
    loop = kit.Loop(config)
    loop.steps(10)
    with pytest.raises(TrainingCollapsed, match="training collapsed: loss is nan") as caught:
        loop.steps(100, loss=kit.nan)
    assert [rollback.count for rollback in loop.rollbacks] == [1, 2, 3]
    at_most = (3 + 4 + 5 + 6) + 2 * (4 * config.skip_window_steps + config.alarm_window_steps)
    assert len(loop.verdicts) < 10 + at_most, "one more alarm is asked for after each rewind, and bad windows are passed over"
    report = str(caught.value)
    assert "3 rewinds" in report and "non_finite: loss is nan" in report and "Lower the learning rate" in report


def test_a_mask_of_minus_infinity_is_not_a_fault(kit: Any) -> None:
    """Attention masks and best-so-far values live in buffers and are not finite by design."""

    class Masked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*kit.small_model(batch_norm=True))
            self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    loop = kit.Loop(model=Masked(), extras={"best_loss": torch.tensor(math.inf)})
    loop.steps(80)
    assert loop.governor.status == "healthy"
    assert loop.step(loss=kit.nan).action is Action.SKIP, "a mask must not look like a damaged state"
    loop.poison()
    verdict = loop.step()
    assert verdict.rollback is not None and verdict.rollback.to_step > 0, "snapshots with a mask must become good"
    assert kit.is_finite({**loop.contents(), "mask": torch.zeros(1)})


def test_a_buffer_that_was_finite_is_not_excused(kit: Any) -> None:
    """Running statistics poisoned without a trace in the loss are found and put back at once."""
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(90)
    before = loop.contents()
    with torch.no_grad():
        loop.model[1].running_var.fill_(math.inf)
    verdict = loop.step()
    assert verdict.action is Action.SKIP and "buffer" in verdict.reason
    assert kit.differences(loop.contents(), before) == []


def test_a_large_buffer_that_was_finite_is_found_before_its_snapshot_is_trusted(kit: Any) -> None:
    model = kit.small_model()
    model.register_buffer("table", torch.zeros(70_000))
    loop = kit.Loop(model=model)
    loop.steps(90)
    model.table[3] = math.inf
    verdict = loop.steps_until("rewind", 120)
    assert "table" in verdict.reason and verdict.findings[0].detector == "snapshot"
    assert kit.is_finite(loop.contents())


@pytest.mark.parametrize("where", ["parameter", "moment"])
def test_a_run_that_is_not_finite_cannot_be_watched(kit: Any, where: str) -> None:
    loop = kit.Loop()
    loop.steps(3)
    if where == "parameter":
        loop.model[0].bias.data[3] = math.nan
    else:
        loop.optimizer.state[loop.model[0].bias]["exp_avg_sq"][3] = math.inf
    with pytest.raises(StateMismatch, match=r"must be finite when a governor starts(.|\n)*0\.bias"):
        Governor(loop.state)


@pytest.mark.parametrize("wrong", ["loss", "grad_norm"])
def test_what_is_not_one_number_is_refused_by_name(kit: Any, wrong: str) -> None:
    loop = kit.Loop()
    given = {"loss": torch.tensor(1.0), "grad_norm": 1.0, wrong: torch.ones(4)}
    with pytest.raises(ValueError, match=rf"`{wrong}` must be one number, got a tensor of shape \(4,\)"):
        loop.governor.observe(**given)
    assert loop.governor.observe(torch.ones(1)).proceed


def test_given_and_computed_gradient_norms_agree(kit: Any) -> None:
    loop = kit.Loop()
    loop.observe()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in loop.model.parameters()))
    seen: list[float | None] = []

    class Watcher:
        name = "watcher"

        def inspect(self, observation: Any) -> None:
            seen.append(observation.grad_norm)

        def accept(self, observation: Any) -> None: ...
        def forget(self) -> None: ...
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    governor = Governor(loop.state, detectors=[Watcher()])
    governor.observe(1.0)
    governor.observe(1.0, grad_norm=torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1e9))
    governor.observe(1.0, grad_norm=2.5)
    loop.optimizer.zero_grad()
    governor.observe(1.0)
    assert seen[0] == pytest.approx(expected, rel=1e-6) and seen[1] == pytest.approx(expected, rel=1e-6)
    assert seen[2:] == [2.5, None]


def test_sparse_and_half_precision_gradients_have_a_norm() -> None:
    """A float16 sum overflows at 65504, which is no fault of the gradients."""
    table = nn.Embedding(8, 4, sparse=True)
    half = nn.Linear(64, 64, bias=False).to(torch.float16)
    optimizers = {
        "table": torch.optim.SGD(table.parameters(), lr=0.1),
        "half": torch.optim.SGD(half.parameters(), lr=0.1),
    }
    governor = Governor(TrainingState({"table": table, "half": half}, optimizers))
    table(torch.tensor([1, 1, 5])).sum().backward()
    half.weight.grad = torch.full_like(half.weight, 5e4)
    with_half = governor.observe(1.0)
    assert with_half.proceed, with_half.reason
    half.weight.grad = None
    assert governor.observe(1.0).proceed
    table.weight.grad = table.weight.grad * math.nan
    assert governor.observe(1.0).action is Action.SKIP


class ScaledLoop:
    """A loop with a gradient scaler, as torch's documentation writes it, and a governor in it."""

    def __init__(self, kit: Any, initial_scale: float, unscale: bool = True, **config: Any) -> None:
        self.loop = kit.Loop()
        self.unscale = unscale
        self.scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale, growth_interval=1000)
        model, optimizer = self.loop.model, self.loop.optimizer
        self.state = TrainingState(model, optimizer, scaler=self.scaler)
        self.governor = Governor(self.state, GovernorConfig(**config))

    def step(self, fault: Any = None) -> Action:
        loop = self.loop
        inputs, targets = loop.batch()
        loop.optimizer.zero_grad()
        loss = 1000 * nn.functional.cross_entropy(loop.model(inputs), targets)
        self.scaler.scale(loss).backward()
        if self.unscale:
            self.scaler.unscale_(loop.optimizer)
        if fault is not None:
            loss = fault(loss)
        verdict = self.governor.observe(loss)
        if verdict.proceed:
            self.scaler.step(loop.optimizer)
            self.scaler.update()
        return verdict.action


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("check_every", [1, 4])
def test_a_scaler_that_looks_for_its_scale_is_left_to_find_it(kit: Any, unscale: bool, check_every: int) -> None:
    """Overflow at too large a scale is no fault: skipped as torch would, no rewind, and the scale comes down."""
    run = ScaledLoop(kit, 2.0**127, unscale=unscale, check_every=check_every)
    actions = [run.step() for _ in range(80)]
    assert Action.REWIND not in actions and run.governor.rollbacks == 0
    if unscale:  # else a float32 norm of scaled gradients overflows down to a scale of 2^60
        assert actions[-8:] == [Action.PROCEED] * 8
    assert run.scaler.get_scale() < 2.0**120 and run.governor.skipped_steps >= 2
    assert kit.is_finite(run.loop.contents())


@pytest.mark.parametrize("unscale", [True, False])
def test_a_fault_under_a_scaler_is_stopped_and_the_loop_goes_on(kit: Any, unscale: bool) -> None:
    run = ScaledLoop(kit, 1024.0, unscale=unscale)
    assert [run.step() for _ in range(5)] == [Action.PROCEED] * 5
    before = run.loop.contents()
    assert run.step(kit.nan) is Action.SKIP
    assert kit.differences(run.loop.contents(), before) == []
    assert run.step() is Action.PROCEED
    actions = [run.step(kit.nan) for _ in range(2)]
    assert actions == [Action.SKIP, Action.REWIND]
    assert [run.step() for _ in range(5)] == [Action.PROCEED] * 5


def test_gradients_that_are_never_finite_under_a_scaler_end_in_a_collapse(kit: Any) -> None:
    """Torch would halve the scale to zero without a word."""
    run = ScaledLoop(kit, 65536.0, max_rewinds=2)

    def poison(loss: Any) -> Any:
        run.loop.model[0].weight.grad.fill_(math.nan)
        return loss

    with pytest.raises(TrainingCollapsed, match="gradient norm is"):
        for _ in range(200):
            run.step(poison)
    assert run.governor.rollbacks == 2


def test_a_disabled_or_unused_scaler_changes_nothing(kit: Any) -> None:
    loop = kit.Loop()
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")):
        governor = Governor(TrainingState(loop.model, loop.optimizer, loop.scheduler, scaler))
        before = copy.deepcopy(scaler.state_dict())
        assert governor.observe(math.nan).action is Action.SKIP
        assert scaler.state_dict() == before
