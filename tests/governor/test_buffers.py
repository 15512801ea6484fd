"""Buffers that a forward pass writes: measured against a naive reading, and put back to the bit when the step is not taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from morphogen.governor import Action, GovernorConfig
from morphogen.governor.buffers import BufferCopies

CPU = torch.device("cpu")


def batch(size: int = 8, seed: int = 0, factor: float = 1.0) -> Tensor:
    return factor * torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype is right[name].dtype and left[name].numpy().tobytes() == right[name].numpy().tobytes() for name in left
    )


def naive_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    sizes = {name: float(value.norm()) for name, value in before.items() if value.is_floating_point()}
    return max(float((after[name] - before[name]).norm()) / size if size else 0.0 for name, size in sizes.items())


class Buffered(nn.Module):
    """Batch normalisation, a counter, a mask and a large table."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("hidden", torch.ones(3, dtype=torch.float64), persistent=False)
        self.register_buffer("table", torch.ones(100))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        self.hidden *= 1.5
        self.table += 1.0
        return self.norm(inputs)


@pytest.mark.parametrize("factor", [1.0, 1e6, math.nan, math.inf])
def test_one_forward_pass_is_undone_to_the_bit(factor: float) -> None:
    model = Buffered()
    copies = BufferCopies([model], max_size=50)
    for seed in range(3):
        model(batch(seed=seed))
        copies.look()
    before = buffers_of(model)
    model(batch(factor=factor))
    copies.look()
    copies.put_back()
    table = before.pop("table")
    after = buffers_of(model)
    assert torch.equal(after.pop("table"), table + 1.0), "too large to be watched"
    assert same(after, before) and int(after["norm.num_batches_tracked"]) == 3 and int(after["seen"]) == 24


def test_put_back_can_be_said_twice_and_goes_one_pass_back_only() -> None:
    model = Buffered()
    copies = BufferCopies([model], max_size=50)
    kept = []
    for seed in range(3):
        kept.append(buffers_of(model))
        model(batch(seed=seed))
        copies.look()
    copies.put_back()
    copies.put_back()
    now, wanted = buffers_of(model), kept[-1]
    del now["table"], wanted["table"]
    assert same(now, wanted)
    model(batch(seed=9))
    copies.look()
    copies.put_back()
    now = buffers_of(model)
    del now["table"]
    assert same(now, wanted), "and the pass after it can be undone, too"


def test_the_largest_change_is_that_of_a_naive_reading() -> None:
    model = Buffered()
    copies = BufferCopies([model], max_size=50)
    change = copies.largest_change(CPU)
    assert change is not None and float(change) == 0.0
    model(batch(seed=0))
    copies.look()
    for seed in range(1, 6):
        before = buffers_of(model)
        model(batch(seed=seed, factor=float(seed)))
        copies.look()
        after = buffers_of(model)
        del before["table"], after["table"]
        assert float(copies.largest_change(CPU)) == pytest.approx(naive_change(before, after), rel=1e-6)
    model(batch(factor=math.nan))
    copies.look()
    assert math.isnan(float(copies.largest_change(CPU)))


def test_a_buffer_that_was_zero_has_no_change_to_measure() -> None:
    model = nn.BatchNorm1d(4)
    copies = BufferCopies([model], max_size=50)
    model(batch())
    copies.look()
    assert 0.0 < float(copies.largest_change(CPU)) < 1.0, "of the variance, which was one; the mean was zero"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [0.0, 1.0])
def test_a_buffer_that_is_finite_no_more_has_no_finite_change(before: float, value: float) -> None:
    model = nn.BatchNorm1d(4)
    model.running_mean.fill_(before)
    copies = BufferCopies([model], max_size=50)
    model.running_mean.fill_(value)
    copies.look()
    assert not math.isfinite(float(copies.largest_change(CPU)))


def test_a_mask_of_minus_infinity_that_stays_has_not_changed() -> None:
    module = nn.Module()
    module.register_buffer("mask", torch.triu(torch.full((4, 4), -math.inf), diagonal=1))
    module.register_buffer("level", torch.ones(2))
    copies = BufferCopies([module], max_size=50)
    module.level *= 1.5
    copies.look()
    assert float(copies.largest_change(CPU)) == pytest.approx(0.5)


