"""Advantages against their definition, summed out; and the two ways to get truncation wrong."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from morphogen.rl.advantages import estimate_advantages, explained_variance


def by_definition(*, rewards, values, next_values, continues, gamma, gae_lambda):
    """Sum (gamma * lambda)**k * delta_{t+k} as long as the episode goes on."""
    advantages = np.zeros_like(rewards)
    for step in range(len(rewards)):
        weight = 1.0
        for later in range(step, len(rewards)):
            advantages[step] += weight * (rewards[later] + gamma * next_values[later] - values[later])
            weight *= gamma * gae_lambda
            if not continues[later]:
                break
    return advantages


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 12), gamma=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_equals_the_definition(seed: int, steps: int, gamma: float, gae_lambda: float) -> None:
    chance = np.random.default_rng(seed)
    rewards, values, next_values = chance.normal(size=(3, steps, 3))
    continues = chance.random((steps, 3)) < 0.7
    found = estimate_advantages(rewards, values, next_values, continues, gamma=gamma, gae_lambda=gae_lambda)
    for env in range(3):
        expected = by_definition(
            rewards=rewards[:, env],
            values=values[:, env],
            next_values=next_values[:, env],
            continues=continues[:, env],
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        np.testing.assert_allclose(found[:, env], expected, rtol=1e-9, atol=1e-12)


def test_a_truncated_episode_does_not_see_the_rewards_of_the_next() -> None:
    rewards = np.array([0, 0, 0, 100, 100, 100.0])[:, None]
    zeros = np.zeros_like(rewards)
    continues = np.array([True, True, False, True, True, False])[:, None]
    advantages = estimate_advantages(rewards, zeros, zeros, continues, gamma=0.99, gae_lambda=0.95)
    assert (advantages[:3] == 0).all()
    assert (advantages[3:] > 99).all()


def test_lambda_one_is_the_return_minus_the_value() -> None:
    rewards, values = np.ones((3, 1)), np.full((3, 1), 5.0)
    next_values = np.array([[5.0], [5.0], [7.0]])
    advantages = estimate_advantages(
        rewards, values, next_values, np.array([[True], [True], [False]]), gamma=0.5, gae_lambda=1.0
    )
    np.testing.assert_allclose(advantages[:, 0] + 5.0, [1 + 0.5 + 0.25 + 0.125 * 7, 1 + 0.5 + 0.25 * 7, 1 + 0.5 * 7])


def test_explained_variance_is_one_for_the_truth_and_zero_for_a_constant() -> None:
    returns = np.array([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(np.zeros(3), returns) == 0.0
    assert np.isnan(explained_variance(returns, np.ones(3)))
