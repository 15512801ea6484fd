"""The end: when rewinds do not help the run stops soon, finite, at a state that proved good, and says what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from morphogen.errors import MorphogenError, TrainingCollapsed
from morphogen.governor import Finding, Governor, GovernorConfig, Rollback
from morphogen.governor.events import Collapsed

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=20)
Fault = Callable[[Any, Any, int], None]


def nan_for_ever(kit: Any, loop: Any, number: int) -> None:
    loop.step(loss=kit.nan)


def nan_gradients_for_ever(kit: Any, loop: Any, number: int) -> None:
    loop.step(gradients=kit.nan)


def weights_damaged_every_eight_steps(kit: Any, loop: Any, number: int) -> None:
    if number % 8 == 0:
        loop.damage(10.0)
    loop.step()


def a_weight_is_nan_every_eight_steps(kit: Any, loop: Any, number: int) -> None:
    if number % 8 == 0:
        loop.poison()
    loop.step()


def a_rate_far_too_high_for_ever(kit: Any, loop: Any, number: int) -> None:
    for group in loop.optimizer.param_groups:
        group["lr"] = 30.0
    loop.step()


FAULTS: tuple[Fault, ...] = (
    nan_for_ever,
    nan_gradients_for_ever,
    weights_damaged_every_eight_steps,
    a_weight_is_nan_every_eight_steps,
    a_rate_far_too_high_for_ever,
)


def until_collapse(kit: Any, loop: Any, fault: Fault, most: int = 600) -> TrainingCollapsed:
    with pytest.raises(TrainingCollapsed) as caught:
        for number in range(most):
            fault(kit, loop, number)
    return caught.value


def oldest_good(loop: Any) -> Any:
    return loop.governor._keeper.ring.good[0]


def test_a_fault_that_never_ends_may_be_given_up_after_a_single_rewind(kit: Any) -> None:
    for fault in FAULTS:
        loop = kit.Loop(CONFIG.replace(max_rewinds=1))
        loop.steps(100)
        until_collapse(kit, loop, fault)
        assert loop.governor.rollbacks == len(loop.rollbacks) == 1


@pytest.mark.parametrize("max_rewinds", [4])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_never_ends_is_given_up_after_the_rewinds_that_are_allowed(
    kit: Any, fault: Fault, max_rewinds: int
) -> None:
    loop = kit.Loop(CONFIG.replace(max_rewinds=max_rewinds))
    loop.steps(100)
    until_collapse(kit, loop, fault)
    assert loop.governor.rollbacks == len(loop.rollbacks) == max_rewinds
    assert [event.count for event in loop.rollbacks] == list(range(1, max_rewinds + 1))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_is_left_finite_at_the_oldest_good_snapshot(kit: Any, fault: Fault) -> None:
    loop = kit.Loop(CONFIG)
    contents: dict[int, Any] = {}
    original = loop.governor._keeper.take

    def take(step: int, *rest: Any) -> None:
        contents[step] = loop.contents()
        original(step, *rest)

    loop.governor._keeper.take = take
    loop.steps(100)
    until_collapse(kit, loop, fault)
    collapsed = loop.events[-1]
    assert isinstance(collapsed, Collapsed)
    oldest = oldest_good(loop)
    assert collapsed.to_step == oldest.step > 0
    at_end, then = loop.contents(), contents[oldest.step]
    assert kit.is_finite(at_end)
    rates = [name for name in then if "rates" in name]
    assert kit.differences(at_end, then) == rates, "all but the lowered rates"
    factor = loop.rollbacks[-1].learning_rate_factor
    assert at_end[rates[0]] == pytest.approx([factor * rate for rate in then[rates[0]]])
    loop.state.verify()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_holds_the_evidence(kit: Any, fault: Fault) -> None:
    loop = kit.Loop(CONFIG)
    loop.steps(100)
    error = until_collapse(kit, loop, fault)
    assert isinstance(error, MorphogenError) and error.findings
    assert all(isinstance(finding, Finding) and finding.message in str(error) for finding in error.findings)
    collapsed = [event for event in loop.events if isinstance(event, Collapsed)]
    assert len(collapsed) == 1 and collapsed[0] is loop.events[-1]
    assert collapsed[0].findings == error.findings and collapsed[0].reason == error.findings[0].message
    assert collapsed[0].rewinds == loop.governor.rollbacks == 4
    assert f"snapshot of step {collapsed[0].to_step}" in str(error) and "4 rewinds" in str(error)
    assert 1 <= str(error).count("\n  step ") <= 10
    assert error.report is not None and error.findings[0].message in str(error.report)


def test_a_collapse_before_any_snapshot_proved_good_ends_where_the_run_began(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    start = loop.contents()
    until_collapse(kit, loop, nan_for_ever)
    assert loop.events[-1].to_step == 0 == oldest_good(loop).step
    end = loop.contents()
    assert [name for name in kit.differences(end, start) if "rates" not in name] == []


@pytest.mark.parametrize("check_every", [3, 8])
def test_it_ends_where_steps_are_judged_late_too(kit: Any, check_every: int) -> None:
    for fault in (nan_for_ever, a_weight_is_nan_every_eight_steps):
        loop = kit.Loop(CONFIG.replace(check_every=check_every))
        loop.steps(96)
        until_collapse(kit, loop, fault)
        assert loop.governor.rollbacks == 4 and kit.is_finite(loop.contents())


def test_a_collapse_at_the_end_of_a_run_is_said_by_flush(kit: Any) -> None:
    loop = kit.Loop(CONFIG.replace(check_every=8, max_rewinds=1))
    loop.steps(96)
    loop.poison()
    while not loop.rollbacks:
        loop.step()
    while loop.step().proceed and loop.governor._pending == []:
        pass
    loop.step(gradients=kit.nan)
    loop.step()
    with pytest.raises(TrainingCollapsed):
        loop.governor.flush()
    assert kit.is_finite(loop.contents())


def test_who_goes_on_after_a_collapse_has_a_run_that_trains(kit: Any) -> None:
    """A trainer of policies ends the episode and starts the next one from there."""
    loop = kit.Loop(CONFIG)
    loop.steps(100)
    until_collapse(kit, loop, a_weight_is_nan_every_eight_steps)
    governor = Governor(loop.state, CONFIG)
    loop.governor = governor
    assert all(verdict.proceed for verdict in loop.steps(60)) and governor.rollbacks == 0


def test_faults_that_are_got_over_never_add_up_to_a_collapse(kit: Any) -> None:
    loop = kit.Loop(CONFIG)
    for _ in range(7):
        loop.steps(80)
        loop.poison()
        loop.step()
    assert loop.governor.rollbacks == 7 and {event.count for event in loop.rollbacks} == {1}


def test_an_error_of_the_listener_at_the_end_does_not_hide_a_finite_run(kit: Any) -> None:
    """Events go out after the run was put back."""
    loop = kit.Loop(CONFIG)
    loop.steps(60)

    def refuse(event: Any) -> None:
        if isinstance(event, (Rollback, Collapsed)):
            raise OSError("disk full")

    loop.governor._emit_event = refuse
    loop.poison()
    with pytest.raises(OSError, match="disk full"):
        loop.step()
    assert kit.is_finite(loop.contents())
    loop.governor._emit_event = loop.events.append
    assert all(verdict.proceed for verdict in loop.steps(20))


def test_the_oldest_snapshot_is_left_even_if_no_rewind_may_reach_it(kit: Any) -> None:
    loop = kit.Loop(CONFIG.replace(max_rewinds=1, generations=4))
    loop.steps(150)
    oldest = oldest_good(loop).step
    until_collapse(kit, loop, nan_for_ever)
    assert loop.rollbacks[0].to_step > loop.events[-1].to_step == oldest == oldest_good(loop).step