def test_integers_alone_have_no_change_and_are_put_back() -> None:
    module = nn.Module()
    module.register_buffer("count", torch.tensor(7))
    copies = BufferCopies([module], max_size=50)
    assert copies.largest_change(CPU) is None
    module.count += 1
    copies.look()
    assert copies.largest_change(CPU) is None
    copies.put_back()
    assert int(module.count) == 7


def test_replaced_reshaped_new_and_removed_buffers_are_followed() -> None:
    module = nn.Module()
    for name in ("kept", "replaced", "reshaped", "retyped", "removed"):
        module.register_buffer(name, torch.ones(3))
    copies = BufferCopies([module], max_size=50)
    old = module.replaced
    module.replaced = torch.full((3,), 2.0)
    module.reshaped.data = torch.full((5,), 2.0)
    module.retyped.data = torch.full((3,), 2.0, dtype=torch.float64)
    del module.removed
    module.register_buffer("new", torch.full((2,), 2.0))
    module.kept.fill_(2.0)
    copies.look()
    copies.put_back()
    assert torch.equal(module.kept, torch.ones(3)) and torch.equal(old, torch.ones(3))
    for name in ("replaced", "reshaped", "retyped", "new"):
        assert bool((getattr(module, name) == 2.0).all()), f"{name}: there is nothing to go back to"
    for name in ("kept", "replaced", "reshaped", "retyped", "new"):
        getattr(module, name).mul_(3.0)
    copies.look()
    assert float(copies.largest_change(CPU)) == pytest.approx(2.0)
    copies.put_back()
    assert bool((module.kept == 1.0).all())
    assert all(bool((getattr(module, name) == 2.0).all()) for name in ("replaced", "reshaped", "retyped", "new"))


def test_no_buffers_and_empty_or_sparse_ones_are_no_trouble() -> None:
    empty = BufferCopies([nn.Linear(2, 2)], max_size=50)
    empty.look()
    empty.put_back()
    assert empty.largest_change(CPU) is None
    module = nn.Module()
    module.register_buffer("none", None)
    module.register_buffer("empty", torch.zeros(0))
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    copies = BufferCopies([module], max_size=50)
    copies.look()
    copies.put_back()
    assert copies.largest_change(CPU) is None


# -- in a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("check_every", [1, 4])
def test_skipped_batches_leave_no_trace_in_a_run(kit: Any, momentum: float | None, check_every: int) -> None:
    """A cumulative average (momentum None) depends on how many batches were tracked."""
    model = kit.small_model(batch_norm=True)
    model[1].momentum = momentum
    loop = kit.Loop(GovernorConfig(check_every=check_every), model=model)
    loop.steps(83)
    before = loop.contents()
    assert loop.step(inputs=kit.nan).action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []
    assert loop.step(inputs=kit.inf).action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []
    assert all(verdict.proceed for verdict in loop.steps(5))


def test_a_huge_finite_batch_leaves_no_trace_either(kit: Any) -> None:
    """Its loss is a little high at most, and its running variance would spoil every evaluation."""
    loop = kit.Loop(model=kit.small_model(batch_norm=True))
    loop.steps(100)
    before = loop.contents()
    verdict = loop.step(loss=kit.times(1e4), inputs=kit.times(1e4))
    assert verdict.action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []


def test_several_forward_passes_of_one_step_are_undone_together(kit: Any) -> None:
    model = kit.small_model(batch_norm=True)
    loop = kit.Loop(model=model)
    loop.steps(20)
    before = loop.contents()
    loop.optimizer.zero_grad()
    for factor in (1.0, math.nan, 1.0):
        inputs, targets = loop.batch()
        loss = functional.cross_entropy(model(inputs * factor), targets) / 3
        loss.backward()
    assert loop.governor.observe(loss).action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []


def test_what_a_buffer_was_given_after_the_last_look_belongs_to_the_step(kit: Any) -> None:
    """Nothing before the forward pass is undone by a rewind's own restoring: copies start anew from the snapshot."""
    loop = kit.Loop(GovernorConfig(snapshot_every=5, probation_steps=5), model=kit.small_model(batch_norm=True))
    loop.steps(40)
    loop.poison()
    verdict = loop.step()
    assert verdict.action is Action.REWIND
    before = loop.contents()
    assert loop.step(inputs=kit.nan).action is Action.SKIP
    assert kit.differences(loop.contents(), before) == []
