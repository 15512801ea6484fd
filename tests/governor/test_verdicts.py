"""The rules by which alarms become verdicts: pure, so tested without a model."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, strategies as st

from morphogen.governor import Action, Finding, GovernorConfig, Verdict
from morphogen.governor.verdicts import (
    WatchState,
    after_promotion,
    after_rewind,
    decide,
    is_level_shift,
    is_out_of_patience,
    is_watching_closely,
    watched,
)

CONFIG = GovernorConfig(patience=3, alarm_window_steps=6)


def watch(alarms: str) -> WatchState:
    """The state after observations written as "." (clean) and "!" (alarm)."""
    state = WatchState()
    for sign in alarms:
        state = watched(state, sign == "!", CONFIG)
    return state


@pytest.mark.parametrize(
    ("alarms", "sound", "taken", "action"),
    [
        ("!", True, False, Action.SKIP),
        ("!!", True, False, Action.SKIP),
        ("!!!", True, False, Action.REWIND),
        ("!.!.!", True, False, Action.REWIND),
        ("!..!.!", True, False, Action.REWIND),
        ("!...!.!", True, False, Action.SKIP),
        ("!......!", True, False, Action.SKIP),
        ("!", False, False, Action.REWIND),
        ("!", True, True, Action.REWIND),
    ],
)
def test_an_alarm_skips_and_many_soon_after_each_other_rewind(alarms: str, sound: bool, taken: bool, action: Action) -> None:
    assert decide(watch(alarms), CONFIG, state_is_sound=sound, step_was_taken=taken) is action


@pytest.mark.parametrize(("rewinds", "needed"), [(0, 3), (1, 4), (2, 5), (3, 6), (4, 6), (9, 6)])
def test_each_rewind_that_did_not_help_asks_for_one_more_alarm_up_to_the_window(rewinds: int, needed: int) -> None:
    for count in range(1, 7):
        state = dataclasses.replace(watch("!" * count), rewinds=rewinds)
        assert is_out_of_patience(state, CONFIG) is (count >= needed)


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 8))
def test_alarms_are_those_of_the_window_and_counts_are_what_they_say(alarms: list[bool], window: int) -> None:
    config = GovernorConfig(alarm_window_steps=window, patience=1)
    state = WatchState()
    for alarm in alarms:
        state = watched(state, alarm, config)
    count = len(alarms)
    assert state.observed == count
    assert state.alarms == tuple(step for step in range(max(0, count - window), count) if alarms[step])
    assert state.position == alarms.count(False)
    assert (state.suspicious_steps > 0) is bool(state.alarms)
    clean_tail = next((ago for ago, alarm in enumerate(reversed(alarms)) if alarm), count)
    assert state.candidate_clean_steps == clean_tail


@pytest.mark.parametrize(
    ("since", "alarms", "lasted", "shift"),
    [
        (4, 4, 1, True),  # four alarms at once
        (5, 4, 2, True),  # one observation that was high and no alarm yet, then four alarms
        (5, 4, 1, False),  # the first observation was clean
        (3, 3, 1, False),  # too early to tell
        (40, 4, 1, False),
        (None, 4, 1, False),  # never rewound: there is no state that is known to be good
    ],
)
def test_a_level_has_shifted_if_a_good_state_shows_it_from_its_first_step(
    since: int | None, alarms: int, lasted: int, shift: bool
) -> None:
    state = WatchState(observed=100, alarms=tuple(range(100 - alarms, 100)), since_rewind=since, rewinds=1)
    known = CONFIG.explosion.min_steps + (since or 0) - alarms
    assert is_level_shift(state, CONFIG, lasted, known) is shift
    assert not is_level_shift(state, CONFIG, lasted, known - 1), "what little was known may have been damaged"


def test_alarms_that_come_and_go_for_a_whole_probation_are_what_the_data_is_like() -> None:
    config = CONFIG.replace(probation_steps=20)
    assert not is_level_shift(watch("!." * 10), config, 1, 0)
    assert is_level_shift(watch("!." * 10 + "!"), config, 1, 0)
    assert not is_level_shift(watch("!." * 10 + "......!"), config, 1, 0)


def test_a_rewind_takes_the_position_back_and_remembers_where_the_fault_was() -> None:
    state = dataclasses.replace(watch("....." * 20 + "!!!"), candidate_clean_steps=7)
    rewound = after_rewind(state, position=60)
    assert (rewound.position, rewound.fault_position, rewound.rewinds, rewound.rewound) == (60, 100, 1, 1)
    assert (rewound.alarms, rewound.since_rewind, rewound.candidate_clean_steps) == ((), 0, 0)
    again = after_rewind(rewound, position=40)
    assert (again.position, again.fault_position, again.rewinds) == (40, 100, 2)


def test_rewinds_are_forgiven_past_the_fault_alone() -> None:
    state = after_rewind(watch("." * 100 + "!!!"), position=60)
    assert after_promotion(state, 61).rewinds == 1, "no progress: the fault lies ahead"
    assert after_promotion(state, 100).rewinds == 1
    assert after_promotion(state, 101).rewinds == 0


def test_every_step_is_judged_before_it_is_taken_while_something_may_be_wrong() -> None:
    assert not is_watching_closely(watch("...."), CONFIG)
    assert is_watching_closely(watch("..!."), CONFIG)
    rewound = after_rewind(watch("!!!"), 0)
    assert is_watching_closely(rewound, CONFIG)
    assert not is_watching_closely(dataclasses.replace(rewound, since_rewind=6), CONFIG)


def test_a_verdict_reads_as_one_line() -> None:
    findings = tuple(Finding(detector=name, message=f"{name} is odd", value=1.0) for name in ("loss", "weight"))
    verdict = Verdict(step=3, action=Action.SKIP, findings=findings)
    assert verdict.reason == "loss is odd; weight is odd" and not verdict.proceed
    assert Verdict(step=3, action=Action.PROCEED).reason == ""
