"""The built-in policies: conformance, the decisions of each as a table, and the suite catches what is wrong."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from morphogen import control
from morphogen.control import (
    Action,
    ActionMask,
    Heuristic,
    Observation,
    Op,
    Periodic,
    Policy,
    Random,
    SlotView,
    Wait,
    action_mask,
    execute,
    view_slots,
)
from morphogen.growth import Check, GrowthConfig, Sowing, Stage
from morphogen.testing import HostCase
from morphogen.testing.policies import check_policy, reachable_situations, some_sowings

FIRST, SECOND = Sowing(blueprint="mlp"), Sowing(blueprint="norm", operator="gate")
BOTH = (FIRST, SECOND)


def slot(name: str = "a", stage: Stage = Stage.DORMANT, **given: Any) -> SlotView:
    values: dict[str, Any] = {
        "name": name,
        "stage": stage,
        "ticks_in_stage": 0,
        "alpha": 0.0,
        "at_rest": True,
        "is_pruning": False,
        "gate_open": False,
        "blueprint": None,
        "tried": (),
        "contribution": None,
        "contribution_error": None,
    }
    return SlotView(**{**values, **given})


def decide(policy: Policy, *slots: SlotView, tick: int = 0, total: int = 100, seed: int = 0) -> Action:
    observation = Observation(tick=tick, total_ticks=total, metric=0.5, slots=slots)
    return policy.act(observation, action_mask(slots), np.random.default_rng(seed))


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", control.names())
def test_built_in_policies_conform(name: str) -> None:
    check_policy(lambda blueprints: control.make(name, blueprints), num_walks=4)


def test_the_walks_of_the_suite_meet_every_stage_and_op() -> None:
    stages: collections.Counter[Stage] = collections.Counter()
    ops: set[Op] = set()
    for walk in range(8):
        for situation in reachable_situations(walk):
            stages.update(view.stage for view in situation.observation.slots)
            ops |= set(situation.mask.ops)
    assert set(stages) == set(Stage) and ops == set(Op), stages


def test_the_table_of_policies() -> None:
    assert control.names() == ("wait", "random", "periodic", "heuristic")
    made = [type(control.make(name, BOTH)) for name in control.names()]
    assert made == [Wait, Random, Periodic, Heuristic]


@pytest.mark.parametrize(("name", "near"), [("heuristics", "heuristic"), ("perodic", "periodic"), ("Wait", "wait")])
def test_an_unknown_policy_is_refused_with_the_nearest_name(name: str, near: str) -> None:
    message = f"`policy` must be one of wait, random, periodic, heuristic, got '{name}'. Did you mean '{near}'?"
    with pytest.raises(ValueError, match=message):
        control.make(name, BOTH)


def test_a_policy_far_from_all_and_one_without_blueprints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'xyz'\.$"):
        control.make("xyz", BOTH)
    with pytest.raises(ValueError, match="`blueprints` must hold at least one, got none"):
        control.make("wait", ())


# -- the suite ------------------------------------------------------------------------------------------------------


class Sound:
    """Germinates wherever it can; to be broken."""

    def __init__(self, blueprints: Sequence[Sowing]) -> None:
        self.blueprints = blueprints

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        for name in mask.slots_by_op[Op.GERMINATE]:
            return Action(op=Op.GERMINATE, slot=name, sowing=self.blueprints[0])
        return Action()


class IgnoresTheMask(Sound):
    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        return Action(op=Op.PRUNE, slot=observation.slots[0].name)


class KeepsState(Sound):
    calls = 0

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        self.calls += 1
        return super().act(observation, mask, generator) if self.calls % 2 else Action()


class RemembersItsOwnCalls(Sound):
    calls = 0

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        self.calls += 1
        return super().act(observation, mask, generator) if self.calls > 2 else Action()


class DrawsGlobally(Sound):
    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        random.random()
        return super().act(observation, mask, generator)


class SowsItsOwn(Sound):
    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        for name in mask.slots_by_op[Op.GERMINATE]:
            return Action(op=Op.GERMINATE, slot=name, sowing=Sowing(blueprint="low_rank", blend_ticks=99))
        return Action()


def test_a_sound_policy_passes() -> None:
    check_policy(Sound, num_walks=1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (IgnoresTheMask, "an action must be possible, got Action"),
        (KeepsState, "equal chance must give equal actions"),
        (RemembersItsOwnCalls, "equal chance must give equal actions|a new policy must act alike"),
        (DrawsGlobally, "a policy must draw from the generator it is given"),
        (SowsItsOwn, "a policy must sow what it was given"),
    ],
)
def test_a_broken_policy_is_caught(broken: type[Sound], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(broken, num_walks=1)


def test_a_mask_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    lie = lambda views: ActionMask({op: ("early",) for op in Op if op is not Op.WAIT})  # noqa: E731
    monkeypatch.setattr("morphogen.testing.policies.action_mask", lie)
    with pytest.raises(AssertionError, match="must be executable as the mask allows it: slot 'early' must be dormant"):
        check_policy(Sound, num_walks=1)


# -- the heuristic --------------------------------------------------------------------------------------------------

HOLDING = {"stage": Stage.HOLDING, "alpha": 1.0, "blueprint": "mlp"}
GERMINATE = Action(op=Op.GERMINATE, slot="a", sowing=FIRST, reason="room to grow")
HEURISTIC_TABLE: list[tuple[str, list[SlotView], int, Action]] = [
    ("an empty slot early on", [slot()], 0, GERMINATE),
    ("an empty slot just in time", [slot()], 49, GERMINATE),
    ("an empty slot too late", [slot()], 50, Action()),
    (
        "a blueprint that failed here",
        [slot(tried=("mlp",))],
        0,
        Action(op=Op.GERMINATE, slot="a", sowing=SECOND, reason="room to grow"),
    ),
    (
        "everything failed here, not there",
        [slot(tried=("mlp", "norm")), slot("b")],
        0,
        Action(op=Op.GERMINATE, slot="b", sowing=FIRST, reason="room to grow"),
    ),
    ("everything failed", [slot(tried=("norm", "mlp"))], 0, Action()),
    (
        "enough are developing",
        [slot("a", Stage.TRAINING), slot("b", Stage.BLENDING), slot("c")],
        0,
        Action(),
    ),
    (
        "fossils and empty beds do not count as developing",
        [slot("x", Stage.FOSSILIZED), slot("y", Stage.EMBARGOED), slot("z", Stage.TRAINING), slot("a")],
        0,
        GERMINATE,
    ),
    (
        "an open gate comes before sowing",
        [slot(), slot("b", Stage.TRAINING, gate_open=True)],
        0,
        Action(op=Op.ADVANCE, slot="b", reason="gate open"),
    ),
    (
        "a seed that helps",
        [slot("b", Stage.TRAINING, gate_open=True), slot(gate_open=True, contribution=0.02, **HOLDING)],
        99,
        Action(op=Op.FOSSILIZE, slot="a", reason="contributes +0.020"),
    ),
    (
        "a seed that helps, with an error",
        [slot(gate_open=True, contribution=0.02, contribution_error=0.004, **HOLDING)],
        99,
        Action(op=Op.FOSSILIZE, slot="a", reason="contributes +0.020 with a standard error of 0.004"),
    ),
    (
        "a seed that seems to help, but the gate asks for a smaller error",
        [slot(contribution=0.02, contribution_error=0.03, ticks_in_stage=4, refusals=(Check.CONTRIBUTION,), **HOLDING)],
        99,
        Action(op=Op.PRUNE, slot="a", over=3, reason="contributes +0.020 with a standard error of 0.030 only"),
    ),
    (
        "a training seed that gets no gradient",
        [slot("a", Stage.TRAINING, ticks_in_stage=4, refusals=(Check.FINITE, Check.GRADIENT))],
        0,
        Action(
            op=Op.PRUNE,
            slot="a",
            reason="stuck in training, lacks finite parameters and gradients, a measured, non-zero gradient",
        ),
    ),
    (
        "a training seed that gets no gradient yet",
        [slot("a", Stage.TRAINING, ticks_in_stage=3, refusals=(Check.GRADIENT,))],
        99,
        Action(),
    ),
    (
        "a training seed that has to wait",
        [slot("a", Stage.TRAINING, ticks_in_stage=9, refusals=(Check.DWELL, Check.GRADIENT))],
        99,
        Action(),
    ),
    (
        "a training seed whose gate is open, late",
        [slot("a", Stage.TRAINING, ticks_in_stage=9, gate_open=True)],
        99,
        Action(op=Op.ADVANCE, slot="a", reason="gate open"),
    ),
    (
        "a blending seed off its target and at rest",
        [slot("a", Stage.BLENDING, ticks_in_stage=4, refusals=(Check.ALPHA_AT_TARGET,))],
        99,
        Action(op=Op.PRUNE, slot="a", over=3, reason="stuck in blending, lacks alpha at its target"),
    ),
    (
        "a blending seed on a long ramp",
        [slot("a", Stage.BLENDING, ticks_in_stage=9, at_rest=False, refusals=(Check.ALPHA_AT_TARGET, Check.AT_REST))],
        99,
        Action(),
    ),
    (
        "a seed on its way out",
        [slot("a", Stage.BLENDING, ticks_in_stage=9, at_rest=False, is_pruning=True)],
        99,
        Action(),
    ),
    ("a seed that helps behind a closed gate", [slot(contribution=0.02, **HOLDING)], 99, Action()),
    ("a seed that helps too little yet", [slot(gate_open=True, contribution=0.005, **HOLDING)], 99, Action()),
    (
        "a seed that helps too little for long",
        [slot(gate_open=True, contribution=0.004, ticks_in_stage=4, **HOLDING)],
        99,
        Action(op=Op.PRUNE, slot="a", over=3, reason="contributes +0.004 only"),
    ),
    (
        "a seed that harms, before another that may advance",
        [slot(contribution=-0.1, ticks_in_stage=9, **HOLDING), slot("b", Stage.GERMINATED, gate_open=True)],
        0,
        Action(op=Op.PRUNE, slot="a", over=3, reason="contributes -0.100 only"),
    ),
    (
        "a seed whose worth is not a number",
        [slot(gate_open=True, contribution=math.nan, ticks_in_stage=4, **HOLDING)],
        99,
        Action(op=Op.PRUNE, slot="a", over=3, reason="contributes +nan only"),
    ),
    ("an unmeasured seed with time left", [slot(gate_open=True, ticks_in_stage=3, **HOLDING)], 99, Action()),
    (
        "an unmeasured seed that was held for long",
        [slot(gate_open=True, ticks_in_stage=4, **HOLDING)],
        99,
        Action(op=Op.PRUNE, slot="a", over=3, reason="contributes an unmeasured amount only"),
    ),
    ("nothing to do", [slot("a", Stage.FOSSILIZED), slot("b", Stage.RESETTING)], 0, Action()),
]


@pytest.mark.parametrize(("what", "slots", "tick", "expected"), HEURISTIC_TABLE, ids=lambda value: str(value)[:40])
def test_the_heuristic(what: str, slots: list[SlotView], tick: int, expected: Action) -> None:
    assert decide(Heuristic(BOTH), *slots, tick=tick) == expected, what


def test_the_knobs_of_the_heuristic_do_what_they_say() -> None:
    helps = slot(gate_open=True, contribution=0.02, ticks_in_stage=4, **HOLDING)
    assert decide(Heuristic(BOTH, min_contribution=0.03), helps).op is Op.PRUNE
    assert decide(Heuristic(BOTH, min_contribution=0.03, patience_ticks=5), helps, tick=99).op is Op.WAIT
    assert decide(Heuristic(BOTH, sow_until=0.9), slot(), tick=89).op is Op.GERMINATE
    assert decide(Heuristic(BOTH, max_developing=1), slot(), slot("b", Stage.TRAINING)).op is Op.WAIT


def test_a_seed_that_can_not_learn_makes_room() -> None:
    """On a real model: the host's gradient never reaches the seed, its gate stays shut, and the policy gives it up."""
    case = HostCase("NC")
    model = case.model(config=GrowthConfig())
    policy, reasons = Heuristic(BOTH, max_developing=1, sow_until=0.5), list[str]()
    for tick in range(12):
        model.tick()
        observation = Observation(tick=tick, total_ticks=12, metric=0.5, slots=view_slots(model))
        action = policy.act(observation, action_mask(observation.slots), np.random.default_rng(0))
        execute(model, action)
        if action.op is Op.PRUNE:
            reasons.append(action.reason)
    assert reasons[0] == "stuck in training, lacks finite parameters and gradients, a measured, non-zero gradient"
    assert model.slot("early").state.pruned_blueprints == ("mlp",)


