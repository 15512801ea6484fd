"""Rewinds: to a good generation, further back each time, with a lower learning rate, and not for ever."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from morphogen.errors import TrainingCollapsed
from morphogen.governor import Finding, Governor, GovernorConfig, LevelShiftAccepted, Rollback, StepSkipped
from morphogen.state import TrainingState

SOON = GovernorConfig(snapshot_every=10, probation_steps=20)


def run_to_two_generations(kit: Any, config: GovernorConfig = SOON, steps: int = 115, **options: Any) -> Any:
    """A healthy run, by default with good snapshots of steps 69 and 89, and its contents at each step."""
    loop = kit.Loop(config, **options)
    loop.at = {}
    for step in range(steps):
        verdict = loop.observe()
        assert verdict.proceed, verdict.reason
        loop.at[step] = loop.contents()
        loop.optimizer.step()
        loop.scheduler.step()
    return loop


def test_damaged_weights_are_found_within_steps_and_rewound_to_the_newest_good_generation(kit: Any) -> None:
    loop = run_to_two_generations(kit)
    identities = [id(parameter) for parameter in loop.model.parameters()]
    loop.damage()
    verdict = loop.steps_until("rewind", 6)
    assert verdict.rollback is not None and verdict.rollback.to_step == 89
    assert kit.differences(loop.contents(), loop.at[89]) == [], "weights, moments and rates must be those of the snapshot"
    assert identities == [id(parameter) for parameter in loop.model.parameters()]
    assert all(verdict.proceed for verdict in loop.steps(40)) and loop.governor.rollbacks == 1


def test_the_rewound_run_goes_on_as_one_that_was_never_damaged(kit: Any) -> None:
    """Weights, moments, schedule, generators and the data stream come back together: the replay is exact."""
    loop = run_to_two_generations(kit, model=kit.small_model(dropout=0.2))
    chance = torch.get_rng_state()
    loop.damage()
    loop.steps_until("rewind", 6)
    torch.set_rng_state(chance)
    state, twin_model = loop.state.capture(), copy.deepcopy(loop.model)
    twin = kit.Loop(SOON, model=twin_model)
    twin.state.restore(state)
    torch.set_rng_state(chance)
    loop.steps(30)
    torch.set_rng_state(chance)
    twin.steps(30)
    assert kit.differences(loop.contents(), twin.contents()) == []


def test_a_snapshot_survives_any_number_of_rewinds_to_the_bit(kit: Any) -> None:
    """The published bug: moments shared with the snapshot are corrupt after the first step that follows a rewind."""
    loop = run_to_two_generations(kit, GovernorConfig(snapshot_every=1000, probation_steps=20, max_rewinds=10))
    first = None
    for _ in range(3):
        loop.damage()
        loop.steps_until("rewind", 6)
        now = loop.contents()
        now = {name: value for name, value in now.items() if "rates" not in name}
        first = first or now
        assert kit.differences(now, first) == []
        loop.steps(80)


def test_one_event_for_each_rewind_and_complete(kit: Any) -> None:
    loop = run_to_two_generations(kit, SOON.replace(penalty=2.5))
    loop.damage()
    verdict = loop.steps_until("rewind", 6)
    (rollback,) = loop.rollbacks
    assert verdict.rollback is rollback and verdict.findings == rollback.findings
    assert [type(event) for event in loop.events] == [Rollback], "an update out of all proportion is no fault of the batch"
    fields = {field.name: getattr(rollback, field.name) for field in dataclasses.fields(rollback)}
    assert fields == {
        "step": 115,
        "reason": rollback.findings[0].message,
        "findings": verdict.findings,
        "from_step": 115,
        "to_step": 89,
        "parts": ("extras", "generators", "model", "optimizer", "scheduler"),
        "optimizer_strategy": "restore",
        "learning_rate_factor": 1.0,
        "penalty": 2.5,
        "count": 1,
    }
    assert isinstance(rollback.findings[0], Finding) and rollback.findings[0].threshold is not None


def test_the_callers_own_step_numbers_are_used_throughout(kit: Any) -> None:
    loop = kit.Loop(SOON)
    for step in range(1000, 1080):
        loop.step(step=step)
    loop.damage()
    verdicts = [loop.step(step=5000 + number) for number in range(3)]
    assert [verdict.step for verdict in verdicts] == [5000, 5001, 5002]
    assert verdicts[0].rollback is not None and 1000 < verdicts[0].rollback.to_step < 1080
    assert verdicts[0].rollback.from_step == 5000


def test_repeats_go_further_back_with_a_lower_rate_and_end_in_a_collapse(kit: Any) -> None:
    """Whatever it does, the fault comes back a few steps later."""
    loop = run_to_two_generations(kit, SOON.replace(max_rewinds=3))
    rates: list[float] = []
    with pytest.raises(TrainingCollapsed) as caught:
        for _ in range(200):
            loop.steps(8)
            loop.damage()
            loop.steps_until("rewind", 6)
            rates.append(loop.optimizer.param_groups[0]["lr"])
    assert [rollback.to_step for rollback in loop.rollbacks] == [89, 69, 69]
    assert [rollback.count for rollback in loop.rollbacks] == [1, 2, 3]
    assert [rollback.learning_rate_factor for rollback in loop.rollbacks] == [1.0, 0.5, 0.25]
    at = {step: loop.at[step]["0 rates"][0] for step in (69, 89)}
    assert rates == pytest.approx([at[89], 0.5 * at[69], 0.25 * at[69]], rel=1e-6)
    assert "3 rewinds" in str(caught.value) and "exceeds" in str(caught.value)
    assert loop.governor.rollbacks == 3


def test_penalties_of_the_rate_do_not_pile_up_where_rates_are_not_put_back(kit: Any) -> None:
    loop = run_to_two_generations(kit, SOON.replace(optimizer="reset"))
    before = loop.optimizer.param_groups[0]["lr"]
    for _ in range(3):
        loop.damage()
        loop.steps_until("rewind", 6)
        loop.steps(2)
    assert [rollback.learning_rate_factor for rollback in loop.rollbacks] == [1.0, 0.5, 0.5]
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(before / 4, rel=0.01)


def test_a_fault_that_always_comes_at_the_same_place_ends_too(kit: Any) -> None:
    """Snapshots taken and proved good *before* that place are no progress, however long the run was clean there."""
    cursor = torch.zeros(1)
    loop = kit.Loop(SOON, extras={"cursor": cursor})
    with pytest.raises(TrainingCollapsed):
        for _ in range(1000):
            if int(cursor) == 90:
                loop.damage()
            if loop.step().proceed:
                cursor += 1
    assert len(loop.rollbacks) == SOON.max_rewinds
    assert loop.rollbacks[0].count == 1 and loop.rollbacks[-1].count == SOON.max_rewinds


def test_faults_far_apart_are_each_a_first_one(kit: Any) -> None:
    loop = kit.Loop(SOON)
    for _ in range(6):
        loop.steps(90)
        assert loop.governor.status == "healthy"
        loop.damage()
        loop.steps_until("rewind", 6)
        assert loop.governor.status == "recovering"
    assert [rollback.count for rollback in loop.rollbacks] == [1] * 6


def test_a_fault_that_comes_back_after_a_level_shift_was_accepted_is_not_forgiven_for_ever(kit: Any) -> None:
    """A rewind to an early state shows an early loss: neither that nor its acceptance may feed an endless loop."""
    config = GovernorConfig(snapshot_every=1000, probation_steps=20)
    loop = kit.Loop(config)
    with pytest.raises(TrainingCollapsed):
        for _ in range(60):
            loop.steps(100)
            loop.steps_until("rewind", 100, loss=kit.nan)
    assert len(loop.rollbacks) == config.max_rewinds
    assert not any(isinstance(event, LevelShiftAccepted) for event in loop.events)


@pytest.mark.parametrize("factor", [8.0, 50.0])
def test_a_level_that_a_good_state_shows_too_is_accepted_on_record(kit: Any, factor: float) -> None:
    loop = run_to_two_generations(kit, steps=300, batch_size=256)
    verdicts = loop.steps(60, loss=kit.times(factor))
    shifts = [event for event in loop.events if isinstance(event, LevelShiftAccepted)]
    assert len(shifts) == 1 and shifts[0].findings[0].detector == "explosion"
    assert [rollback.count for rollback in loop.rollbacks] == [1] and loop.rollbacks[0].learning_rate_factor == 1.0
    assert all(verdict.proceed for verdict in verdicts[-40:])
    loop.steps(100, loss=kit.times(factor))
    assert loop.governor.status == "healthy" and len(loop.rollbacks) == 1


@pytest.mark.parametrize("batch_size", [16, 256])
@pytest.mark.parametrize("factor", [1.5, 2.5, 4.0])
def test_a_shift_near_the_limits_never_stops_training(kit: Any, factor: float, batch_size: int) -> None:
    """Some observations alarm and some do not: a few are skipped, a rewind or two, and training goes on."""
    loop = run_to_two_generations(kit, GovernorConfig(), steps=300, batch_size=batch_size)
    loop.steps(200, loss=kit.times(factor))
    assert len(loop.rollbacks) <= 2 and loop.governor.skipped_steps <= 20
    assert all(verdict.proceed for verdict in loop.verdicts[-50:])


def test_spikes_that_never_end_are_not_skipped_for_ever(kit: Any) -> None:
    """Every second batch 100 times as large: skipped, then rewound, then accepted as what the data is like now."""
    loop = run_to_two_generations(kit, steps=300, batch_size=256)
    for number in range(200):
        loop.step(loss=kit.times(100.0 if number % 2 else 1.0))
    assert [type(event) for event in loop.events if not isinstance(event, StepSkipped)] == [Rollback, LevelShiftAccepted]
    assert loop.governor.skipped_steps <= 40 and loop.governor.status == "healthy"


def test_a_loss_that_explodes_anew_from_a_good_state_is_no_level_shift(kit: Any) -> None:
    """A learning rate that ruins the weights in a step or two: the first loss after each rewind is fine."""
    loop = run_to_two_generations(kit, optimizer="sgd")
    with pytest.raises(TrainingCollapsed):
        for _ in range(200):
            if loop.observe().proceed:
                for group in loop.optimizer.param_groups:
                    group["lr"] = 1e4
                loop.optimizer.step()
    assert not any(isinstance(event, LevelShiftAccepted) for event in loop.events)
    assert len(loop.rollbacks) == SOON.max_rewinds


# -- strategies -----------------------------------------------------------------------------------------------------


def moments(loop: Any, key: str) -> list[torch.Tensor]:
    return [values[key] for values in loop.optimizer.state.values() if key in values]


def test_auto_restores_moments(kit: Any) -> None:
    loop = run_to_two_generations(kit, SOON.replace(optimizer="auto"))
    loop.damage()
    assert loop.steps_until("rewind", 6).rollback.optimizer_strategy == "restore"
    assert kit.differences(loop.contents(), loop.at[89]) == []


def test_reset_forgets_moments_and_says_what_was_not_put_back(kit: Any) -> None:
    loop = run_to_two_generations(kit, SOON.replace(optimizer="reset"))
    loop.damage()
    rollback = loop.steps_until("rewind", 6).rollback
    assert rollback.optimizer_strategy == "reset" and rollback.parts == ("extras", "generators", "model")
    assert not loop.optimizer.state
    weights = {name: value for name, value in loop.at[89].items() if not name.startswith("0 ")}
    assert kit.differences({**loop.contents(), "0 rates": None}, {**weights, "0 rates": None}) == []


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop", "adagrad"])
def test_zero_momentum_clears_first_moments_alone(kit: Any, optimizer: str) -> None:
    loop = run_to_two_generations(kit, SOON.replace(optimizer="zero_momentum"), optimizer=optimizer)
    loop.damage()
    rollback = loop.steps_until("rewind", 6).rollback
    assert rollback.optimizer_strategy == "zero_momentum"
    after = loop.contents()
    assert all(not moment.any() for key in ("exp_avg", "momentum_buffer") for moment in moments(loop, key))
    assert all(bool(moment.any()) for key in ("exp_avg_sq", "square_avg", "sum") for moment in moments(loop, key))
    first = {name for name in after if name.endswith(("exp_avg", "momentum_buffer"))}
    assert set(kit.differences(after, loop.at[89])) <= first, "all else is as in the snapshot"


def test_zero_momentum_is_safe_where_a_live_second_moment_is_poisoned(kit: Any) -> None:
    """Second moments come from the snapshot, so what went wrong with the live ones does not matter."""
    loop = run_to_two_generations(kit, SOON.replace(optimizer="zero_momentum"))
    loop.damage()
    moments(loop, "exp_avg_sq")[-1][0] = math.inf
    assert loop.steps_until("rewind", 6).rollback.optimizer_strategy == "zero_momentum"
    assert kit.is_finite(loop.contents())
    loop.state.verify()


def test_each_group_can_have_its_own_strategy(kit: Any) -> None:
    model = kit.small_model()
    loop = kit.Loop(model=model)
    optimizer = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-4}], lr=3e-3)
    state = TrainingState(model, optimizer)
    governor = Governor(state, SOON.replace(optimizer={"group0": "zero_momentum", "group1": "reset"}))
    for _ in range(80):
        batch, targets = loop.batch()
        optimizer.zero_grad()
        value = functional.cross_entropy(model(batch), targets)
        value.backward()
        assert governor.observe(value).proceed
        optimizer.step()
    loop.poison()
    rollback = governor.observe(model(batch).sum()).rollback
    assert rollback is not None and rollback.optimizer_strategy == "group0: zero_momentum, group1: reset"
    assert all(not optimizer.state[parameter] for parameter in model[2].parameters())
    for parameter in model[0].parameters():
        assert not optimizer.state[parameter]["exp_avg"].any() and optimizer.state[parameter]["exp_avg_sq"].any()
    with pytest.raises(ValueError, match="`owner` must be one of group0, group1, got 'head'"):
        Governor(state, SOON.replace(optimizer={"head": "reset"}))


def test_the_first_update_after_each_strategy_is_bounded(kit: Any) -> None:
    """Restore as the healthy run, reset at most one learning rate, zero_momentum at most a tenth of one (Adam)."""
    moved: dict[str, float] = {}
    for strategy in ("restore", "reset", "zero_momentum"):
        loop = run_to_two_generations(kit, SOON.replace(optimizer=strategy))
        loop.damage()
        loop.steps_until("rewind", 6)
        before = [parameter.detach().clone() for parameter in loop.model.parameters()]
        rate = loop.optimizer.param_groups[0]["lr"]
        assert loop.step().proceed
        pairs = zip(before, loop.model.parameters(), strict=True)
        moved[strategy] = max(float((now - old).detach().abs().max()) for old, now in pairs) / rate
    assert moved["reset"] == pytest.approx(1.0, abs=0.01)
    assert moved["zero_momentum"] < 0.5 * moved["restore"] < 1.0, moved


def test_learning_rate_penalties_outlive_the_schedule(kit: Any) -> None:
    loop = run_to_two_generations(kit)
    for _ in range(2):
        loop.damage()
        loop.steps_until("rewind", 6)
        loop.steps(2)
    rate = loop.optimizer.param_groups[0]["lr"]
    loop.steps(30)
    healthy = kit.Loop(SOON)
    assert rate == pytest.approx(0.5 * healthy.optimizer.param_groups[0]["lr"], rel=0.01)
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=0.01), "the schedule must not undo it"


def test_a_fault_in_an_extra_comes_back_with_the_rest(kit: Any) -> None:
    """Recurrent state and averages are parts of the run, in extras."""
    average = copy.deepcopy(kit.small_model())
    hidden = torch.ones(3)
    loop = kit.Loop(SOON, extras={"average": average, "hidden": hidden})
    loop.steps(75)
    loop.damage()
    with torch.no_grad():
        hidden.fill_(math.nan)
        average[0].weight.fill_(math.nan)
    loop.steps_until("rewind", 6)
    assert torch.equal(hidden, torch.ones(3)) and bool(average[0].weight.isfinite().all())


def test_closures_of_the_loop_see_the_same_objects(kit: Any) -> None:
    """What a user holds on to (groups, parameters, scheduler) is still what trains after a rewind."""
    loop = run_to_two_generations(kit)
    group, weight = loop.optimizer.param_groups[0], loop.model[0].weight
    storage = weight.data_ptr()
    loop.damage()
    loop.steps_until("rewind", 6)
    assert loop.optimizer.param_groups[0] is group and loop.model[0].weight is weight and weight.data_ptr() == storage
    assert weight in loop.optimizer.state
    loss = functional.mse_loss(nn.Flatten()(weight), torch.zeros(weight.shape[0], 10))
    loss.backward()
    assert weight.grad is not None


def test_the_batch_of_an_accepted_level_leaves_its_running_statistics(kit: Any) -> None:
    """Its step is taken, so it counts for the statistics as every batch does."""
    loop = kit.Loop(SOON, model=kit.small_model(batch_norm=True), batch_size=256)
    loop.steps(200)
    for _ in range(60):
        before = int(loop.model[1].num_batches_tracked)
        loop.step(loss=kit.times(50.0))
        if any(isinstance(event, LevelShiftAccepted) for event in loop.events):
            break
    assert loop.verdicts[-1].proceed and int(loop.model[1].num_batches_tracked) == before + 1
