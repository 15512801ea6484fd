"""Populations as a whole: who takes over whom, what goes wrong and what becomes of it, in one process and in several."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest

from morphogen.pbt import FunctionMember, PBTConfig, PopulationLost, PopulationResult, PopulationTrainer
from morphogen.pbt.engines.processes import ProcessesEngine
from morphogen.pbt.events import MemberExploited, MemberLost, MemberReported
from morphogen.telemetry.events import Event
from morphogen.testing.engine_members import plain_member, troubled_member

Settings = Callable[..., PBTConfig]
PROCESSES = {"num_workers": 2}


def with_trouble(**troubles: str) -> Any:
    """Return a factory whose members have trouble, by ``m<place>=<what>``."""
    return functools.partial(troubled_member, troubles={int(name[1:]): trouble for name, trouble in troubles.items()})


def intervals_of(result: PopulationResult, member: int) -> list[int]:
    return [report.interval for report in result.reports if report.member == member]


def test_everybody_trains_to_the_end_and_the_worst_take_over_the_best(settings: Settings) -> None:
    config, events = settings(), list[Event]()
    result = PopulationTrainer(troubled_member, config, emit=events.append).run()
    assert result.finished
    for member in range(5):
        assert intervals_of(result, member) == [1, 2, 3, 4]
    assert len(result.exploits) == 3  # one of five, after three of four intervals
    scores = {(report.member, report.interval): report.score for report in result.reports}
    for exploit in result.exploits:
        now = [scores[member, exploit.interval] for member in range(5)]
        assert scores[exploit.source, exploit.interval] == max(now) and scores[exploit.member, exploit.interval] == min(now)
        assert exploit.score_after == scores[exploit.member, exploit.interval + 1]
        assert exploit.reason == "worse" and exploit.source != exploit.member
    last = {member: scores[member, 4] for member in range(5)}
    assert result.best == max(last, key=last.__getitem__) and result.score == last[result.best]
    assert sum(isinstance(event, MemberReported) for event in events) == 20
    assert [event.member for event in events if isinstance(event, MemberExploited)] == [e.member for e in result.exploits]


def test_hyperparameters_recorded_are_those_that_earned_the_score(settings: Settings) -> None:
    result = PopulationTrainer(troubled_member, settings()).run()
    taken = {(exploit.member, exploit.interval): exploit for exploit in result.exploits}
    used = {(report.member, report.interval): report.hyperparameters for report in result.reports}
    for (member, interval), values in used.items():
        before = taken.get((member, interval - 1))
        assert values == (used[member, interval - 1] if before is None and interval > 1 else values)
        if before is not None:
            assert values == before.hyperparameters != before.hyperparameters_before
            moved = {name for name in values if values[name] != used[before.source, interval - 1][name]}
            assert moved <= before.moves.keys()


def test_processes_and_threads_change_no_number(settings: Settings, facts_of: Any) -> None:
    config = settings()
    here = PopulationTrainer(troubled_member, config).run()
    there = PopulationTrainer(troubled_member, config, "processes", options=PROCESSES).run()
    assert facts_of(there) == facts_of(here)
    other = PopulationTrainer(troubled_member, config.replace(seed=4)).run()
    assert facts_of(other) != facts_of(here)


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_on_their_own_everybody_trains_to_the_end_too(settings: Settings, engine: str) -> None:
    config = settings(synchronous=False, ready_fraction=1.0)
    result = PopulationTrainer(troubled_member, config, engine).run()
    for member in range(5):
        assert intervals_of(result, member) == [1, 2, 3, 4]
    assert all(exploit.reason == "worse" for exploit in result.exploits)
    if engine == "inline":
        assert result.exploits


@pytest.mark.parametrize(
    ("trouble", "engine"),
    [*((trouble, "inline") for trouble in ("raises", "is NaN", "not born", "ignores")), ("raises", "processes")],
)
def test_a_member_that_fails_is_replaced_within_an_interval_and_never_a_source(
    settings: Settings, engine: str, trouble: str
) -> None:
    events = list[Event]()
    result = PopulationTrainer(with_trouble(m2=trouble), settings(), engine, emit=events.append).run()
    assert result.finished and math.isfinite(result.score)
    failed = [report.interval for report in result.reports if report.member == 2 and not math.isfinite(report.score)]
    assert failed
    replaced = {exploit.interval: exploit for exploit in result.exploits if exploit.member == 2}
    if trouble in ("raises", "is NaN"):
        assert failed == [3] and replaced[3].reason == ("lost" if trouble == "raises" else "not finite")
        assert math.isfinite(next(r.score for r in result.reports if (r.member, r.interval) == (2, 4)))
    assert not any(exploit.source == 2 and exploit.interval in failed for exploit in result.exploits)
    if trouble != "is NaN":
        words = {"raises": "this one is broken", "not born": "is not born", "ignores": "must be"}[trouble]
        lost = [event for event in events if isinstance(event, MemberLost)]
        assert lost and all(event.member == 2 and words in event.problem for event in lost[:1])


def test_a_process_that_dies_is_replaced_and_the_others_go_on(settings: Settings) -> None:
    result = PopulationTrainer(with_trouble(m2="dies"), settings(), "processes", options=PROCESSES).run()
    assert result.finished
    died = [report for report in result.reports if "died" in report.problem]
    assert {report.interval for report in died} == {3} and 2 in {report.member for report in died}
    assert all(math.isfinite(report.score) for report in result.reports if report.interval == 4)


@pytest.mark.slow  # on every engine it is checked by the conformance suite, and the clock below
def test_a_member_that_hangs_past_the_deadline_is_given_up(settings: Settings) -> None:
    config = settings(straggler_deadline=2.0)
    result = PopulationTrainer(with_trouble(m2="hangs"), config, "processes", options=PROCESSES).run()
    assert result.finished
    late = [report for report in result.reports if "was not back after 2 s" in report.problem]
    assert 2 in {report.member for report in late} and {report.interval for report in late} == {3}
    assert all(math.isfinite(report.score) for report in result.reports if report.interval == 4)


def test_the_deadline_is_of_the_clock_that_was_given(settings: Settings) -> None:
    asked = iter(range(10**9))  # an hour passes at each glance
    config, factory = settings(straggler_deadline=86_400.0), with_trouble(m2="hangs")
    trainer = PopulationTrainer(factory, config, "processes", options=PROCESSES, clock=lambda: 3600.0 * next(asked))
    result = trainer.run()
    assert result.finished
    late = [report for report in result.reports if "was not back after 86400 s" in report.problem]
    assert 2 in {report.member for report in late}


def test_nobody_left_is_an_error_that_says_why(settings: Settings) -> None:
    everybody = {f"m{member}": "raises" for member in range(5)}
    with pytest.raises(PopulationLost, match="no member is left .*this one is broken"):
        PopulationTrainer(with_trouble(**everybody), settings()).run()


def test_equal_scores_never_lead_to_anything(settings: Settings) -> None:
    def flat(hyperparameters: Any, state: Any, report: Any) -> None:
        while True:
            report(1.0)

    config = settings(total_steps=200, perturbation_interval=1)
    result = PopulationTrainer(lambda *_: FunctionMember(flat), config).run()
    assert result.exploits == () and len(result.reports) == 1000


def test_what_members_cannot_do_is_said_before_they_train(settings: Settings) -> None:
    config = settings(optimizer_exploit_strategy="rescale")
    with pytest.raises(ValueError, match="`optimizer_exploit_strategy` must be reset or copy .* got 'rescale'"):
        PopulationTrainer(plain_member, config).run()
    four_methods = PopulationTrainer(plain_member, settings(optimizer_exploit_strategy="reset")).run()
    assert four_methods.finished and four_methods.exploits


def test_a_deadline_is_refused_where_nobody_can_be_ended(settings: Settings) -> None:
    with pytest.raises(ValueError, match='`straggler_deadline` must be left out with the engine "inline"'):
        PopulationTrainer(troubled_member, settings(straggler_deadline=1.0))


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("proceses", {}, "Did you mean 'processes'"),
        ("inline", {"num_workers": 2}, "`options` must be those of the engine 'inline'"),
        ("processes", {"num_workers": 0}, "`num_workers` must be at least 1"),
    ],
)
def test_engines_that_cannot_be_made_are_refused(settings: Settings, engine: str, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PopulationTrainer(troubled_member, settings(), engine, options=options)


def test_a_factory_that_no_worker_could_import_is_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match="`member_factory` must be importable"):
        PopulationTrainer(lambda *_: plain_member(0, {}, 0), settings(), "processes").run()


def test_an_engine_of_ones_own_can_be_given(settings: Settings) -> None:
    engine = ProcessesEngine(troubled_member, "score", num_workers=1)
    result = PopulationTrainer(troubled_member, settings(total_steps=4, perturbation_interval=2), engine).run()
    assert result.finished and engine.process_ids == []  # and it was closed


def test_a_run_that_is_stopped_says_so(settings: Settings) -> None:
    trainer: PopulationTrainer

    def stop_after_six(event: Event) -> None:
        if isinstance(event, MemberReported) and (event.member, event.interval) == (0, 2):
            trainer.stop()

    trainer = PopulationTrainer(troubled_member, settings(), emit=stop_after_six)
    result = trainer.run()
    assert not result.finished and result.parameters is None and max(r.interval for r in result.reports) == 2
