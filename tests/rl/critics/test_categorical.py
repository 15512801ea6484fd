"""The categorical critic: where a target's probability goes, the loss, and what is read from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from morphogen.rl.critics import CategoricalCritic

NORMAL = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000)


def mean_of(critic: CategoricalCritic, mass: Tensor) -> Tensor:
    return (mass * critic.atoms_K).sum(-1)


@settings(max_examples=50, deadline=None)
@given(
    targets=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6),
    bins=st.integers(2, 60),
    sigma=st.sampled_from([0.0, 0.5, 0.75, 2.0]),
)
def test_mass_is_kept(targets: list[float], bins: int, sigma: float) -> None:
    mass = CategoricalCritic(-7.0, 9.0, bins, sigma).mass(torch.tensor([targets]))
    assert mass.shape == (1, bins)
    assert mass.min() >= -1e-7
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(targets=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=6), bins=st.integers(2, 60))
def test_shared_mass_keeps_the_mean(targets: list[float], bins: int) -> None:
    critic = CategoricalCritic(-7.0, 9.0, bins, sigma=0.0)
    expected = torch.tensor(targets).clamp(-7.0, 9.0).mean().item()
    assert mean_of(critic, critic.mass(torch.tensor([targets]))).item() == pytest.approx(expected, abs=1e-4)


def test_exact_hits_and_targets_out_of_reach_have_one_atom() -> None:
    critic = CategoricalCritic(-1.0, 1.0, 5, sigma=0.0)
    targets = torch.tensor([[-1.0], [-0.5], [0.0], [0.5], [1.0], [-100.0], [100.0]])
    expected = torch.eye(5)[[0, 1, 2, 3, 4, 0, 4]]
    assert torch.equal(critic.mass(targets), expected)


@pytest.mark.parametrize("bins", [2, 3, 51, 101])
def test_every_atom_of_an_uneven_support_is_hit_exactly(bins: int) -> None:
    critic = CategoricalCritic(-0.7, 1.3, bins, sigma=0.0)
    torch.testing.assert_close(critic.mass(critic.atoms_K.unsqueeze(-1)), torch.eye(bins), atol=2e-5, rtol=0.0)


def test_smoothed_mass_is_that_of_the_normal_distribution() -> None:
    critic = CategoricalCritic(-2.0, 2.0, 9, sigma=1.5)

    def below(x: float, target: float) -> float:
        return 0.5 * (1 + math.erf((x - target) / (1.5 * 0.5 * math.sqrt(2))))

    for target in (-1.9, 0.1, 0.75):
        edges = [-math.inf, *(critic.atoms_K[:-1] + 0.25).tolist(), math.inf]
        expected = [below(high, target) - below(low, target) for low, high in zip(edges, edges[1:], strict=False)]
        torch.testing.assert_close(critic.mass(torch.tensor([[target]]))[0], torch.tensor(expected), atol=1e-6, rtol=0.0)


def test_smoothing_keeps_the_mean_but_at_the_ends() -> None:
    critic = CategoricalCritic(-5.0, 5.0, 51)
    targets = torch.linspace(-4.0, 4.0, 1001).unsqueeze(-1)
    error_spacings = (mean_of(critic, critic.mass(targets)) - targets.squeeze(-1)).abs() / critic.spacing
    assert error_spacings.max() < 4e-5  # of it, 3e-5 are float32
    at_the_end = (5.0 - mean_of(critic, critic.mass(torch.tensor([[5.0]])))) / critic.spacing
    assert 0.25 < at_the_end.item() < 0.35


def test_the_loss_is_a_cross_entropy_with_the_mean_mass(generator: torch.Generator) -> None:
    critic = CategoricalCritic(-3.0, 3.0, 13)
    logits = torch.randn(4, 13, generator=generator, requires_grad=True)
    targets = torch.randn(4, 5, generator=generator, requires_grad=True)
    losses = critic.loss(logits, targets)
    mass = critic.mass(targets)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, mass, reduction="none"))
    torch.testing.assert_close(mass, torch.stack([critic.mass(column) for column in targets.split(1, 1)]).mean(0))
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - mass)
    assert targets.grad is None


@pytest.mark.parametrize("sigma", [0.0, 0.75])
def test_the_learned_distribution_is_that_of_the_targets(fit: Callable[..., Tensor], sigma: float) -> None:
    critic = CategoricalCritic(-5.0, 5.0, 101, sigma)
    outputs = fit(critic, 1 + NORMAL / 2, lr=1.0)
    assert critic.value(outputs).item() == pytest.approx(1.0, abs=0.01)
    for level, exact in ((0.05, -2.0627), (0.25, -1.2711), (0.5, -0.7979), (1.0, 0.0)):
        assert critic.cvar(outputs, level).item() == pytest.approx(1 + exact / 2, abs=0.02)
        cut = torch.special.ndtri(torch.tensor(level)).item()
        assert level == 1.0 or abs(critic.quantile(outputs, level).item() - 1 - cut / 2) <= critic.spacing
    assert critic.samples(outputs, 64).std(correction=0).item() == pytest.approx(0.5, rel=0.04)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num=st.integers(1, 70), sharpness=st.sampled_from([0.0, 1.0, 40.0]))
def test_samples_rise_and_keep_the_mean(seed: int, num: int, sharpness: float) -> None:
    critic = CategoricalCritic()
    outputs = sharpness * torch.randn(2, 3, 51, generator=torch.Generator().manual_seed(seed))
    samples = critic.samples(outputs, num)
    assert samples.shape == (2, 3, num)
    assert (samples.diff() >= -2e-3).all()
    torch.testing.assert_close(samples.mean(-1), critic.value(outputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ends", [(-10.0, 10.0), (-10.0, 30.0), (-100.0, 50.0)])
def test_an_untrained_critic_expects_about_nothing(ends: tuple[float, float]) -> None:
    critic = CategoricalCritic(*ends)
    assert abs(critic.value(critic.initial_bias().unsqueeze(0)).item()) < 0.02 * (ends[1] - ends[0])


def test_an_untrained_critic_of_positive_returns_expects_the_low_end() -> None:
    critic = CategoricalCritic(5.0, 85.0)
    assert critic.value(critic.initial_bias().unsqueeze(0)).item() < 15.0


def test_clipping_is_refused() -> None:
    critic, logits, targets = CategoricalCritic(), torch.zeros(2, 51), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="`clip_range` must be None for a categorical critic, got 0.2"):
        critic.loss(logits, targets, logits, 0.2)
