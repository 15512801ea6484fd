"""Masks are exact: on real runs, what they allow is done, what they forbid is refused and changes nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from morphogen import control, tasks
from morphogen.control import Op, view_slots
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.choices import HEADS, action_config
from morphogen.envs.episode import Episode
from morphogen.envs.frames import Frames
from morphogen.envs.masks import action_masks, is_possible, sample_choices, which_possible
from morphogen.errors import SlotError
from morphogen.growth import GateConfig, GrowthConfig, Stage
from morphogen.rl.actions.heads import lay_out
from morphogen.rl.actions.masks import check_mask, flatten_mask
from morphogen.testing import LENIENT

STRICT = GrowthConfig(
    pruned_ticks=2,
    embargo_ticks=2,
    resetting_ticks=2,
    gates=GateConfig(min_training_ticks=2, min_blending_ticks=2, min_holding_ticks=2, min_contribution=-1.0),
)
SHORT_COOLING = LENIENT.replace(embargo_ticks=0, resetting_ticks=0)
TICKS = 40
SLOTS = 3  # one more than the task has
LIKELY = {Op.WAIT: 1.0, Op.GERMINATE: 6.0, Op.ADVANCE: 8.0, Op.SET_ALPHA_TARGET: 1.5, Op.PRUNE: 1.0, Op.FOSSILIZE: 1.0}


def make(growth: GrowthConfig, seed: int) -> tuple[Episode, Frames]:
    config = GrowthEnvConfig(total_steps=TICKS, tick_steps=1, num_slots=SLOTS, growth=growth)
    return Episode(tasks.get("digits"), config, seed, 0), Frames.empty(1, SLOTS)


def contents(episode: Episode) -> list[Any]:
    """Everything an action may change, copied without the help of the code under test."""
    model, optimizer = episode.model, episode.training.built.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    moments = {names[id(p)]: {key: torch.as_tensor(v).clone() for key, v in s.items()} for p, s in optimizer.state.items()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    slots = [(name, model.slot(name).state, model.slot(name).sensors) for name in model.stages()]
    return [tensors, moments, groups, slots, model.clock]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def check_every_op(episode: Episode, masks: dict[str, Any], generator: np.random.Generator) -> None:
    """Try every op everywhere, with other choices drawn: it is refused without a trace, or done and taken back."""
    before, snapshot = contents(episode), episode.training.state.capture()
    for op, slot in itertools.product(Op, range(SLOTS)):
        choices = sample_choices({**masks, "slot": masks["slot"] | True}, generator)[0]
        choices[:2] = op, slot
        if op is Op.SET_ALPHA_TARGET:
            choices[6] = generator.integers(1, 4)
        allowed = masks["slot"][0, op, slot] or op is Op.WAIT
        assert which_possible(choices[None], masks)[0, 0] == allowed
        if allowed:
            control.execute(episode.model, episode.menu.action(choices))
            episode.training.state.verify()
            episode.training.state.restore(snapshot)
        else:
            with pytest.raises(SlotError):
                control.execute(episode.model, episode.menu.action(choices))
        assert_same(contents(episode), before)


def likely_choices(masks: dict[str, Any], generator: np.random.Generator) -> Any:
    """Draw an action, biased towards seeds that live long."""
    weights = np.array([LIKELY[op] for op in Op]) * masks["op"][0]
    op = generator.choice(len(Op), p=weights / weights.sum())
    only = {**masks, "op": (np.arange(len(Op)) == op)[None]}
    return sample_choices(only, generator)[0]


@pytest.mark.parametrize("growth", [STRICT, SHORT_COOLING], ids=["strict", "lenient"])
def test_masks_are_exact_in_every_state_a_run_gets_into(growth: GrowthConfig) -> None:
    seen: Counter[tuple[Any, ...]] = Counter()
    for seed in range(3):
        (episode, frames), generator = make(growth, seed), np.random.default_rng(seed)
        heads = lay_out(episode.menu.layout.sizes, action_config().heads or ())
        while not episode.over:
            episode.write(frames, 0)
            masks = action_masks(frames, episode.menu)
            views = view_slots(episode.model)
            agreed = control.action_mask(views)
            assert set(agreed.ops) == {op for op in Op if masks["op"][0, op]} and masks["op"][0, Op.WAIT]
            for op, slots in agreed.slots_by_op.items():
                assert slots == tuple(name for place, name in enumerate(episode.menu.slots) if masks["slot"][0, op, place])
            assert not masks["slot"][0, :, len(views) :].any()
            check_mask(flatten_mask(masks, 1, heads), heads)
            situations = [(view.stage, view.at_rest, view.gate_open, view.is_pruning) for view in views]
            if not set(situations) <= set(seen):
                check_every_op(episode, masks, generator)
            seen.update(situations)
            episode.step(likely_choices(masks, generator))
    stages = set(Stage) - ({Stage.EMBARGOED, Stage.RESETTING} if growth is SHORT_COOLING else set())
    assert {stage for stage, *_ in seen} >= stages - {Stage.PRUNED}
    needed = {
        (Stage.BLENDING, False, False, False),
        (Stage.BLENDING, False, False, True),
        (Stage.BLENDING, True, True, False),
        (Stage.HOLDING, True, True, False),
    }
    if growth is STRICT:
        needed |= {
            (Stage.TRAINING, True, False, False),
            (Stage.HOLDING, True, False, False),
            (Stage.PRUNED, True, False, False),
        }
    assert needed <= set(seen), needed - set(seen)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_row_of_a_mask_that_can_be_reached_is_empty(data: st.DataObject) -> None:
    """For any numbers in the frames, also impossible ones."""
    env = GrowthVectorEnv("digits", num_envs=2, num_slots=SLOTS)
    frames = Frames.empty(2, SLOTS)
    values = st.one_of(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, np.nan, np.inf, -1.0]), st.floats(width=32))
    for name in ("stage", "gate_open", "is_pruning"):
        frames.slot(name)[:] = np.reshape(data.draw(st.lists(values, min_size=2 * SLOTS, max_size=2 * SLOTS)), (2, SLOTS))
    heads = lay_out(env.menu.layout.sizes, action_config().heads or ())
    masks = action_masks(frames, env.menu)
    check_mask(flatten_mask(masks, 2, heads), heads)
    choices_NH = sample_choices(masks, np.random.default_rng(0))
    assert is_possible(choices_NH, frames, env.menu).all()
    assert (which_possible(choices_NH, masks).diagonal() == is_possible(choices_NH, frames, env.menu)).all()


def test_a_masked_action_is_refused_before_any_environment_does_anything() -> None:
    settings = {"total_steps": 8, "tick_steps": 2}
    tried, plain = (GrowthVectorEnv("digits", num_envs=2, **settings) for _ in range(2))
    (seen, info), (expected, _) = tried.reset(seed=5), plain.reset(seed=5)
    generator = np.random.default_rng(0)
    for _ in range(3):
        np.testing.assert_array_equal(seen, expected)
        good = sample_choices(info["action_mask"], generator)
        refused = 0
        for op, slot in itertools.product(Op, range(4)):
            bad = good.copy()
            bad[1] = [op, slot, 0, 0, 0, 0, 1, 0]
            if op is not Op.WAIT and not info["action_mask"]["slot"][1, op, slot]:
                refused += 1
                with pytest.raises(SlotError, match=rf"environment 1: the action \[{int(op)}, {slot}, .*`action_mask`"):
                    tried.step(bad)
        assert refused >= 10
        seen, *_, info = tried.step(good)
        expected, *_ = plain.step(good)
    for env in (tried, plain):
        env.close()


def test_choices_that_do_not_matter_may_be_anything() -> None:
    env = GrowthVectorEnv("digits", num_envs=1)
    frames = Frames.empty(1, 4)
    frames.slot("stage")[:, 0] = Stage.DORMANT
    empty_place = [[int(Op.WAIT), 3, 3, 3, 2, 2, 0, 4]]
    assert is_possible(np.array(empty_place), frames, env.menu)[0]
    for place, choice, possible in ((1, 1, False), (2, 3, True), (6, 0, True)):
        row = [int(Op.GERMINATE), 0, 0, 0, 0, 0, 0, 0]
        row[place] = choice
        assert is_possible(np.array([row]), frames, env.menu)[0] == possible, HEADS[place]


def test_blueprints_a_task_does_not_have_cannot_be_sown() -> None:
    env = GrowthVectorEnv("digits", num_blueprints=6)
    frames = Frames.empty(1, 5)
    frames.slot("stage")[:, 0] = Stage.DORMANT
    rows = np.array([[int(Op.GERMINATE), 0, place, 0, 0, 0, 0, 0] for place in range(6)])
    assert which_possible(rows, action_masks(frames, env.menu))[0].tolist() == [True] * 4 + [False] * 2


def test_samples_reach_everything_that_is_possible() -> None:
    env = GrowthVectorEnv("digits", num_envs=1)
    frames = Frames.empty(1, 4)
    frames.slot("stage")[:, :2] = [Stage.BLENDING, Stage.DORMANT]
    frames.slot("gate_open")[:] = 0.0
    masks, generator = action_masks(frames, env.menu), np.random.default_rng(0)
    drawn = np.concatenate([sample_choices(masks, generator) for _ in range(400)])
    assert {(int(op), int(slot)) for op, slot in drawn[:, :2]} == {(0, 0), (1, 1), (3, 0), (4, 0)}
    assert set(drawn[drawn[:, 0] == Op.SET_ALPHA_TARGET, 6]) == {1, 2, 3}
    assert set(drawn[drawn[:, 0] == Op.PRUNE, 6]) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_every_blueprint_of_a_task_fits_every_point_with_every_style(name: str) -> None:
    """The mask lets all of them germinate everywhere."""
    episode = Episode(tasks.get(name), GrowthEnvConfig(total_steps=2, tick_steps=1, growth=LENIENT), 0, 0)
    for slot, blueprint, style in itertools.product(
        range(len(episode.menu.slots)), range(len(episode.menu.blueprints)), range(4)
    ):
        choices = [int(Op.GERMINATE), slot, blueprint, style, 0, 2, 0, 0]
        control.execute(episode.model, episode.menu.action(choices))
        control.execute(episode.model, episode.menu.action([int(Op.PRUNE), slot, 0, 0, 0, 0, 0, 0]))
        for _ in range(10):
            episode.model.tick()
