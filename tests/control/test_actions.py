"""Actions: what they need is there, what would be ignored is refused, and the numbers of the ops never change."""

from __future__ import annotations

from typing import Any

import pytest

from morphogen.control import Action, ActionMask, Op, execute
from morphogen.errors import SlotError
from morphogen.growth import Sowing, Stage
from morphogen.testing import HostCase, lead_to

SOWING = Sowing(blueprint="low_rank")


def test_the_numbers_of_the_ops_are_part_of_trained_policies() -> None:
    expected = {"WAIT": 0, "GERMINATE": 1, "ADVANCE": 2, "SET_ALPHA_TARGET": 3, "PRUNE": 4, "FOSSILIZE": 5}
    assert {op.name: op.value for op in Op} == expected


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"op": Op.GERMINATE, "slot": "early", "sowing": SOWING},
        {"op": Op.ADVANCE, "slot": "early", "reason": "gate open"},
        {"op": Op.SET_ALPHA_TARGET, "slot": "early", "alpha_target": 0.5, "over": 1},
        {"op": Op.SET_ALPHA_TARGET, "slot": "early", "over": 20},
        {"op": Op.PRUNE, "slot": "early"},
        {"op": Op.PRUNE, "slot": "early", "over": 7},
        {"op": Op.FOSSILIZE, "slot": "early"},
    ],
)
def test_a_complete_action_is_made(given: dict[str, Any]) -> None:
    action = Action(**given)
    assert action == Action(**given) and hash(action.op) == hash(given.get("op", Op.WAIT))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slot": "early"}, "`slot` must be given for every op but WAIT, got 'early' for WAIT"),
        ({"op": Op.PRUNE}, "`slot` must be given for every op but WAIT, got None for PRUNE"),
        ({"op": Op.GERMINATE, "slot": "early"}, "`sowing` must be given for GERMINATE alone, got None for GERMINATE"),
        ({"op": Op.PRUNE, "slot": "early", "sowing": SOWING}, "`sowing` must be given for GERMINATE alone, got Sowing"),
        ({"sowing": SOWING}, "`sowing` must be given for GERMINATE alone"),
        ({"op": Op.SET_ALPHA_TARGET, "slot": "early"}, "`over` must be >= 1 ticks, got 0 for SET_ALPHA_TARGET"),
        ({"op": Op.PRUNE, "slot": "early", "over": -1}, "`over` must be >= 0 ticks, got -1 for PRUNE"),
        ({"op": Op.ADVANCE, "slot": "early", "over": 3}, "`over` must be left out, got 3 for ADVANCE"),
        ({"over": 3}, "`over` must be left out, got 3 for WAIT"),
        ({"op": Op.PRUNE, "slot": "early", "alpha_target": 0.5}, "`alpha_target` must be left out, got 0.5 for PRUNE"),
        *(
            (
                {"op": Op.SET_ALPHA_TARGET, "slot": "early", "over": 3, "alpha_target": target},
                rf"`alpha_target` must be in \(0, 1\], got {target}",
            )
            for target in (0.0, -0.5, 1.5, float("nan"))
        ),
    ],
)
def test_a_wrong_action_is_refused_by_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Action(**given)


def test_wait_does_nothing() -> None:
    model = HostCase("NC").model()
    before = model.topology()
    assert execute(model, Action()) is None
    assert model.topology() == before


def test_each_op_does_what_it_says() -> None:
    case = HostCase("NC")
    model = case.model()
    execute(model, Action(op=Op.GERMINATE, slot="late", sowing=Sowing(blueprint="norm", operator="scale", blend_ticks=2)))
    assert model.slot("late").state.operator == "scale" and model.stages()["late"] is Stage.GERMINATED
    gate = execute(model, Action(op=Op.ADVANCE, slot="late"))
    assert gate is not None and gate.passed and model.stages()["late"] is Stage.TRAINING
    lead_to(model, "late", Stage.HOLDING, case.example())
    execute(model, Action(op=Op.SET_ALPHA_TARGET, slot="late", alpha_target=0.5, over=3))
    assert model.stages()["late"] is Stage.BLENDING and model.slot("late").state.alpha_target == 0.5
    execute(model, Action(op=Op.PRUNE, slot="late", over=2, reason="too dear"))
    assert model.slot("late").state.is_pruning and model.slot("late").state.prune_reason == "too dear"
    execute(model, Action(op=Op.PRUNE, slot="late"))
    assert model.stages()["late"] is Stage.PRUNED and model.slot("late").state.prune_reason == "pruned by the policy"


def test_a_gate_that_is_closed_is_an_error_that_says_what_is_lacking() -> None:
    model = HostCase("NC").model()
    model.germinate("early", "low_rank")
    model.advance("early")
    before = model.topology()
    with pytest.raises(SlotError, match="slot 'early' must have .*gradient.* to become blending, and has not"):
        execute(model, Action(op=Op.ADVANCE, slot="early"))
    assert model.topology() == before


def test_a_mask_allows_what_is_listed_and_waiting() -> None:
    mask = ActionMask({op: ("a",) if op is Op.PRUNE else () for op in Op if op is not Op.WAIT})
    assert mask.ops == (Op.WAIT, Op.PRUNE)
    assert mask.allows(Action()) and mask.allows(Action(op=Op.PRUNE, slot="a"))
    assert not mask.allows(Action(op=Op.PRUNE, slot="b")) and not mask.allows(Action(op=Op.ADVANCE, slot="a"))
