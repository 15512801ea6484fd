"""Batches that break the run each time they come: a replay passes over them. Faults that are not the data's are replayed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from morphogen.governor import Action, Governor, GovernorConfig, LevelShiftAccepted, Rollback, StepSkipped
from morphogen.governor.verdicts import WatchState, is_in_bad_window, is_watching_closely
from morphogen.state import TrainingState

CONFIG = GovernorConfig(snapshot_every=20, probation_steps=30)


class Cursor:
    """Where the run is in its data; a part of the run, so that a rewind takes it back."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Replayed:
    """A classifier whose batch at a position is the same each time; those at ``bad`` positions are poison."""

    def __init__(self, kit: Any, bad: range = range(0), factor: float = 1000.0, config: GovernorConfig = CONFIG) -> None:
        self.kit, self.bad, self.factor = kit, bad, factor
        self.model = kit.small_model(batch_norm=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.scheduler = CosineAnnealingLR(self.optimizer, 5000)
        self.cursor = Cursor()
        self.events: list[Any] = []
        self.trained: list[int] = []
        self.centres = 1.5 * torch.randn(5, 10, generator=torch.Generator().manual_seed(7))
        state = TrainingState(self.model, self.optimizer, self.scheduler, extras={"cursor": self.cursor})
        self.governor = Governor(state, config, emit=self.events.append)

    def batch(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance = torch.Generator().manual_seed(1000 + position)
        targets = torch.randint(5, (32,), generator=chance)
        inputs = self.centres[targets] + torch.randn(32, 10, generator=chance)
        if position in self.bad:
            return self.factor * inputs, targets[torch.randperm(32, generator=chance)]
        return inputs, targets

    def step(self, takes_it: bool = True) -> Any:
        position = self.cursor.position
        inputs, targets = self.batch(position)
        self.cursor.position += 1
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        verdict = self.governor.observe(loss)
        if verdict.proceed and takes_it:
            self.trained.append(position)
            self.optimizer.step()
            self.scheduler.step()
        return verdict

    def run_to(self, position: int, most: int, without: tuple[int, ...] = ()) -> None:
        for _ in range(most + 1):
            if self.cursor.position >= position:
                return
            self.step(self.cursor.position not in without)
        raise AssertionError(f"at position {self.cursor.position} after {most} steps")

    def healthy_loss(self) -> float:
        with torch.no_grad():
            losses = [
                functional.cross_entropy(self.model(inputs), targets) for inputs, targets in map(self.batch, range(5000, 5008))
            ]
        return float(torch.stack(losses).mean())

    @property
    def rollbacks(self) -> list[Rollback]:
        return [event for event in self.events if isinstance(event, Rollback)]


@pytest.fixture(scope="module")
def usual_loss(kit: Any) -> float:
    """What a run without bad batches reaches."""
    run = Replayed(kit)
    run.run_to(300, 300)
    assert run.events == []
    return run.healthy_loss()


@pytest.mark.parametrize("factor", [1000.0, 50.0, math.nan])
@pytest.mark.parametrize(("length", "most_rewinds"), [(4, 3), (10, 3), (20, 4)])
def test_a_window_of_bad_batches_is_passed(kit: Any, usual_loss: float, length: int, most_rewinds: int, factor: float) -> None:
    """The loss of chance is 1.6; rates are halved with each rewind after the first, so the rest is learned more slowly."""
    run = Replayed(kit, range(150, 150 + length), factor)
    run.run_to(300, 900)
    assert len(run.rollbacks) <= most_rewinds
    assert run.healthy_loss() < usual_loss + 0.3
    assert run.governor.status == "healthy"
    assert kit.is_finite(kit.contents(run.model, run.optimizer))


def test_from_the_second_rewind_on_bad_batches_are_passed_over_and_said_to_be(kit: Any) -> None:
    run = Replayed(kit, range(150, 160))
    run.run_to(300, 900)
    passed = [event for event in run.events if isinstance(event, StepSkipped) and event.findings[0].detector == "bad_window"]
    assert len(passed) >= 8 and all("not trained on again" in event.reason for event in passed)
    assert len(run.rollbacks) == 2


@pytest.mark.parametrize("skip_window_steps", [0, 16])
def test_without_a_cursor_there_is_nothing_to_pass_over_but_the_run_goes_on(kit: Any, skip_window_steps: int) -> None:
    """Data that flows on is past the bad batches after one rewind."""
    run = Replayed(kit, range(150, 160), config=CONFIG.replace(skip_window_steps=skip_window_steps))
    run.governor = Governor(
        TrainingState(run.model, run.optimizer, run.scheduler),
        CONFIG.replace(skip_window_steps=skip_window_steps),
        emit=run.events.append,
    )
    run.run_to(400, 400)
    assert 1 <= len(run.rollbacks) <= 3 and run.healthy_loss() < 1.0


@pytest.mark.parametrize("fault", ["damaged", "not finite"])
def test_a_fault_that_is_not_the_datas_is_replayed_to_the_bit(kit: Any, fault: str) -> None:
    """But for one batch: a snapshot is taken after its batch was drawn and before its step, which no replay takes."""
    run, healthy = Replayed(kit), Replayed(kit)
    run.run_to(150, 150)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(-4.0 if fault == "damaged" else math.nan)
    run.run_to(300, 900)
    (rollback,) = run.rollbacks
    healthy.run_to(300, 300, without=(rollback.to_step,))
    assert kit.differences(kit.contents(run.model, run.optimizer), kit.contents(healthy.model, healthy.optimizer)) == []
    assert run.trained[-190:] == list(range(110, 300)), "no other batch was left out"


def test_two_faults_far_apart_that_are_not_the_datas_are_both_replayed(kit: Any) -> None:
    run, healthy = Replayed(kit), Replayed(kit)
    at: dict[int, int] = {}
    for position in (150, 320):
        run.run_to(position, 900)
        with torch.no_grad():
            next(run.model.parameters()).fill_(math.nan)
        assert run.step().action is Action.REWIND
        at[position] = run.cursor.position - 1
    run.run_to(450, 900)
    healthy.run_to(450, 450, without=tuple(at.values()))
    assert kit.differences(kit.contents(run.model, run.optimizer), kit.contents(healthy.model, healthy.optimizer)) == []


def test_two_bad_windows_are_each_passed(kit: Any, usual_loss: float) -> None:
    run = Replayed(kit)
    run.bad = [*range(150, 156), *range(300, 306)]
    run.run_to(450, 1500)
    assert len(run.rollbacks) <= 6 and run.healthy_loss() < usual_loss + 0.3


# -- the rule ------------------------------------------------------------------------------------------------------------

WATCH = WatchState(rewinds=2, fault_position=100)


@pytest.mark.parametrize(
    ("position", "inside"), [(83, False), (84, True), (99, True), (100, True), (105, True), (106, False), (0, False)]
)
def test_the_window_reaches_from_before_the_fault_to_an_alarm_window_after_it(position: int, inside: bool) -> None:
    assert is_in_bad_window(dataclasses.replace(WATCH, position=position), GovernorConfig()) is inside
    for rewinds in (0, 1):
        once = dataclasses.replace(WATCH, position=position, rewinds=rewinds)
        assert not is_in_bad_window(once, GovernorConfig()), "the first rewind trains on them again"


def test_there_is_no_window_before_a_fault() -> None:
    assert not is_in_bad_window(dataclasses.replace(WATCH, position=WATCH.fault_position), GovernorConfig(skip_window_steps=0))
    assert not is_in_bad_window(WatchState(rewinds=3), GovernorConfig())


@pytest.mark.parametrize("kind", ["shrink", "noise"])
def test_damage_that_goes_on_while_no_step_is_taken_is_not_taken_for_the_data(kit: Any, kind: str) -> None:
    """Weights are damaged at forty positions, whatever is trained on there; each position does so once."""
    loop = kit.Loop(GovernorConfig(), seed=1)
    hit: set[int] = set()
    position, noise = torch.zeros((), dtype=torch.int64), torch.Generator().manual_seed(1)
    loop.state = TrainingState(loop.model, loop.optimizer, loop.scheduler, extras={"data": loop.data, "position": position})
    loop.governor = Governor(loop.state, GovernorConfig(), emit=loop.events.append)
    while int(position) < 400:
        here = int(position)
        if 200 <= here < 240 and here not in hit:
            hit.add(here)
            with torch.no_grad():
                for parameter in loop.model.parameters():
                    if kind == "shrink":
                        parameter.mul_(0.8)
                    else:
                        parameter.add_(parameter.std() * torch.randn(parameter.shape, generator=noise))
        position.add_(1)
        loop.step()
    assert not any(isinstance(event, LevelShiftAccepted) for event in loop.events)
    assert 2 <= loop.governor.rollbacks <= 4
    usual = kit.Loop(GovernorConfig(), seed=1)
    usual.steps(400)
    sizes = [sum(float(p.detach().square().sum()) for p in run.model.parameters()) ** 0.5 for run in (loop, usual)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.25), "the damage is undone"


def test_every_step_is_judged_before_it_is_taken_where_batches_are_passed_over() -> None:
    inside = dataclasses.replace(WATCH, position=100, since_rewind=40)
    assert is_watching_closely(inside, GovernorConfig(check_every=8))
    assert not is_watching_closely(dataclasses.replace(inside, position=200), GovernorConfig(check_every=8))
