"""Eight small numbers mean one action and back, for everything that a policy does."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from morphogen import control, tasks
from morphogen.control import Action, Observation, Op, view_slots
from morphogen.envs import GrowthEnvConfig
from morphogen.envs.choices import HEADS, Layout, Menu, action_config
from morphogen.envs.episode import Episode, menu_of
from morphogen.errors import SlotError
from morphogen.growth import Sowing
from morphogen.growth.lifecycle import OPERATORS
from morphogen.rl.actions.heads import lay_out

SLOTS = ("early", "late")
MENU = Menu(SLOTS, (Sowing(blueprint="norm"), Sowing(blueprint="low_rank", options={"rank": 2})), Layout(3, 4))
GERMINATE = [int(Op.GERMINATE), 1, 1, 0, 0, 0, 0, 0]


def every_action() -> list[tuple[int, ...]]:
    """All choices on real places that go together."""
    ranges = [range(size) for size in (len(Op), len(SLOTS), len(MENU.blueprints), *MENU.layout.sizes[3:])]
    return [row for row in itertools.product(*ranges) if not (row[0] == Op.SET_ALPHA_TARGET and row[6] == 0)]


def test_every_choice_is_an_action_that_leads_back_to_it() -> None:
    found = {}
    for row in every_action():
        action = MENU.action(row)
        choices = MENU.choices(action)
        assert MENU.action(choices) == action
        found[tuple(choices)] = action
    matters = {
        Op.WAIT: 1,
        Op.GERMINATE: 2 * 2 * 4 * 3 * 3,
        Op.ADVANCE: 2,
        Op.SET_ALPHA_TARGET: 2 * 3 * 3 * 5,
        Op.PRUNE: 2 * 4,
        Op.FOSSILIZE: 2,
    }
    assert {op: sum(row[0] == op for row in found) for op in Op} == matters


def test_what_does_not_matter_is_said_not_to_matter() -> None:
    """The heads that an agent is told are irrelevant are those that change nothing."""
    heads = action_config().heads or ()
    relevant = {head.name: set(head.relevant_when.get("op", tuple(Op))) for head in heads}
    assert tuple(relevant) == HEADS
    for op, (place, head) in itertools.product(Op, enumerate(HEADS)):
        if head == "op":
            continue
        base = [int(op), 0, 0, 0, 0, 0, 1, 0]
        others = [base[:place] + [choice] + base[place + 1 :] for choice in range(MENU.layout.sizes[place])]
        possible = [row for row in others if row[1] < 2 and row[2] < 2 and not (op is Op.SET_ALPHA_TARGET and row[6] == 0)]
        meanings = {repr(MENU.action(row)) for row in possible}
        assert (len(meanings) > 1) == (int(op) in relevant[head]), (op, head)


def test_the_heads_fit_the_space() -> None:
    sizes = MENU.layout.action_space.nvec.tolist()
    assert [head.size for head in lay_out(sizes, action_config().heads or ())] == sizes == [6, 3, 4, 4, 3, 3, 4, 5]


def test_every_style_is_there_for_an_operator() -> None:
    sown = [MENU.action([1, 0, 0, style, 0, 0, 0, 0]).sowing for style in range(4)]
    assert {sowing.operator for sowing in sown if sowing} == set(OPERATORS)


@pytest.mark.parametrize("policy", control.names())
def test_every_built_in_policy_can_be_written_in_choices(policy: str) -> None:
    episode = Episode(tasks.get("digits"), GrowthEnvConfig(total_steps=24, tick_steps=1), seed=3, number=0)
    decides, generator = control.make(policy, episode.menu.blueprints), np.random.default_rng(0)
    while not episode.over:
        views = view_slots(episode.model)
        seen = Observation(tick=episode.memory.tick, total_ticks=24, metric=0.5, slots=views)
        action = decides.act(seen, control.action_mask(views), generator)
        choices = episode.menu.choices(action)
        assert episode.menu.action(choices) == dataclasses.replace(action, reason="")
        episode.step(choices)


@pytest.mark.parametrize("name", tasks.names())
def test_what_any_task_sows_can_be_chosen(name: str) -> None:
    menu = menu_of(tasks.get(name), GrowthEnvConfig())  # every built-in task fits the places there are by default
    for slot, sowing in itertools.product(menu.slots, menu.blueprints):
        action = Action(op=Op.GERMINATE, slot=slot, sowing=sowing)
        assert menu.action(menu.choices(action)) == action


@pytest.mark.parametrize(
    ("place", "choice", "kind", "words"),
    [
        (1, 2, SlotError, r"`slot` must be in \[0, 2\), got 2"),
        (2, 3, SlotError, r"`blueprint` must be in \[0, 2\), got 3"),
        (0, 6, ValueError, r"`op` must be in \[0, 6\), got 6"),
        (3, -1, ValueError, r"`style` must be in \[0, 4\), got -1"),
        (7, 5, ValueError, r"`alpha_curve` must be in \[0, 5\), got 5"),
    ],
)
def test_choices_that_mean_nothing(place: int, choice: int, kind: type[Exception], words: str) -> None:
    row = [*GERMINATE]
    row[place] = choice
    with pytest.raises(kind, match=words):
        MENU.action(row)


def test_choices_of_another_length() -> None:
    with pytest.raises(ValueError, match="`choices` must be 8 numbers, got 7. They are op, slot, blueprint"):
        MENU.action(GERMINATE[:-1])


def test_a_ramp_over_no_tick() -> None:
    with pytest.raises(ValueError, match="`over` must be >= 1 ticks, got 0"):
        MENU.action([int(Op.SET_ALPHA_TARGET), 0, 0, 0, 0, 0, 0, 0])


SOWN = Sowing(blueprint="norm", blend_ticks=3)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Action(op=Op.PRUNE, slot="earl"), "`slot` must be one of .* Did you mean 'early'?"),
        (Action(op=Op.PRUNE, slot="early", over=4), r"`alpha_speed` must be one of \[0, 3, 5, 8\], got 4"),
        (Action(op=Op.SET_ALPHA_TARGET, slot="early", alpha_target=0.6, over=3), "`alpha_target` must be one of"),
        (Action(op=Op.SET_ALPHA_TARGET, slot="early", over=3, steepness=3.0), "`alpha_curve` must be one of"),
        (Action(op=Op.GERMINATE, slot="early", sowing=dataclasses.replace(SOWN, blend_ticks=5)), "`tempo` must be one of"),
        (Action(op=Op.GERMINATE, slot="early", sowing=dataclasses.replace(SOWN, steepness=3.0)), "`steepness` must be one of"),
        (Action(op=Op.GERMINATE, slot="early", sowing=dataclasses.replace(SOWN, curve="cosine")), "`style` must be one of"),
        (Action(op=Op.GERMINATE, slot="early", sowing=Sowing(blueprint="low_rank")), "`blueprint` must be one of"),
    ],
)
def test_actions_that_are_not_on_offer(action: Action, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MENU.choices(action)


def test_more_than_there_are_places() -> None:
    with pytest.raises(ValueError, match="`layout.num_slots` must be at least 2, the slots of the task, got 1"):
        Menu(SLOTS, MENU.blueprints, Layout(num_slots=1))
    with pytest.raises(ValueError, match="`layout.num_blueprints` must be at least 2, the blueprints of the task, got 1"):
        Menu(SLOTS, MENU.blueprints, Layout(num_blueprints=1))
    with pytest.raises(ValueError, match="`num_slots` must be >= 1, got 0"):
        Layout(num_slots=0)