# -- the baselines --------------------------------------------------------------------------------------------------


def test_wait_waits_whatever_there_is() -> None:
    for situation in reachable_situations(1, num_ticks=20):
        assert Wait(BOTH).act(situation.observation, situation.mask, situation.chance()) == Action()


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_periodic_sows_at_fixed_ticks_and_keeps_all_it_grows(interval: int) -> None:
    policy = Periodic(BOTH, interval_ticks=interval)
    for tick in range(30):
        action = decide(policy, slot(tried=("mlp",)), tick=tick)
        if tick % interval == 0:
            assert action == Action(op=Op.GERMINATE, slot="a", sowing=FIRST, reason="interval")
        else:
            assert action == Action()
    busy = [slot("a", Stage.TRAINING, gate_open=True), slot("b", Stage.HOLDING, gate_open=True), slot("c")]
    assert decide(policy, *busy) == Action(op=Op.FOSSILIZE, slot="b", reason="gate open")
    assert decide(policy, busy[0], busy[2]) == Action(op=Op.ADVANCE, slot="a", reason="gate open")
    assert decide(policy, slot(gate_open=False, contribution=-1.0, ticks_in_stage=99, **HOLDING)).op is Op.WAIT


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`interval_ticks` must be >= 1, got 0"):
        Periodic(BOTH, interval_ticks=0)


