"""Decisions hang on config, records and their number alone, and keep to the rules whatever the population is like."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from morphogen.pbt import Decision, MemberRecord, PBTConfig, PBTScheduler

SPACES: dict[str, Any] = {
    "lr": {"kind": "log_float", "low": 1e-4, "high": 1e-1},
    "gamma": {"kind": "logit", "low": 0.9, "high": 0.9999},
    "batch": {"kind": "ordered", "values": [16, 32, 64]},
    "depth": {"kind": "int", "low": 1, "high": 9},
}
METHODS = ("truncation", "binary_tournament", "t_test")


def config(**changes: Any) -> PBTConfig:
    given = {"population_size": 8, "total_steps": 1000, "perturbation_interval": 10, "hyperparameters": SPACES}
    return PBTConfig(**{**given, **changes})


def population(scheduler: PBTScheduler, scores: Sequence[float], **changes: Any) -> list[MemberRecord]:
    return [
        MemberRecord(
            member, score, scheduler.initial(member), **{"step": 50, "scores": (score, score + 0.1, score - 0.1), **changes}
        )
        for member, score in enumerate(scores)
    ]


def rise(scheduler: PBTScheduler) -> list[MemberRecord]:
    return population(scheduler, [float(member) for member in range(scheduler.config.population_size)])


def test_members_start_with_values_of_their_own_that_hang_on_the_seed() -> None:
    first, again, other = PBTScheduler(config(seed=4)), PBTScheduler(config(seed=4)), PBTScheduler(config(seed=5))
    starts = [first.initial(member) for member in range(8)]
    assert starts == [again.initial(member) for member in reversed(range(8))][::-1]
    assert len({start["lr"] for start in starts}) == 8
    assert starts != [other.initial(member) for member in range(8)]
    for start in starts:
        first.config.check_values(start, "start")
        assert {type(value) for value in start.values()} == {float, int}
    with pytest.raises(ValueError, match="`member` must be in"):
        first.initial(8)


def test_what_travels_is_what_earned_the_score_moved_by_a_step_or_drawn_anew() -> None:
    scheduler = PBTScheduler(config(truncation_ratio=0.25))
    records = rise(scheduler)
    anew = 0
    for _ in range(100):
        decisions = scheduler.decide(records)
        assert [decision.member for decision in decisions] == [0, 1]
        for decision in decisions:
            for source in decision.sources:
                earned = records[source.member].hyperparameters
                assert source.score == records[source.member].score and source.step == 50
                assert source.moves.keys() == SPACES.keys() == source.hyperparameters.keys()
                scheduler.config.check_values(dict(source.hyperparameters), "moved")
                anew += [*source.moves.values()].count("resampled")
                if source.moves["lr"] == "perturbed":
                    ratio = source.hyperparameters["lr"] / earned["lr"]
                    assert min(abs(ratio - 1.25), abs(ratio - 0.8)) < 1e-9 or 1e-4 < source.hyperparameters["lr"] < 2e-1
    assert 0.2 < anew / (100 * 2 * len(decisions[0].sources) * 4) < 0.3  # resample_probability


@pytest.mark.parametrize(("method", "moves"), [("perturb", {"perturbed"}), ("resample", {"resampled"}), ("none", set())])
def test_explore_methods(method: Any, moves: set[str]) -> None:
    scheduler = PBTScheduler(config(explore_method=method))
    records = rise(scheduler)
    for source in (source for decision in scheduler.decide(records) for source in decision.sources):
        assert {*source.moves.values()} == moves
        assert (source.hyperparameters == records[source.member].hyperparameters) == (method == "none")


@pytest.mark.parametrize("method", METHODS)
def test_equal_scores_never_lead_to_anything(method: Any) -> None:
    scheduler = PBTScheduler(config(exploit_method=method))
    for interval in range(200):
        score = math.sin(interval)
        assert scheduler.decide(population(scheduler, [score] * 8)) == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_no_number_is_rescued_at_once_and_never_a_source(method: Any, bad: float, mode: Any) -> None:
    scheduler = PBTScheduler(config(exploit_method=method, mode=mode, burn_in=900, min_gap=1e9))
    decisions = scheduler.decide(population(scheduler, [1.0, bad, 3.0, 2.0, bad, 5.0, 7.0, 4.0]))
    assert [(each.member, each.reason, each.is_exploit) for each in decisions] == [(m, "not finite", True) for m in (1, 4)]
    best = 6 if mode == "max" else 0
    for decision in decisions:
        assert decision.sources[0].member == best
        assert {source.member for source in decision.sources} == {0, 2, 3, 5, 6, 7}


def test_the_lost_are_replaced_and_the_dead_and_the_stale_are_no_sources() -> None:
    scheduler = PBTScheduler(config())
    records = population(scheduler, [5.0, 9.0, 8.0, 3.0, 2.0, 1.0, 0.0, 4.0])
    records[1] = MemberRecord(1, 9.0, scheduler.initial(1), is_alive=False)
    records[2] = MemberRecord(2, 8.0, scheduler.initial(2), is_recent=False)
    found = {decision.member: decision for decision in scheduler.decide(records)}
    assert found[1].reason == "lost" and found.keys() == {1, 6}
    for decision in found.values():
        assert decision.sources[0].member == 0 and {1, 2}.isdisjoint(source.member for source in decision.sources)


def test_where_nobody_is_sound_nobody_is_taken_over() -> None:
    scheduler = PBTScheduler(config())
    assert scheduler.decide(population(scheduler, [math.nan] * 8)) == ()


def test_burn_in_gap_and_elite() -> None:
    young = PBTScheduler(config(burn_in=51))
    assert young.decide(rise(young)) == ()
    old = PBTScheduler(config(burn_in=50))
    assert [each.member for each in old.decide(rise(old))] == [0]
    for gap, members in ((6.9, [0]), (7.0, []), (7.1, [])):
        near = PBTScheduler(config(min_gap=gap))
        assert [each.member for each in near.decide(rise(near))] == members
    some = PBTScheduler(config(explore_all=True, elite=3))
    decisions = some.decide(rise(some))
    assert [(each.member, each.reason) for each in decisions] == [(0, "worse"), *((m, "explore") for m in (1, 2, 3, 4))]
    tournament = PBTScheduler(config(exploit_method="binary_tournament", elite=4))
    assert {each.member for _ in range(50) for each in tournament.decide(rise(tournament))} == {0, 1, 2, 3}


def test_who_only_explores_keeps_to_itself() -> None:
    scheduler = PBTScheduler(config(exploit_method="none", explore_method="perturb", explore_all=True))
    records = rise(scheduler)
    decisions = scheduler.decide(records)
    assert [each.member for each in decisions] == list(range(8))
    for decision in decisions:
        (source,) = decision.sources
        assert (source.member, decision.reason, decision.is_exploit) == (decision.member, "explore", False)
        assert source.hyperparameters != decision.hyperparameters == records[decision.member].hyperparameters
    bad = population(scheduler, [math.nan, 1.0])
    assert [each.member for each in scheduler.decide(bad)] == [1]  # the control rescues nobody


def test_only_those_asked_about_are_decided_about_but_all_may_be_sources() -> None:
    scheduler = PBTScheduler(config())
    (decision,) = scheduler.decide(rise(scheduler), about=[0])
    assert decision.member == 0 and decision.sources[0].member == 7
    assert scheduler.decide(rise(scheduler), about=[7, 3]) == ()


def test_chance_hangs_on_the_number_of_the_decision_and_not_on_the_order_of_records() -> None:
    first, second = (PBTScheduler(config(seed=1, exploit_method="binary_tournament")) for _ in range(2))
    decided = [first.decide(rise(first)) for _ in range(20)]
    shuffled = []
    for _ in range(20):
        records = rise(second)
        random.Random(3).shuffle(records)
        shuffled.append(second.decide(records))
    assert decided == shuffled
    assert len({tuple(each.sources[0].member for each in event) for event in decided}) > 1


def test_members_that_take_over_the_same_one_move_apart_and_each_hyperparameter_by_itself() -> None:
    scheduler = PBTScheduler(config(truncation_ratio=0.5, explore_method="resample"))
    records = population(scheduler, [0.0] * 4 + [1.0] + [0.5] * 3)
    (first, second, *_), _ = [scheduler.decide(records) for _ in range(2)]
    values = [each.sources[0].hyperparameters for each in (first, second)]
    assert values[0]["lr"] != values[1]["lr"] and values[0]["gamma"] != values[1]["gamma"]


def test_decisions_about_one_do_not_hang_on_who_else_is_asked_about() -> None:
    together, alone = (PBTScheduler(config(seed=2, truncation_ratio=0.5)) for _ in range(2))
    both = {decision.member: decision for decision in together.decide(rise(together))}
    (one,) = alone.decide(rise(alone), about=[2])
    assert one == both[2]


def test_a_scheduler_saved_in_the_middle_goes_on_with_the_same_decisions() -> None:
    whole, half = (PBTScheduler(config(seed=6, exploit_method="binary_tournament")) for _ in range(2))
    decided = [whole.decide(rise(whole)) for _ in range(10)]
    for _ in range(5):
        half.decide(rise(half))
    rest = PBTScheduler(config(seed=6, exploit_method="binary_tournament"))
    rest.load_state_dict(half.state_dict())
    assert [rest.decide(rise(rest)) for _ in range(5)] == decided[5:]
    assert decided[5:] != decided[:5]


def test_global_generators_stay_where_they_are() -> None:
    def state() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))

    before = state()
    scheduler = PBTScheduler(config(exploit_method="binary_tournament", explore_all=True))
    for _ in range(5):
        scheduler.decide(rise(scheduler))
    assert state() == before


def test_records_that_make_no_sense_are_refused_and_count_for_nothing() -> None:
    scheduler = PBTScheduler(config())
    records = rise(scheduler)
    with pytest.raises(ValueError, match="each member once, got 3 twice"):
        scheduler.decide([*records, records[3]])
    strange = MemberRecord(0, 1.0, {**records[0].hyperparameters, "lr": 7.0})
    with pytest.raises(ValueError, match=r"`lr` must be a number in .* \(member 0\)"):
        scheduler.decide([strange, *records[1:]])
    assert scheduler.num_decisions == 0


class Populations(RuleBasedStateMachine):
    """Populations to which anything may happen, between any two of which a scheduler may be saved and loaded."""

    @initialize(
        size=st.integers(2, 9),
        method=st.sampled_from(METHODS),
        explore=st.sampled_from(["perturb", "resample", "both", "none"]),
        everybody=st.booleans(),
        mode=st.sampled_from(["max", "min"]),
        seed=st.integers(0, 2**40),
    )
    def begin(self, *, size: int, method: Any, explore: Any, everybody: bool, mode: Any, seed: int) -> None:
        share = {"truncation_ratio": 0.5} if method == "truncation" else {}
        others = {"explore_method": explore, "explore_all": everybody and explore != "none", "mode": mode, "seed": seed}
        self.config = config(population_size=size, exploit_method=method, burn_in=20, min_gap=0.5, **share, **others)
        self.scheduler, self.twin = PBTScheduler(self.config), PBTScheduler(self.config)
        self.records = {member: MemberRecord(member, 0.0, self.scheduler.initial(member)) for member in range(size)}
        self.decided: tuple[Decision, ...] = ()

    @rule(
        member=st.integers(0, 8),
        score=st.one_of(st.floats(-3.0, 3.0), st.sampled_from([math.nan, math.inf])),
        dead=st.booleans(),
    )
    def report(self, member: int, score: float, dead: bool) -> None:
        member %= self.config.population_size
        old = self.records[member]
        singles = tuple(score + 0.01 * number for number in range(5)) if math.isfinite(score) else ()
        values = {"step": old.step + 10, "scores": singles, "is_alive": not dead or math.isfinite(score)}
        self.records[member] = MemberRecord(member, score, old.hyperparameters, **values)
        self.decided = ()

    @rule(member=st.integers(0, 8), recent=st.booleans())
    def fall_behind(self, member: int, recent: bool) -> None:
        old = self.records[member % self.config.population_size]
        facts = {"step": old.step, "scores": old.scores, "is_alive": old.is_alive, "is_recent": recent}
        self.records[old.member] = MemberRecord(old.member, old.score, old.hyperparameters, **facts)
        self.decided = ()

    @rule()
    def decide(self) -> None:
        self.decided = self.scheduler.decide([*self.records.values()])
        assert self.decided == self.twin.decide([*self.records.values()][::-1])

    @rule()
    def follow(self) -> None:
        for decision in self.decided:
            source = decision.sources[0]
            self.records[decision.member] = MemberRecord(decision.member, source.score, source.hyperparameters, source.step)
        self.decided = ()

    @rule()
    def save_and_load(self) -> None:
        fresh = PBTScheduler(self.config)
        fresh.load_state_dict(self.scheduler.state_dict())
        self.scheduler = fresh

    @invariant()
    def decisions_keep_to_the_rules(self) -> None:
        if not hasattr(self, "decided"):
            return
        sign = 1.0 if self.config.mode == "max" else -1.0
        for decision in self.decided:
            record = self.records[decision.member]
            assert decision.sources and decision.hyperparameters == record.hyperparameters
            for source in decision.sources:
                self.config.check_values(dict(source.hyperparameters), "source")
                theirs = self.records[source.member]
                assert theirs.is_sound and (source.step, source.score) == (theirs.step, theirs.score)
                if not decision.is_exploit:
                    assert source.member == decision.member
                    continue
                assert source.member != decision.member and theirs.is_recent
                if decision.reason == "worse":
                    assert sign * (theirs.score - record.score) > self.config.min_gap and record.step >= 20
                else:
                    assert not record.is_sound


TestPopulations = Populations.TestCase
TestPopulations.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)
