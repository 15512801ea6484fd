"""Terms that remember: escrow and drip pay no more than was earned, and an advance on the loss goes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphogen.control import Op
from morphogen.envs.rewards import DripConfig, RewardConfig, Rewards

_ESCROW, _PLUS, _LOSS = (RewardConfig(preset=preset) for preset in ("escrow", "basic_plus", "loss"))
_CREDIT = 0.2 * math.tanh(1.0)  # of a story's seed


# -- escrow -----------------------------------------------------------------------------------------------------------


def test_escrow_adds_up_to_the_credit_at_fossilisation(story, play, grown) -> None:
    actions = grown(start=1, held=3)
    last = max(actions)
    paid = play(story(actions).records(RewardConfig().gamma), _ESCROW).terms["escrow"]
    assert paid.sum() == pytest.approx(_CREDIT)
    assert (paid[last:] == 0).all() and (paid[:last] > 0).any() and (paid <= 0.05 + 1e-12).all()


def test_a_fossil_too_early_keeps_only_what_was_credited_so_far(story, play, grown) -> None:
    contribution = lambda tick: 0.06 if tick > 10 else 0.0  # noqa: E731
    early = play(story(grown(start=1, held=2), contribution=contribution).records(RewardConfig().gamma), _ESCROW).terms[
        "escrow"
    ]
    late = play(story(grown(start=1, held=9), contribution=contribution).records(RewardConfig().gamma), _ESCROW).terms["escrow"]
    assert early.sum() == pytest.approx(0.05) and late.sum() == pytest.approx(_CREDIT)


@pytest.mark.parametrize("op", [Op.PRUNE, Op.WAIT])
def test_escrow_goes_back_with_a_prune_and_unfossilised_at_the_end(story, play, grown, op) -> None:
    paid = play(story(grown(start=1, held=None) | {20: (op, 0)}).records(RewardConfig().gamma), _ESCROW).terms["escrow"]
    back = 20 if op is Op.PRUNE else 39
    assert paid[back] == pytest.approx(-_CREDIT)
    assert paid.sum() == pytest.approx(0.0, abs=1e-12)


def test_escrow_goes_back_with_a_fault(story, play, grown) -> None:
    paid = play(story(grown(start=1, held=None), fault_at=16).records(RewardConfig().gamma), _ESCROW).terms["escrow"]
    assert len(paid) == 17 and paid[-1] < -0.1 and paid.sum() == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_escrow_pays_changes_of_what_it_holds_over_any_frames(random_records, seed) -> None:
    rewards, total_N = Rewards(_ESCROW, 3, 4), np.zeros(3)
    for record in random_records(seed, 8, RewardConfig().gamma, True):
        total_N += rewards.pay(record)[1]["escrow"]
        assert (rewards.ledger.credit_NS >= 0).all() and (rewards.ledger.credit_NS <= 0.2).all()
        np.testing.assert_allclose(total_N, rewards.ledger.credit_NS.sum(1), atol=1e-12)


# -- drip -------------------------------------------------------------------------------------------------------------


def _paid_for_a_fossil(story, play, grown, config=_PLUS, start=1, **parts) -> tuple[np.ndarray, np.ndarray]:
    terms = play(story(grown(start=start), **parts).records(config.gamma), config).terms
    return terms["attribution_at_once"], terms["drip"]


def test_a_fossil_that_goes_on_contributing_earns_its_pool_and_no_more(story, play, grown) -> None:
    at_once, drip = _paid_for_a_fossil(story, play, grown)
    assert at_once.sum() == pytest.approx(0.3 * _CREDIT)
    assert drip.sum() == pytest.approx(0.7 * _CREDIT)
    assert (drip[:14] == 0).all() and np.ptp(drip[14:]) < 1e-12  # evenly, from the tick after


def test_a_fossil_earns_no_more_by_contributing_more_and_less_by_contributing_less(story, play, grown) -> None:
    def pool(later: float) -> float:
        contribution = lambda tick: 0.06 if tick <= 13 else later  # noqa: E731
        return float(_paid_for_a_fossil(story, play, grown, contribution=contribution, together=lambda tick: 0.06)[1].sum())

    assert pool(1e6) == pytest.approx(0.7 * _CREDIT)
    assert pool(0.03) == pytest.approx(0.35 * _CREDIT)
    assert pool(-1e6) == pytest.approx(-0.7 * _CREDIT)


def test_a_fossil_of_the_last_ticks_does_not_earn_its_pool(story, play, grown) -> None:
    drip = _paid_for_a_fossil(story, play, grown, start=25)[1]  # fossilised at 37, two ticks are left
    assert drip.sum() == pytest.approx(0.7 * _CREDIT * 2 / 5)


def test_drip_never_pays_more_than_went_into_its_pool_whatever_the_clock_says(story, grown) -> None:
    rewards, records = Rewards(_PLUS, 1, 4), story(grown()).records(RewardConfig().gamma)
    for record in records[:14]:
        assert rewards.pay(record)[1]["drip"][0] == 0.0
    assert rewards.ledger.pool_NS.sum() == pytest.approx(0.7 * _CREDIT)
    paid = sum(float(rewards.pay(records[20])[1]["drip"][0]) for _ in range(60))
    assert paid == pytest.approx(0.7 * _CREDIT) and rewards.ledger.pool_NS.sum() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_paid_at_once_and_the_pool_are_the_whole(story, play, grown, share) -> None:
    config = RewardConfig(preset="basic_plus", drip=DripConfig(share=share))
    at_once, drip = _paid_for_a_fossil(story, play, grown, config)
    assert at_once.sum() == pytest.approx((1 - share) * _CREDIT) and drip.sum() == pytest.approx(share * _CREDIT)


# -- loss -------------------------------------------------------------------------------------------------------------


def _gain(story, before: float, after: float) -> float:
    record = story(loss=lambda tick: before if tick == 1 else after).records(RewardConfig().gamma)[1]
    return float(Rewards(_LOSS, 1, 4).pay(record)[1]["loss_gain"][0])


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_falling_loss_pays_a_rising_one_costs_the_same_is_nothing(story, before, after) -> None:
    assert np.sign(_gain(story, before, after)) == np.sign((before - after) / 2.3)
    assert _gain(story, before, after) == -_gain(story, after, before)


def test_the_better_the_more_up_to_a_clamp(story) -> None:
    assert 0 < _gain(story, 2.0, 1.9) < _gain(story, 2.0, 1.5) < _gain(story, 1e6, 0.0) == 5.0
    assert _gain(story, 2.0, 1.7) == pytest.approx(10 * 0.3 / math.log(10))


def test_the_first_tick_pays_nothing_and_so_does_a_loss_that_is_none(story) -> None:
    first = story().records(RewardConfig().gamma)[0]
    assert np.isnan(first.before.run("loss")[0])
    assert Rewards(_LOSS, 1, 4).pay(first)[1]["loss_gain"][0] == 0.0
    assert _gain(story, 2.0, np.inf) == _gain(story, 2.0, np.nan) == 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.995, 0.9])
def test_the_advance_for_the_loss_goes_back(story, play, gamma) -> None:
    config = RewardConfig(preset="loss", gamma=gamma)
    paid = play(story().records(gamma), config)
    assert paid.terms["loss_gain"][1] > 1.0 and paid.terms["loss_gain"][-1] < -1.0
    assert paid.discounted_sum("loss_gain", gamma) == pytest.approx(0.0, abs=1e-9)
    assert paid.discounted == pytest.approx(gamma**39 * paid.terms["loss_terminal"][-1], abs=1e-9)


# -- of all -----------------------------------------------------------------------------------------------------------


def test_a_new_episode_remembers_nothing_of_the_last_and_others_are_left_alone(story, grown) -> None:
    rewards = Rewards(_ESCROW, 1, 4)
    for record in story(grown(held=None)).records(RewardConfig().gamma)[:20]:
        rewards.pay(record)
    held = rewards.ledger
    assert held.credit_NS.sum() > 0.1
    rewards.forget(np.array([False]))
    assert rewards.ledger.credit_NS.sum() == held.credit_NS.sum()
    rewards.forget(np.array([True]))
    assert all((array == 0).all() for array in rewards.ledger.arrays().values())
    assert held.credit_NS.sum() > 0.1  # nobody writes to a ledger


@pytest.mark.parametrize("preset", ["escrow", "basic_plus", "loss"])
def test_saved_in_the_middle_and_loaded_it_pays_the_same(story, grown, preset) -> None:
    config, records = (
        RewardConfig(preset=preset),
        story(grown(held=None) | {13: (Op.FOSSILIZE, 0)}).records(RewardConfig().gamma),
    )
    if preset == "escrow":
        records = story(grown(held=None)).records(RewardConfig().gamma)
    rewards, loaded, fresh = (Rewards(config, 1, 4) for _ in range(3))
    for record in records[:18]:
        rewards.pay(record)
    loaded.load_state_dict(rewards.state_dict())
    rest = [[float(each.pay(record)[0][0]) for record in records[18:]] for each in (rewards, loaded, fresh)]
    assert rest[0] == rest[1] != rest[2]


def test_a_state_of_other_environments_is_refused() -> None:
    with pytest.raises(ValueError, match="other environments"):
        Rewards(_ESCROW, 2, 4).load_state_dict(Rewards(_ESCROW, 1, 4).state_dict())
    with pytest.raises(ValueError, match="must hold arrays"):
        Rewards(_ESCROW, 1, 4).load_state_dict({"credit_NS": np.zeros((1, 4))})
