"""What an agent is compared by when none of its episodes ended within the interval."""

from __future__ import annotations

import math

import pytest

from morphogen.pbt import PPOMember
from morphogen.pbt.snapshots import from_bytes, to_bytes
from morphogen.rl import PPO, PPOConfig


def member(seed: int) -> PPOMember:
    config = PPOConfig(num_envs=2, rollout_steps=32, epochs=1, minibatch_size=32, schedule_steps=4096, seed=seed)
    return PPOMember(PPO("CartPole-v1", config))


def test_after_a_takeover_it_is_as_good_as_its_source_until_an_episode_of_its_own_has_ended() -> None:
    source, target = member(0), member(1)
    best = source.train(512).score
    target.train(512)
    target.adopt(source.get_parameters(), "reset", seed=5)
    target.agent.config = target.agent.config.replace(rollout_steps=1)  # too short for an episode to end
    assert target.train(514).score == pytest.approx(best)
    saved = from_bytes(to_bytes(target.state_dict()))
    other = member(2)
    other.load_state_dict(saved)
    assert other.train(516).score == pytest.approx(best)
    own = target.train(1200)
    assert own.score != best and math.isfinite(own.score)
    for each in (source, target, other):
        each.close()


def test_one_that_never_ended_an_episode_has_no_score() -> None:
    fresh = member(0)
    fresh.agent.config = fresh.agent.config.replace(rollout_steps=1)
    assert math.isnan(fresh.train(2).score)
    fresh.close()
