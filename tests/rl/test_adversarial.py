"""Attacks against analytic optima, in and out of their bounds, without a trace on parameters or other chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from morphogen.rl.adversarial import AdversarialConfig, perturb, starting_noise
from morphogen.rl.schedules import Cosine, Linear

CONFIGS = [
    AdversarialConfig(norm=norm, steps=steps, step_ratio=ratio)
    for norm, steps, ratio in [
        ("linf", 1, None),
        ("linf", 3, None),
        ("linf", 10, 0.3),
        ("l2", 1, None),
        ("l2", 3, None),
        ("l2", 10, 0.3),
    ]
]
EVERY_ATTACK = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.norm}-{config.steps}")


def lengths(offset: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(offset, torch.inf if norm == "linf" else 2, dim=-1)


def gaussian_kl(mean_BA: Tensor, other_BA: Tensor) -> Tensor:
    """KL between Gaussians of deviation 1."""
    return 0.5 * (mean_BA - other_BA).square().sum(-1)


def against(policy: Callable[[Tensor], Tensor], clean: Tensor) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        anchor = policy(clean)
    return lambda observation: gaussian_kl(anchor, policy(observation))


@EVERY_ATTACK
def test_a_linear_policy_is_attacked_optimally(config: AdversarialConfig, generator: torch.Generator) -> None:
    """With one output w x the divergence is (w d)^2 / 2, whose maximum over the ball is known."""
    weight = torch.randn(6, 1, generator=generator)
    clean, epsilon = torch.randn(50, 6, generator=generator), 0.3
    worst = perturb(against(lambda x: x @ weight, clean), clean, epsilon, config, starting_noise(clean, generator))
    dual = weight.abs().sum() if config.norm == "linf" else weight.norm()
    expected = 0.5 * (epsilon * dual).square().expand(50)
    reached = gaussian_kl(clean @ weight, worst @ weight) / expected
    assert (reached <= 1.0 + 1e-4).all()
    one_step_l2 = 2.5**2 / (1.0 + 2.5**2)  # cos^2 of a step of 2.5 radii that starts a radius aside
    assert (reached > (0.999 if config.norm == "linf" else one_step_l2 if config.steps == 1 else 0.9)).all()


@EVERY_ATTACK
def test_it_beats_random_changes_of_the_same_size(config: AdversarialConfig, generator: torch.Generator) -> None:
    policy = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    clean = torch.randn(200, 8, generator=generator)
    divergence = against(policy, clean)
    worst = perturb(divergence, clean, 0.2, config, starting_noise(clean, generator))
    offset = torch.randn(200, 8, generator=generator)
    offset = offset.sign() if config.norm == "linf" else offset
    random = clean + offset * (lengths(worst - clean, config.norm) / lengths(offset, config.norm))[:, None]
    with torch.no_grad():
        assert divergence(worst).mean() > 2.0 * divergence(random).mean()


@EVERY_ATTACK
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_it_stays_in_ball_and_box_whatever_the_slope(
    config: AdversarialConfig, size: float, generator: torch.Generator
) -> None:
    clean = torch.rand(40, 5, generator=generator)
    low, high = torch.zeros(5), torch.ones(5)
    worst = perturb(
        lambda x: size * ((x - clean) @ torch.ones(5)).square(),
        clean,
        0.3,
        config,
        starting_noise(clean, generator),
        low=low,
        high=high,
    )
    assert (lengths(worst - clean, config.norm) <= 0.3 * (1 + 1e-5)).all()
    assert (worst >= low).all() and (worst <= high).all()
    assert (worst != clean).any(1).all()


def test_no_slope_stays_in_the_ball(generator: torch.Generator) -> None:
    for config in CONFIGS:
        clean = torch.randn(10, 4, generator=generator)
        worst = perturb(lambda x: 0.0 * x.sum(-1), clean, 0.1, config, starting_noise(clean, generator))
        assert worst.isfinite().all() and (lengths(worst - clean, config.norm) <= 0.1 * (1 + 1e-5)).all()


def test_entries_can_be_held_and_a_clean_value_outside_the_box_may_stay(generator: torch.Generator) -> None:
    clean = torch.tensor([[0.5, 1.0, 7.0]])
    config = AdversarialConfig(steps=2)
    low, high = torch.tensor([[-9.0, 1.0, -1.0]]), torch.tensor([[9.0, 1.0, 1.0]])
    worst = perturb(lambda x: x.sum(-1), clean, 0.25, config, starting_noise(clean, generator), low=low, high=high)
    assert worst.tolist() == [[0.75, 1.0, 7.0]]
    worst = perturb(lambda x: -x.sum(-1), clean, 0.25, config, starting_noise(clean, generator), high=high)
    assert worst.tolist() == [[0.25, 0.75, 6.75]]
    worst = perturb(lambda x: x.sum(-1), -clean, 0.25, config, starting_noise(clean, generator), low=-high)
    assert worst.tolist() == [[-0.25, -0.75, -6.75]]


@EVERY_ATTACK
def test_the_size_of_the_slope_does_not_matter(config: AdversarialConfig, generator: torch.Generator) -> None:
    clean, weight = torch.randn(10, 4, generator=generator), torch.randn(4, generator=generator)
    noise = starting_noise(clean, generator)
    attacks = [perturb(lambda x, of=size: (x @ weight) * of, clean, 0.1, config, noise) for size in (1.0, 1e-30)]
    torch.testing.assert_close(*attacks)


@EVERY_ATTACK
def test_nothing_but_the_observation_is_touched(config: AdversarialConfig, generator: torch.Generator) -> None:
    policy = nn.Linear(4, 2)
    policy(torch.ones(1, 4)).sum().backward()
    before = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    clean = torch.randn(6, 4, generator=generator)
    kept, noise, chance = clean.clone(), starting_noise(clean, generator), torch.get_rng_state()
    with torch.no_grad():
        first, second = (perturb(against(policy, clean), clean, 0.1, config, noise) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert torch.equal(clean, kept) and not clean.requires_grad
    assert torch.equal(torch.get_rng_state(), chance)
    after = [parameter.grad for parameter in policy.parameters()]
    assert all(new is not None and torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_rows_are_independent(generator: torch.Generator) -> None:
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    clean = torch.randn(5, 4, generator=generator)
    noise = starting_noise(clean, generator)
    other = torch.cat([clean[:1] + 3.0, clean[1:]])
    for config in CONFIGS:
        attacked = [perturb(against(policy, x), x, 0.1, config, noise) for x in (clean, other)]
        assert torch.equal(attacked[0][1:], attacked[1][1:])


def test_recurrent_policies_are_attacked_through_their_unroll(generator: torch.Generator) -> None:
    """Four environments, six steps: what an environment is attacked with depends on it alone."""
    core, head = nn.LSTM(3, 8), nn.Linear(8, 2)

    def policy(observation_LBD: Tensor) -> Tensor:
        return head(core(observation_LBD)[0])

    clean = torch.randn(6, 4, 3, generator=generator)
    noise, config = starting_noise(clean, generator), AdversarialConfig(steps=3)
    divergence = against(policy, clean)
    worst = perturb(divergence, clean, 0.3, config, noise)
    assert worst.shape == clean.shape and (lengths(worst - clean, "linf") <= 0.3 * (1 + 1e-5)).all()
    with torch.no_grad():
        assert divergence(worst).mean() > 2.0 * divergence(clean + 0.3 * noise.sign()).mean()
    disturbed = clean.clone()
    disturbed[:, 0] += 1.0
    again = perturb(against(policy, disturbed), disturbed, 0.3, config, noise)
    assert torch.equal(again[:, 1:], worst[:, 1:]) and not torch.equal(again[:, 0] - 1.0, worst[:, 0])
    assert all(parameter.grad is None for parameter in (*core.parameters(), *head.parameters()))


def test_the_robust_loss_is_analytic_and_lowers_what_it_should(generator: torch.Generator) -> None:
    """For a linear policy it is ``(epsilon |w|_1)^2 / 2``, and its gradient shrinks the weights."""
    policy = nn.Linear(5, 1, bias=False)
    clean, config = torch.randn(20, 5, generator=generator), AdversarialConfig(steps=3)
    divergence = against(policy, clean)
    worst = perturb(divergence, clean, 0.2, config, starting_noise(clean, generator))
    loss = gaussian_kl(policy(clean), policy(worst)).mean()
    loss.backward()
    weight = policy.weight.detach()
    assert float(loss.detach()) == pytest.approx(float(0.5 * (0.2 * weight.abs().sum()) ** 2), rel=1e-3)
    assert policy.weight.grad is not None
    torch.testing.assert_close(policy.weight.grad, 0.2**2 * weight.abs().sum() * weight.sign(), rtol=1e-3, atol=1e-6)


def test_epsilon_0_is_no_attack() -> None:
    clean = torch.randn(3, 4)
    same = perturb(lambda x: x.sum(-1), clean, 0.0, AdversarialConfig(), torch.zeros(3, 4))
    assert torch.equal(same, clean) and same.data_ptr() != clean.data_ptr()


def test_epsilon_follows_the_closed_form_whatever_was_asked_before() -> None:
    linear = AdversarialConfig(epsilon=Linear(start=0.1, end=0.01), coefficient=Linear(start=0.0, end=0.2, until=0.5))
    cosine = AdversarialConfig(epsilon=Cosine(start=0.1, end=0.01))
    for _ in range(3):
        assert [linear.epsilon_at(update / 100) for update in (0, 25, 100)] == pytest.approx([0.1, 0.0775, 0.01])
        assert cosine.epsilon_at(0.25) == pytest.approx(0.0868, abs=1e-4)
        assert [linear.coefficient_at(fraction) for fraction in (0.0, 0.25, 1.0)] == pytest.approx([0.0, 0.1, 0.2])


def test_noise_is_uniform_and_of_the_observations_kind(generator: torch.Generator) -> None:
    noise = starting_noise(torch.zeros(1000, 8, dtype=torch.float64), generator)
    assert noise.dtype == torch.float64 and noise.min() >= -1.0 and noise.max() < 1.0
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02) and float(noise.var()) == pytest.approx(1 / 3, abs=0.01)


def test_misuse_is_refused() -> None:
    clean, config = torch.zeros(2, 3), AdversarialConfig()
    for epsilon in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="`epsilon` must be a finite number >= 0"):
            perturb(lambda x: x.sum(-1), clean, epsilon, config, clean)
    with pytest.raises(ValueError, match=r"`noise_BD` must have the observations' shape \(2, 3\), got \(3,\)"):
        perturb(lambda x: x.sum(-1), clean, 0.1, config, torch.zeros(3))
    with pytest.raises(ValueError, match="`epsilon` must be a finite number >= 0.0, got -0.1 at fraction 1.0"):
        AdversarialConfig(epsilon=Linear(start=0.1, end=-0.1))
    for settings in ({"steps": 0}, {"step_ratio": 0.0}, {"norm": "l1"}, {"coefficient": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            AdversarialConfig(**settings)
