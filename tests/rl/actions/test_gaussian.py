from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from morphogen.rl.actions import ActionConfig, ActionDistribution, GaussianDistribution, SquashedGaussianDistribution, make

BOX = Box(np.array([-2.0, 1.0]), np.array([2.0, 11.0]), dtype=np.float64)


def gaussian(log_std: list[float]) -> GaussianDistribution:
    actions = make(Box(-1.0, 1.0, (len(log_std),)))
    assert isinstance(actions, GaussianDistribution)
    actions.log_std_A.data = torch.tensor(log_std)
    return actions


def squashed(space: Box, log_std_init: float = 0.0) -> ActionDistribution:
    return make(space, ActionConfig(squash=True, log_std_init=log_std_init))


def test_it_is_torchs_normal(generator: torch.Generator) -> None:
    actions = gaussian([0.3, -1.2, 0.0])
    mean, other = torch.randn(2, 20, 3, generator=generator)
    drawn, log_prob_BH = actions.sample(mean, actions.noise((20,), generator))
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, actions.log_std_A.exp()), 1)
    result = actions.evaluate(mean, drawn)
    torch.testing.assert_close(result.log_prob_BH[:, 0], normal.log_prob(drawn))
    torch.testing.assert_close(result.entropy_B, normal.entropy())
    assert torch.equal(result.log_prob_BH, log_prob_BH)
    moved = actions.snapshot()
    actions.log_std_A.data += torch.tensor([0.4, -0.1, 0.0])
    now = torch.distributions.Independent(torch.distributions.Normal(other, actions.log_std_A.exp()), 1)
    torch.testing.assert_close(actions.kl(mean, other, None, moved), torch.distributions.kl_divergence(normal, now))
    same_spread = torch.distributions.Independent(torch.distributions.Normal(mean, actions.log_std_A.exp()), 1)
    torch.testing.assert_close(actions.kl(mean, other), torch.distributions.kl_divergence(same_spread, now))


def test_samples_have_the_mean_and_spread_that_they_should(generator: torch.Generator) -> None:
    actions = gaussian([0.5, -1.0])
    drawn, _ = actions.sample(torch.tensor([[3.0, -1.0]]).expand(100_000, 2), actions.noise((100_000,), generator))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([3.0, -1.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.tensor([0.5, -1.0]).exp(), atol=0.0, rtol=0.01)


def test_the_spread_learns_from_log_probability_entropy_and_kl() -> None:
    for name in ("log_prob_BH", "entropy_BH"):
        actions = gaussian([0.0, 0.0])
        getattr(actions.evaluate(torch.zeros(3, 2), torch.full((3, 2), 2.0)), name).sum().backward()
        assert actions.log_std_A.grad is not None and (actions.log_std_A.grad > 0).all()
    actions = gaussian([0.0, 0.0])
    actions.kl(torch.zeros(3, 2), torch.zeros(3, 2), None, torch.full((2,), -1.0)).sum().backward()
    assert actions.log_std_A.grad is not None and (actions.log_std_A.grad > 0).all()


def test_what_is_stored_is_before_clipping() -> None:
    actions = gaussian([0.0])
    drawn, log_prob_BH = actions.sample(torch.zeros(1, 1), torch.full((1, 1), 3.0))
    assert drawn.item() == 3.0 and actions.to_env(drawn.detach()).item() == 1.0
    assert log_prob_BH.item() == pytest.approx(-4.5 - 0.5 * np.log(2 * np.pi))


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-0.5, 0.7)])
def test_the_squashed_density_is_that_of_the_environments_action(mean: float, log_std: float) -> None:
    actions = squashed(Box(-3.0, 7.0, (1,), np.float64), log_std)
    u = torch.linspace(-14, 14, 400_001, dtype=torch.float64)[:, None]
    result = actions.evaluate(torch.full_like(u, mean), u)
    value = actions.to_env(u)[:, 0]
    density = result.log_prob_BH.detach()[:, 0].exp().numpy()
    assert np.trapezoid(density, value) == pytest.approx(1, abs=1e-4)
    slope = np.gradient(value, u[:, 0].numpy())
    normal = torch.distributions.Normal(mean, np.exp(log_std)).log_prob(u)[:, 0].exp().numpy()
    middle = slice(150_000, 250_000)
    np.testing.assert_allclose(density[middle], normal[middle] / slope[middle], rtol=1e-4)