def test_random_waits_half_of_the_time_and_is_uniform_otherwise() -> None:
    """Counts of 6,000 draws, each within four standard deviations of what it should be."""
    slots = (slot("a"), slot("b"), slot("c", Stage.HOLDING, gate_open=True, alpha=1.0))
    chance, count = np.random.default_rng(0), 6000
    observation, mask = Observation(tick=0, total_ticks=9, metric=0.0, slots=slots), action_mask(slots)
    drawn = [Random(BOTH).act(observation, mask, chance) for _ in range(count)]

    def check(matches: list[bool], share: float, total: int) -> None:
        assert abs(sum(matches) - share * total) < 4 * math.sqrt(share * (1 - share) * total), (sum(matches), share * total)

    check([action.op is Op.WAIT for action in drawn], 0.5, count)
    acting = [action for action in drawn if action.op is not Op.WAIT]
    for op in (Op.GERMINATE, Op.SET_ALPHA_TARGET, Op.PRUNE, Op.FOSSILIZE):
        check([action.op is op for action in acting], 0.25, len(acting))
    sown = [action for action in acting if action.op is Op.GERMINATE]
    for name in "ab":
        for sowing in BOTH:
            check([action.slot == name and action.sowing == sowing for action in sown], 0.25, len(sown))
    aimed = [action.alpha_target for action in acting if action.op is Op.SET_ALPHA_TARGET]
    for target in (0.5, 0.7, 1.0):
        check([value == target for value in aimed], 1 / 3, len(aimed))


def test_sowings_of_the_suite_fit_and_differ() -> None:
    sowings = some_sowings("NCHW")
    assert len({sowing.blueprint for sowing in sowings}) == len(sowings) >= 3
    assert len({sowing.operator for sowing in sowings}) == 3
