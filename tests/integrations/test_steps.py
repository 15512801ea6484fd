"""A step that is held back changes nothing, whatever the optimizer and the gradient scaler; one that is not is as ever."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.overrides import _get_current_function_mode_stack

from morphogen.integrations.steps import BackwardWatch, Interception, StepGate

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1, fused=True),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, foreach=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, weight_decay=0.1),
}
SCALERS: dict[str, Callable[[], Any]] = {
    "no_scaler": lambda: None,
    "disabled": lambda: torch.amp.GradScaler("cpu", enabled=False),
    "enabled": lambda: torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3),
}


class Loop:
    def __init__(self, kit: Any, optimizer: str, scaler: str = "no_scaler", gated: bool = True) -> None:
        self.kit, self.model = kit, kit.network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = SCALERS[scaler]()
        self.gate = StepGate(self.optimizer, self.scaler) if gated else None
        self.inputs, self.targets = kit.data(16)

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(self.inputs), self.targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss

    def step(self) -> None:
        self.backward()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def contents(self) -> list[Any]:
        return self.kit.contents(self.model, self.optimizer, *([] if self.scaler is None else [self.scaler]))


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("taken", [0, 4])
def test_a_held_step_changes_nothing(kit: Any, optimizer: str, scaler: str, taken: int) -> None:
    loop = Loop(kit, optimizer, scaler)
    for _ in range(taken):
        loop.step()
    before = loop.contents()
    assert loop.gate is not None
    loop.gate.held = True
    loop.step()
    loop.step()
    assert kit.same(loop.contents(), before)
    loop.gate.held = False
    loop.step()
    assert not kit.same(loop.contents(), before)


@pytest.mark.parametrize("scaler", SCALERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_open_gate_is_not_there(kit: Any, optimizer: str, scaler: str) -> None:
    gated, free = Loop(kit, optimizer, scaler), Loop(kit, optimizer, scaler, gated=False)
    for _ in range(5):
        gated.step()
        free.step()
    assert kit.same(gated.contents(), free.contents())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_runs_first_and_may_hold_the_step(kit: Any, optimizer: str) -> None:
    gated, free = Loop(kit, optimizer), Loop(kit, optimizer, gated=False)
    for loop in (gated, free):
        with torch.no_grad():  # torch's optimizers give gradients to a closure in any case
            losses = [loop.optimizer.step(loop.backward) for _ in range(3)]
        assert losses[2] < losses[0]
    assert kit.same(gated.contents(), free.contents())
    before = gated.contents()

    def closure() -> torch.Tensor:
        loss = gated.backward()
        assert gated.gate is not None
        gated.gate.held = True
        return loss

    assert gated.optimizer.step(closure) is not None
    assert kit.same(gated.contents(), before)
    assert gated.model[0].weight.grad is not None


def test_scaler_goes_on_after_a_held_step_with_no_gradients_left(kit: Any) -> None:
    """As after a rewind: a scaler that is let through would find nothing to unscale and raise."""
    loop = Loop(kit, "adamw", "enabled")
    loop.step()
    loop.backward()
    loop.optimizer.zero_grad()
    assert loop.gate is not None
    loop.gate.held = True
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    loop.gate.held = False
    loop.step()


def test_a_gate_that_is_removed_leaves_nothing(kit: Any) -> None:
    loop = Loop(kit, "sgd", "enabled")
    assert loop.gate is not None
    loop.gate.held = True
    loop.gate.remove()
    loop.gate.remove()
    assert "step" not in vars(loop.optimizer)
    assert not {"step", "update"} & vars(loop.scaler).keys()
    before = loop.contents()
    loop.step()
    assert not kit.same(loop.contents(), before)


@pytest.mark.parametrize("schedule_first", [True, False])
def test_torchs_schedules_know_a_gated_step(kit: Any, schedule_first: bool) -> None:
    """They put a wrapper round ``step`` when they are made, and warn if it is not there at their first step."""
    loop = Loop(kit, "sgd", gated=False)
    schedule = StepLR(loop.optimizer, 1) if schedule_first else None
    gate = StepGate(loop.optimizer)
    schedule = schedule or StepLR(loop.optimizer, 1)
    loop.step()
    schedule.step()
    gate.held = True
    before = loop.contents()
    loop.step()
    assert kit.same(loop.contents(), before)
    gate.remove()
    loop.step()
    assert not kit.same(loop.contents(), before)
    schedule.step()


def test_a_gate_beneath_somebody_elses_wrapper_opens_for_good(kit: Any) -> None:
    loop = Loop(kit, "sgd")
    calls: list[int] = []
    theirs = Interception(loop.optimizer, "step", lambda method, *args: (calls.append(1), method(*args)))
    assert loop.gate is not None
    loop.gate.held = True
    loop.gate.remove()
    before = loop.contents()
    loop.step()
    assert calls and not kit.same(loop.contents(), before)
    theirs.remove()


def test_lbfgs_is_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        StepGate(torch.optim.LBFGS(kit.network().parameters()))


@pytest.mark.parametrize("scaler", SCALERS)
def test_watch_sees_losses_and_the_norm_before_clipping(kit: Any, scaler: str) -> None:
    loop = Loop(kit, "sgd", scaler, gated=False)
    plain = Loop(kit, "sgd", gated=False)
    watch = BackwardWatch(loop.model.parameters(), loop.scaler)
    for _ in range(2):  # two batches of one step, the gradients added up
        loss = functional.cross_entropy(loop.model(loop.inputs), loop.targets)
        watch.open()
        watch.open()
        (loss if loop.scaler is None else loop.scaler.scale(loss)).backward()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3)
        watch.close()
        (0 * loop.model[0].weight.sum()).backward()  # nobody looks
    expected = plain.backward().item()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in plain.model.parameters() if parameter.grad is not None])
    seen = watch.take()
    assert seen is not None
    assert seen[0].item() == pytest.approx(2 * expected)
    assert seen[1].item() == pytest.approx(norm.item(), rel=2e-3)  # the first batch's were clipped to 1e-3
    assert watch.take() is None
    assert not _get_current_function_mode_stack()


def test_watch_changes_no_number(kit: Any) -> None:
    watched, free = Loop(kit, "adam", gated=False), Loop(kit, "adam", gated=False)
    watch = BackwardWatch(watched.model.parameters())
    for _ in range(3):
        watch.open()
        watched.step()
        watch.close()
        free.step()
    assert kit.same(watched.contents(), free.contents())


def test_watch_sees_what_is_not_finite(kit: Any) -> None:
    loop = Loop(kit, "sgd", gated=False)
    loop.inputs[0, 0] = math.nan
    watch = BackwardWatch(loop.model.parameters())
    watch.open()
    loop.backward()
    watch.close()
    seen = watch.take()
    assert seen is not None and all(math.isnan(number) for number in seen)