@pytest.mark.parametrize("u", [-400.0, -20.0, 0.0, 20.0, 400.0])
def test_saturated_actions_have_a_finite_log_probability_and_gradient(u: float) -> None:
    actions = squashed(Box(-1.0, 1.0, (1,)))
    mean = torch.full((1, 1), u, requires_grad=True)
    result = actions.evaluate(mean, torch.tensor([[u + 0.5]]))
    (result.log_prob_BH + result.entropy_BH).sum().backward()
    assert mean.grad is not None and mean.grad.isfinite().all() and result.log_prob_BH.isfinite().all()
    expected = -0.125 - 0.5 * np.log(2 * np.pi) + 2 * abs(u + 0.5) - 2 * np.log(2)
    if abs(u) >= 20:
        assert result.log_prob_BH.item() == pytest.approx(expected, rel=1e-5)
    assert actions.to_env(torch.tensor([[u]])).item() == pytest.approx(np.tanh(u))


@pytest.mark.parametrize(("log_std", "tolerance"), [(-2.0, 1e-4), (0.0, 0.001), (np.log(1.5), 0.01), (np.log(3.0), 0.11)])
@pytest.mark.parametrize("mean", [0.0, 0.7, 3.0])
def test_the_entropy_of_squashed_actions_is_off_by_no_more_than_stated(mean: float, log_std: float, tolerance: float) -> None:
    actions = squashed(Box(-3.0, 7.0, (1,)), log_std)
    outputs = torch.full((1, 1), mean, dtype=torch.float64)
    u = mean + np.exp(log_std) * torch.linspace(-9, 9, 200_001, dtype=torch.float64)[:, None]
    log_prob = actions.evaluate(outputs.expand(len(u), 1), u).log_prob_BH.detach()[:, 0].numpy()
    chance = torch.distributions.Normal(mean, np.exp(log_std)).log_prob(u)[:, 0].exp().numpy()
    exact = -np.trapezoid(chance * log_prob, u[:, 0].numpy())
    assert actions.evaluate(outputs, outputs).entropy_B.item() == pytest.approx(exact, abs=tolerance)


def test_squashing_scales_each_dimension_to_its_own_range_and_changes_no_kl(generator: torch.Generator) -> None:
    actions = squashed(BOX)
    assert isinstance(actions, SquashedGaussianDistribution)
    np.testing.assert_allclose(
        actions.to_env(torch.tensor([[-50.0, -50.0], [0.0, 0.0], [50.0, 50.0]])), [[-2, 1], [0, 6], [2, 11]]
    )
    old, new = torch.randn(2, 4, 2, generator=generator)
    assert torch.equal(actions.kl(old, new), actions.gaussian.kl(old, new))
    noise = actions.noise((4,), generator)
    drawn, log_prob_BH = actions.sample(old, noise)
    assert torch.equal(actions.evaluate(old, drawn).log_prob_BH, log_prob_BH)
    assert torch.equal(actions.mode(old), old)
    inside = torch.distributions.Normal(old, 1.0).log_prob(drawn) - torch.log(1 - torch.tanh(drawn) ** 2)
    expected = (inside - torch.log(torch.tensor([2.0, 5.0]))).sum(1)
    torch.testing.assert_close(log_prob_BH[:, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    for actions in (gaussian([0.0, 0.0]), squashed(BOX)):
        outputs = torch.randn(5, 2, generator=generator).to(dtype)
        drawn, log_prob_BH = actions.sample(outputs, actions.noise((5,), generator))
        result = actions.evaluate(outputs, drawn)
        assert drawn.dtype == log_prob_BH.dtype == result.entropy_BH.dtype == torch.float32
        assert torch.equal(log_prob_BH, actions.evaluate(outputs.float(), drawn).log_prob_BH)


@pytest.mark.parametrize("actions", [gaussian([0.0]), squashed(Box(-1.0, 1.0, (1,)))])
def test_a_mask_is_refused(actions: ActionDistribution) -> None:
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    calls: list[Any] = [
        lambda: actions.sample(zeros, zeros, mask),
        lambda: actions.mode(zeros, mask),
        lambda: actions.evaluate(zeros, zeros, mask),
        lambda: actions.kl(zeros, zeros, mask),
        lambda: actions.flatten_mask([[True]], 1),
        lambda: actions.check_mask(mask.numpy()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="action mask must not be given for continuous actions"):
            call()
