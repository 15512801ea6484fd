"""Critics on a decision problem whose return distribution is known: ten steps, each of reward +1 or -1 with equal chance."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from morphogen.rl.critics import CategoricalCritic, Critic, QuantileCritic, ScalarCritic, choose_samples, sample_returns

STEPS, NUM_ENVS, SAMPLES = 10, 64, 32
DEVIATION = torch.arange(STEPS, 0, -1).sqrt() / math.sqrt(STEPS)


def trained(critic: Critic, lam: float, rounds: int = 400, lr: float = 0.05, shared_mean: bool = False) -> Tensor:
    """Return the outputs of a table critic, a row for each step; with ``shared_mean`` it sees the mean of its targets alone."""
    generator = torch.Generator().manual_seed(0)
    table = torch.nn.Parameter(critic.initial_bias().repeat(STEPS, 1))
    optimizer = torch.optim.Adam([table], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rounds)
    goes_on = torch.ones(STEPS, NUM_ENVS)
    goes_on[-1] = 0
    for _ in range(rounds):
        rewards = (2 * torch.randint(2, (STEPS, NUM_ENVS), generator=generator) - 1) / math.sqrt(STEPS)
        ahead = critic.samples(table.detach(), SAMPLES)
        ahead = torch.cat((ahead[1:], torch.zeros_like(ahead[:1]))).unsqueeze(1).expand(-1, NUM_ENVS, -1)
        choices = torch.rand(ahead.shape, generator=generator)
        targets = sample_returns(rewards, goes_on, ahead, gamma=1.0, lam=lam, choices_TNS=choices).flatten(0, 1)
        if shared_mean or not critic.is_distributional:
            targets = targets.mean(-1, keepdim=True)
        else:
            targets = choose_samples(targets, torch.rand(len(targets), 8, generator=generator))
        optimizer.zero_grad()
        critic.loss(table.repeat_interleave(NUM_ENVS, 0), targets).mean().backward()
        optimizer.step()
        schedule.step()
    return table.detach()


def deviation(critic: Critic, outputs: Tensor) -> Tensor:
    return critic.samples(outputs, SAMPLES).std(-1, correction=0)


@pytest.mark.parametrize(
    "critic",
    [QuantileCritic(), QuantileCritic(monotone=True), CategoricalCritic(-2.0, 2.0, 41, sigma=0.0)],
    ids=["quantile", "monotone", "categorical"],
)
def test_the_spread_is_right_at_lambda_one(critic: Critic) -> None:
    outputs = trained(critic, lam=1.0)
    torch.testing.assert_close(deviation(critic, outputs), DEVIATION, rtol=0.05, atol=0.0)
    assert critic.value(outputs).abs().max() < 0.05
    # The worst quarter of ten fair steps: the mean of the lowest quarter of a binomial distribution.
    counts = [math.comb(10, k) for k in range(11)]
    left, total = 2**10 / 4, 0.0
    for k, count in enumerate(counts):
        taken = min(count, max(left, 0))
        total, left = total + taken * (2 * k - 10) / math.sqrt(10), left - taken
    assert critic.cvar(outputs, 0.25)[0].item() == pytest.approx(total / 256, rel=0.05)


def test_bootstrapped_samples_lose_little_spread() -> None:
    critic = QuantileCritic()
    for lam, tolerance in ((0.95, 0.06), (0.0, 0.08)):
        ratio = deviation(critic, trained(critic, lam)) / DEVIATION
        assert ratio.min() > 1 - tolerance and ratio.max() < 1 + tolerance


def test_lambda_returns_alone_teach_too_narrow_a_distribution() -> None:
    critic = QuantileCritic()
    ratio = deviation(critic, trained(critic, lam=0.5, shared_mean=True)) / DEVIATION
    assert ratio[0] < 0.6


def test_the_mean_of_the_quantiles_is_what_a_scalar_critic_learns(fit: Callable[..., Tensor]) -> None:
    skewed = -torch.log1p(-(torch.arange(500) + 0.5) / 500)
    targets = torch.linspace(-1, 2, STEPS).unsqueeze(-1) + skewed
    learned = [critic.value(fit(critic, targets, steps=1000, lr=0.1)) for critic in (ScalarCritic(), QuantileCritic())]
    torch.testing.assert_close(learned[0], targets.mean(-1), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(learned[1], learned[0], atol=0.015, rtol=0.0)


def test_the_mean_of_the_categories_is_what_a_scalar_critic_learns(fit: Callable[..., Tensor]) -> None:
    targets = torch.linspace(-1, 2, STEPS).unsqueeze(-1) - torch.log(torch.linspace(0.01, 1.0, 50))
    critic = CategoricalCritic(-5.0, 12.0, 60)
    torch.testing.assert_close(critic.value(fit(critic, targets, lr=1.0)), targets.mean(-1), atol=0.002, rtol=0.0)
