"""The life of a seed: every stage x operation, one clock, cooldown to the tick. No model, no torch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from morphogen.errors import SlotError
from morphogen.growth import lifecycle
from morphogen.growth.config import GrowthConfig
from morphogen.growth.lifecycle import HISTORY_LIMIT, LIVE, SlotState, Sowing, Stage

CONFIG = GrowthConfig(pruned_ticks=2, embargo_ticks=3, resetting_ticks=2)
SOWING = Sowing(blueprint="norm", options={"rank": 2}, alpha_target=0.8, blend_ticks=4, curve="linear")


def ticks(state: SlotState, count: int, clock: int = 0, config: GrowthConfig = CONFIG) -> SlotState:
    for tick in range(1, count + 1):
        state = lifecycle.ticked(state, clock + tick, config)
    return state


def states() -> dict[Stage, SlotState]:
    """One slot in each stage, reached by legal moves alone."""
    dormant = SlotState()
    germinated = lifecycle.germinated(dormant, SOWING, 1)
    training = lifecycle.advanced(ticks(germinated, 1), 2)
    blending = lifecycle.advanced(ticks(training, 2), 4)
    holding = lifecycle.advanced(ticks(blending, 5), 9)
    fossilized = lifecycle.fossilized(holding, 10)
    pruned = lifecycle.pruned(holding, 10, 0, "test")
    embargoed = ticks(pruned, 2)
    resetting = ticks(embargoed, 3)
    found = [dormant, germinated, training, blending, holding, fossilized, pruned, embargoed, resetting]
    return {state.stage: state for state in found}


STATES = states()
OPERATIONS: dict[str, Callable[[SlotState], SlotState]] = {
    "germinate": lambda state: lifecycle.germinated(state, SOWING, 50),
    "advance": lambda state: lifecycle.advanced(state, 50),
    "retarget": lambda state: lifecycle.retargeted(state, 50, 0.4, over=3, curve="cosine"),
    "prune now": lambda state: lifecycle.pruned(state, 50, 0, "test"),
    "prune over": lambda state: lifecycle.pruned(state, 50, 3, "test"),
    "fossilize": lambda state: lifecycle.fossilized(state, 50),
    "excise": lambda state: lifecycle.excised(state, 50, "test"),
    "tick": lambda state: lifecycle.ticked(state, 50, CONFIG),
}
D, G, T, B, H, F, P, E, R = Stage
LEGAL: dict[str, dict[Stage, Stage]] = {
    "germinate": {D: G},
    "advance": {G: T, T: B, B: H},
    "retarget": {B: B, H: B},
    "prune now": {G: P, T: P, B: P, H: P},
    "prune over": {G: P, T: P, B: B, H: B},
    "fossilize": {H: F},
    "excise": {F: P},
    "tick": {stage: stage for stage in Stage},
}


def test_every_stage_was_reached() -> None:
    assert list(STATES) == list(Stage)
    assert {name: stage.value for name, stage in Stage.__members__.items()} == {
        "DORMANT": 0,
        "GERMINATED": 1,
        "TRAINING": 2,
        "BLENDING": 3,
        "HOLDING": 4,
        "FOSSILIZED": 5,
        "PRUNED": 6,
        "EMBARGOED": 7,
        "RESETTING": 8,
    }


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_legal_or_refused_and_pure(operation: str, stage: Stage) -> None:
    state = STATES[stage]
    before = copy.deepcopy(state)
    expected = LEGAL[operation].get(stage)
    if expected is None:
        with pytest.raises(SlotError, match=stage.name.lower()):
            OPERATIONS[operation](state)
    else:
        after = OPERATIONS[operation](state)
        assert after.stage is expected
        if expected is not stage:
            last = after.history[-1]
            assert (last.previous, last.stage, last.tick) == (stage, expected, 50)
            assert last.ticks_in_previous == before.ticks_in_stage + (operation == "tick")
            assert after.ticks_in_stage == 0
    assert state == before


def test_a_seed_is_there_from_germination_to_its_end() -> None:
    assert {stage for stage, state in STATES.items() if state.has_seed} == LIVE | {Stage.FOSSILIZED}
    for stage, state in STATES.items():
        assert (state.blueprint is None) == (stage is Stage.DORMANT)
        assert state.germination == (0 if stage is Stage.DORMANT else 1)


def test_germination_takes_over_what_was_sown() -> None:
    state = STATES[Stage.GERMINATED]
    for field in dataclasses.fields(Sowing):
        assert getattr(state, field.name) == getattr(SOWING, field.name)
    assert (state.alpha, state.ramp, state.age_ticks, state.prune_reason) == (0.0, None, 0, None)
    assert state.options is not SOWING.options


def test_blending_takes_the_first_step_of_its_ramp_at_once_and_ends_on_time() -> None:
    blending = lifecycle.advanced(STATES[Stage.TRAINING], 4)
    alphas = [blending.alpha]
    for tick in range(5):
        blending = lifecycle.ticked(blending, 5 + tick, CONFIG)
        alphas.append(blending.alpha)
    assert alphas == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert blending.alpha == 0.8 and blending.ramp is None and blending.stage is Stage.BLENDING


def test_holding_never_moves_by_itself() -> None:
    holding = STATES[Stage.HOLDING]
    later = ticks(holding, 500)
    assert later.stage is Stage.HOLDING and later.alpha == holding.alpha
    assert later.ticks_in_stage == holding.ticks_in_stage + 500
    assert later.age_ticks == holding.age_ticks + 500


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING], ids=lambda stage: stage.name)
def test_retargeting_starts_where_alpha_is(stage: Stage) -> None:
    state = STATES[stage]
    moved = lifecycle.retargeted(state, 50, 0.4, over=4, curve="linear")
    assert moved.stage is Stage.BLENDING and moved.alpha == state.alpha and moved.alpha_target == 0.4
    alphas = [ticks(moved, count).alpha for count in range(5)]
    assert alphas == pytest.approx([state.alpha + (0.4 - state.alpha) * count / 4 for count in range(5)])
    assert alphas[-1] == 0.4


def test_retargeting_over_no_ticks_snaps() -> None:
    moved = lifecycle.retargeted(STATES[Stage.HOLDING], 50, 0.4, over=0, curve="linear")
    assert (moved.stage, moved.alpha, moved.alpha_target, moved.ramp) == (Stage.BLENDING, 0.4, 0.4, None)


def test_a_prune_ramp_ends_in_removal_in_the_tick_that_reaches_zero() -> None:
    state = lifecycle.pruned(STATES[Stage.HOLDING], 50, 3, "too dear")
    trace = [(state.stage, state.alpha)]
    for tick in range(3):
        state = lifecycle.ticked(state, 51 + tick, CONFIG)
        trace.append((state.stage, state.alpha))
    assert [stage for stage, _ in trace] == [Stage.BLENDING, Stage.BLENDING, Stage.BLENDING, Stage.PRUNED]
    assert [alpha for _, alpha in trace] == pytest.approx([0.8, 0.8 * 2 / 3, 0.8 / 3, 0.0])
    assert state.prune_reason == "too dear" and state.history[-1].reason == "too dear" and state.history[-1].tick == 53


def test_a_prune_ramp_can_be_cancelled_and_then_advances_again() -> None:
    pruning = ticks(lifecycle.pruned(STATES[Stage.HOLDING], 50, 4, "test"), 1)
    assert pruning.is_pruning
    with pytest.raises(SlotError, match="cancel the prune"):
        lifecycle.advanced(pruning, 51)
    kept = lifecycle.retargeted(pruning, 51, 1.0, over=2, curve="linear")
    assert not kept.is_pruning and kept.prune_reason is None
    kept = ticks(kept, 2)
    assert kept.alpha == 1.0 and lifecycle.advanced(kept, 60).stage is Stage.HOLDING


def test_a_prune_ramp_can_be_cut_short() -> None:
    pruning = lifecycle.pruned(STATES[Stage.HOLDING], 50, 4, "slowly")
    assert lifecycle.pruned(pruning, 50, 0, "now").stage is Stage.PRUNED


@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 4))
def test_cooldown_lasts_as_configured_to_the_tick(pruned: int, embargo: int, resetting: int) -> None:
    config = GrowthConfig(pruned_ticks=pruned, embargo_ticks=embargo, resetting_ticks=resetting)
    state = lifecycle.pruned(STATES[Stage.TRAINING], 50, 0, "test")
    seen: list[Stage] = []
    while state.stage is not Stage.DORMANT:
        seen.append(state.stage)
        with pytest.raises(SlotError):
            lifecycle.germinated(state, SOWING, 50)
        state = lifecycle.ticked(state, 50 + len(seen), config)
    assert seen == [Stage.PRUNED] * pruned + [Stage.EMBARGOED] * embargo + [Stage.RESETTING] * resetting
    assert (state.blueprint, state.options, state.prune_reason, state.alpha) == (None, {}, None, 0.0)
    assert lifecycle.germinated(state, SOWING, 99).germination == 2


def test_a_removed_seed_is_seen_for_a_tick() -> None:
    with pytest.raises(ValueError, match="pruned_ticks"):
        GrowthConfig(pruned_ticks=0)


def test_history_is_bounded() -> None:
    state = STATES[Stage.HOLDING]
    for tick in range(HISTORY_LIMIT):
        state = lifecycle.retargeted(state, tick, 0.5, over=1, curve="linear")
        state = lifecycle.advanced(ticks(state, 1), tick)
    assert len(state.history) == HISTORY_LIMIT
    assert state.history[-1].stage is Stage.HOLDING


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"operator": "multiply"}, "`operator` must be one of add, scale, gate, got 'multiply'"),
        ({"alpha_target": 0.0}, r"`alpha_target` must be in \(0, 1\], got 0.0"),
        ({"alpha_target": 1.5}, "`alpha_target`"),
        ({"alpha_target": float("nan")}, "`alpha_target`"),
        ({"blend_ticks": 0}, "`blend_ticks` must be >= 1, got 0"),
        ({"curve": "cubic"}, "`curve` must be one of linear, cosine, sigmoid, got 'cubic'"),
        ({"steepness": 0.0}, "`steepness`"),
        ({"options": {"kernel": object()}}, "`options`.*kernel"),
    ],
)
def test_a_wrong_sowing_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        Sowing(**{"blueprint": "norm", **change})


@pytest.mark.parametrize(
    ("move", "match"),
    [
        (lambda s: lifecycle.retargeted(s, 0, 0.0, over=3, curve="linear"), "`target`.*prune it"),
        (lambda s: lifecycle.retargeted(s, 0, 1.1, over=3, curve="linear"), "`target`"),
        (lambda s: lifecycle.retargeted(s, 0, 0.5, over=-1, curve="linear"), "`over` must be >= 0 ticks, got -1"),
        (lambda s: lifecycle.retargeted(s, 0, 0.5, over=3, curve="cubic"), "`curve`"),
        (lambda s: lifecycle.pruned(s, 0, -1, "test"), "`over` must be >= 0"),
    ],
)
def test_a_wrong_argument_is_named(move: Callable[[SlotState], SlotState], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        move(STATES[Stage.HOLDING])


def test_a_fossil_is_frozen_where_asked_and_forgets_it_when_it_is_cut_out() -> None:
    frozen = lifecycle.fossilized(STATES[Stage.HOLDING], 50, freeze=True)
    assert frozen.frozen and not STATES[Stage.FOSSILIZED].frozen
    assert not lifecycle.excised(frozen, 60, "test").frozen
