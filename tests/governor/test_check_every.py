"""Reading the device every few steps: one transfer, faults found late and rewound, recovery watched step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from morphogen.errors import TrainingCollapsed
from morphogen.governor import Action, Governor, GovernorConfig, LevelShiftAccepted

EVERY_FOUR = GovernorConfig(check_every=4, snapshot_every=10, probation_steps=20)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the calls that make Python wait for a tensor's value."""
    seen: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, name: str = name, original: Any = original) -> Any:
            seen.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    yield seen


@pytest.mark.parametrize("check_every", [1, 4])
def test_values_are_read_once_a_check_and_never_between(kit: Any, reads: list[str], check_every: int) -> None:
    loop = kit.Loop(GovernorConfig(check_every=check_every, snapshot_every=10_000))
    loop.steps(12)  # lazy initialisation of the optimizer
    for number in range(1, 13):
        inputs, targets = loop.batch()
        loop.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(loop.model(inputs), targets)
        loss.backward()
        reads.clear()
        assert loop.governor.observe(loss).proceed
        assert reads == (["tolist"] if number % check_every == 0 else []), number


@pytest.mark.parametrize("late", [0, 1, 2, 3])
def test_a_fault_is_found_at_the_check_and_rewound_if_its_step_was_taken(kit: Any, late: int) -> None:
    loop = kit.Loop(EVERY_FOUR)
    loop.steps(100 - late - 1)
    fault = loop.step(gradients=kit.nan)
    verdicts = [fault, *loop.steps(late)]
    assert [verdict.proceed for verdict in verdicts[:-1]] == [True] * late
    if late:
        assert verdicts[-1].action is Action.REWIND and verdicts[-1].rollback.from_step == 100 - late - 1
    else:
        assert verdicts[-1].action is Action.SKIP
    assert kit.is_finite(loop.contents())
    assert all(verdict.proceed for verdict in loop.steps(40)) and loop.governor.rollbacks == (1 if late else 0)


def test_nothing_is_captured_between_a_fault_and_its_discovery(kit: Any) -> None:
    """Snapshots are taken at checks alone, after everything before them was judged."""
    loop = kit.Loop(EVERY_FOUR.replace(check_every=8))
    for number in range(8):
        loop.steps(100 + number)
        loop.step(gradients=kit.nan)
        loop.steps(16)
        assert kit.is_finite(loop.contents())
        assert all(generation.snapshot.is_finite() for generation in loop.governor._keeper.ring.generations)


def test_a_level_shift_is_accepted_here_too(kit: Any) -> None:
    """After a rewind each step is judged before it is taken, so a good state can show that the data has changed."""
    loop = kit.Loop(EVERY_FOUR, batch_size=256)
    loop.steps(300)
    loop.steps(60, loss=kit.times(30.0))
    assert sum(isinstance(event, LevelShiftAccepted) for event in loop.events) == 1
    assert len(loop.rollbacks) == 1
    assert all(verdict.proceed for verdict in loop.verdicts[-40:])


def test_a_persistent_fault_collapses_here_too(kit: Any) -> None:
    loop = kit.Loop(EVERY_FOUR)
    loop.steps(100)
    with pytest.raises(TrainingCollapsed):
        loop.steps(200, loss=kit.nan)
    assert [rollback.count for rollback in loop.rollbacks] == [1, 2, 3, 4]


def test_every_verdict_has_the_number_of_its_observation(kit: Any) -> None:
    loop = kit.Loop(EVERY_FOUR)
    loop.steps(30)
    loop.step(gradients=kit.nan)
    loop.steps(30)
    assert [verdict.step for verdict in loop.verdicts if verdict.proceed] == [
        number for number, verdict in enumerate(loop.verdicts) if verdict.proceed
    ]
    assert loop.governor._watch.observed + len(loop.governor._pending) == len(loop.verdicts)


@pytest.mark.parametrize("check_every", [1, 3])
def test_verdicts_do_not_depend_on_where_gradients_live(kit: Any, check_every: int) -> None:
    """A float, a tensor, a tensor that requires grad: the same verdicts."""
    actions: list[list[Action]] = []
    values = [1.0] * 100 + [50.0] * 6
    for make in (float, torch.tensor, lambda value: torch.tensor(value, requires_grad=True)):
        loop = kit.Loop()
        governor = Governor(loop.state, GovernorConfig(check_every=check_every))
        actions.append([governor.observe(make(value), grad_norm=make(1.0)).action for value in values])
    assert actions[0] == actions[1] == actions[2] and Action.REWIND in actions[0]
