"""Sampled returns against a row-by-row oracle, and the choice of samples for a minibatch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from morphogen.rl.critics import choose_samples, lowest_samples, sample_returns


def row_by_row(rewards: Tensor, goes_on: Tensor, bootstrap: Tensor, choices: Tensor, *, gamma: float, lam: float) -> Tensor:
    returns = torch.zeros_like(bootstrap)
    T, N, S = bootstrap.shape
    for n in range(N):
        for s in range(S):
            for t in reversed(range(T)):
                follow = t < T - 1 and bool(goes_on[t, n]) and choices[t, n, s].item() < lam
                rest = returns[t + 1, n, s] if follow else bootstrap[t, n, s]
                returns[t, n, s] = rewards[t, n] + gamma * rest
    return returns


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 19),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_all_rows_at_once_equals_row_by_row(seed: int, steps: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, ends = torch.randn(steps, 2, generator=generator), torch.rand(steps, 2, generator=generator)
    bootstrap, choices = torch.randn(2, steps, 2, 3, generator=generator)
    choices = torch.special.ndtr(choices)
    goes_on = (ends < 0.8).float()
    fast = sample_returns(rewards, goes_on, bootstrap, gamma=gamma, lam=lam, choices_TNS=choices)
    torch.testing.assert_close(
        fast, row_by_row(rewards, goes_on, bootstrap, choices, gamma=gamma, lam=lam), atol=1e-5, rtol=1e-5
    )


def test_at_lambda_one_a_sample_is_the_return() -> None:
    rewards = torch.arange(1.0, 8.0).unsqueeze(-1)
    goes_on = torch.tensor([1, 1, 0, 1, 1, 1, 0]).unsqueeze(-1)
    zeros = torch.zeros(7, 1, 4)
    returns = sample_returns(rewards, goes_on, zeros, gamma=1.0, lam=1.0, choices_TNS=torch.full((7, 1, 4), 0.999))
    assert torch.equal(returns[:, 0], torch.tensor([6.0, 5, 3, 22, 18, 13, 7]).unsqueeze(-1).expand(7, 4))


def test_the_mean_over_choices_is_the_lambda_return(generator: torch.Generator) -> None:
    T, gamma, lam, num = 6, 0.9, 0.7, 40_000
    rewards, bootstrap = torch.randn(2, T, 1, generator=generator)
    goes_on = torch.tensor([1, 1, 1, 0, 1, 1]).unsqueeze(-1)
    expected = torch.zeros(T)
    following = torch.zeros(1)
    for t in reversed(range(T)):
        mixed = lam * following + (1 - lam) * bootstrap[t] if goes_on[t] and t < T - 1 else bootstrap[t]
        following = rewards[t] + gamma * mixed
        expected[t] = following.item()
    choices = torch.rand(T, 1, num, generator=generator)
    returns = sample_returns(
        rewards, goes_on, bootstrap.unsqueeze(-1).expand(T, 1, num), gamma=gamma, lam=lam, choices_TNS=choices
    )
    error = 4 * returns.std(-1) / math.sqrt(num) + 1e-5
    assert ((returns.mean(-1).squeeze(-1) - expected).abs() < error.squeeze(-1)).all()


def test_truncated_episodes_do_not_see_each_other() -> None:
    rewards = torch.tensor([0.0, 0, 0, 100, 100, 100]).unsqueeze(-1)
    goes_on = torch.tensor([True, True, False, True, True, False]).unsqueeze(-1)
    zeros = torch.zeros(6, 1, 2)
    returns = sample_returns(rewards, goes_on, zeros, gamma=1.0, lam=1.0, choices_TNS=zeros)
    assert returns[:, 0, 0].tolist() == [0, 0, 0, 300, 200, 100]


@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_filler_rows_change_no_bit(poison: float, generator: torch.Generator) -> None:
    T, N, S = 9, 3, 4
    rewards, bootstrap = torch.randn(T, N, generator=generator), torch.randn(T, N, S, generator=generator)
    choices = torch.rand(T, N, S, generator=generator)
    goes_on, valid = torch.ones(T, N, dtype=torch.bool), torch.ones(T, N, dtype=torch.bool)
    for t, n in ((3, 0), (6, 0), (0, 1), (8, 2)):
        valid[t, n] = False
        goes_on[max(t - 1, 0), n] = False

    def returns(filler: float) -> Tensor:
        dirty_rewards = rewards.where(valid, torch.tensor(filler))
        dirty_bootstrap = bootstrap.where(valid.unsqueeze(-1), torch.tensor(filler))
        return sample_returns(dirty_rewards, goes_on, dirty_bootstrap, gamma=0.97, lam=0.9, choices_TNS=choices, valid_TN=valid)

    assert torch.equal(returns(poison), returns(0.0))
    assert not returns(poison)[~valid].any()
    assert returns(poison)[valid].isfinite().all()


def test_arguments_are_left_as_they_were(generator: torch.Generator) -> None:
    rewards, bootstrap = torch.randn(4, 2, generator=generator), torch.randn(4, 2, 3, generator=generator, requires_grad=True)
    goes_on, choices = torch.ones(4, 2), torch.rand(4, 2, 3, generator=generator)
    before = [tensor.clone() for tensor in (rewards, bootstrap, goes_on, choices)]
    returns = sample_returns(rewards, goes_on, bootstrap, gamma=0.9, lam=0.5, choices_TNS=choices, valid_TN=goes_on.bool())
    assert not returns.requires_grad
    for tensor, copy in zip((rewards, bootstrap, goes_on, choices), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(("num_samples", "num_chosen"), [(32, 8), (32, 5), (3, 3), (7, 1)])
def test_every_sample_is_chosen_as_often(num_samples: int, num_chosen: int, generator: torch.Generator) -> None:
    rows = 60_000
    samples = torch.arange(float(num_samples)).expand(rows, num_samples)
    chosen = choose_samples(samples, torch.rand(rows, num_chosen, generator=generator))
    share = torch.bincount(chosen.flatten().long(), minlength=num_samples) / chosen.numel()
    assert (share * num_samples - 1).abs().max() < 5 * math.sqrt(num_samples / chosen.numel())
    parts = torch.arange(num_chosen) * num_samples / num_chosen
    assert (chosen >= parts.floor()).all() and (chosen <= parts + num_samples / num_chosen).all()


def test_noise_just_below_one_does_not_leave_the_row() -> None:
    samples = torch.arange(32.0).unsqueeze(0)
    largest = torch.full((1, 8), 1.0).nextafter(torch.zeros(1))
    assert choose_samples(samples, largest)[0, -1] == 31.0


def test_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="`noise_BM` must have at most 4 columns, got 5"):
        choose_samples(torch.zeros(2, 4), torch.zeros(2, 5))


def test_the_lowest_critic_is_taken_row_by_row(generator: torch.Generator) -> None:
    samples = torch.randn(2, 5, 3, 8, generator=generator)
    lowest = lowest_samples(samples)
    for i in range(5):
        for j in range(3):
            assert torch.equal(lowest[i, j], min(samples[:, i, j], key=lambda row: row.mean().item()))
    assert torch.equal(lowest_samples(samples[:1]), samples[0])
