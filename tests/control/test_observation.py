"""What a policy sees: plain numbers, and None for what was not measured at this clock."""

from __future__ import annotations

import math

import pytest

from morphogen.control import Observation, SlotView, view_slots
from morphogen.growth import Check, GrowableModel, Stage
from morphogen.testing import HostCase, lead_to

CASE = HostCase("NC")


def view(model: GrowableModel, name: str = "early") -> SlotView:
    return next(view for view in view_slots(model) if view.name == name)


def test_slots_come_in_the_order_of_the_points() -> None:
    assert [view.name for view in view_slots(CASE.model())] == ["early", "late"]


def test_a_dormant_slot_has_nothing_measured() -> None:
    assert view(CASE.model()) == SlotView(
        name="early",
        stage=Stage.DORMANT,
        ticks_in_stage=0,
        alpha=0.0,
        at_rest=True,
        is_pruning=False,
        gate_open=False,
        blueprint=None,
        tried=(),
        contribution=None,
        contribution_error=None,
        refusals=(),
    )


def test_a_contribution_is_seen_at_the_clock_of_its_measurement_alone() -> None:
    model = CASE.model()
    model.germinate("early", "low_rank")
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    assert (view(model).contribution, view(model).contribution_error) == (None, None)
    model.record_contribution("early", -0.25, 0.05)
    assert (view(model).contribution, view(model).contribution_error) == (-0.25, 0.05)
    model.tick()
    assert (view(model).contribution, view(model).contribution_error) == (None, None)
    model.record_contribution("early", 0.0, 0.0)
    assert view(model).contribution == 0.0, "a measured zero is not None"


def test_the_gate_is_seen_as_an_action_would_find_it() -> None:
    model = CASE.model()
    model.germinate("early", "low_rank")
    assert view(model).gate_open, "GERMINATED asks nothing"
    model.advance("early")
    assert not view(model).gate_open, "no gradient was measured"
    assert view(model).refusals == model.advance("early").refusals == (Check.FINITE, Check.GRADIENT)
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    assert not view(model).gate_open, "no contribution was measured"
    assert view(model).refusals == model.fossilize("early").refusals != ()
    model(CASE.example()).square().mean().backward()
    model.sense()
    model.record_contribution("early", 1.0, 0.0)
    assert view(model).gate_open and view(model).refusals == ()
    assert model.fossilize("early").passed
    assert not view(model).gate_open


def test_a_seed_on_its_way_out_has_no_open_gate() -> None:
    model = CASE.model()
    model.germinate("early", "low_rank")
    lead_to(model, "early", Stage.HOLDING, CASE.example())
    model.prune("early", over=3)
    seen = view(model)
    assert (seen.stage, seen.is_pruning, seen.at_rest, seen.gate_open) == (Stage.BLENDING, True, False, False)
    assert seen.refusals == (), "there is no gate that it could pass"
    assert seen.is_live and 0.0 < seen.alpha <= 1.0
    for _ in range(3):
        model.tick()
    seen = view(model)
    assert (seen.stage, seen.is_live, seen.alpha, seen.tried) == (Stage.PRUNED, False, 0.0, ("low_rank",))
    assert seen.blueprint == "low_rank", "cooling down still says after what"


def test_live_means_there_is_a_seed_that_can_be_pruned() -> None:
    live = {Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING}
    for stage in Stage:
        model = CASE.model()
        if stage is not Stage.DORMANT:
            model.germinate("early", "low_rank")
        lead_to(model, "early", stage, CASE.example())
        assert view(model).is_live is (stage in live), stage


@pytest.mark.parametrize(("tick", "total", "progress"), [(0, 8, 0.0), (2, 8, 0.25), (8, 8, 1.0)])
def test_progress_is_a_share_of_the_run(tick: int, total: int, progress: float) -> None:
    assert Observation(tick=tick, total_ticks=total, metric=math.nan, slots=()).progress == progress
