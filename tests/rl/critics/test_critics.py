"""What all critics share: clipping, row checks, dtypes, and the config that names them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from morphogen.rl.critics import CategoricalCritic, Critic, CriticConfig, QuantileCritic, ScalarCritic, make

ALL = [ScalarCritic(), QuantileCritic(8), QuantileCritic(8, monotone=True), CategoricalCritic(bins=9)]
CLIPPED = ALL[:3]
NAMES = ["scalar", "quantile", "monotone", "categorical"]
every = pytest.mark.parametrize("critic", ALL, ids=NAMES)
clipped = pytest.mark.parametrize("critic", CLIPPED, ids=NAMES[:3])


def test_the_scalar_loss_is_the_squared_error(generator: torch.Generator) -> None:
    outputs, targets = torch.randn(7, 1, generator=generator), torch.randn(7, 4, generator=generator)
    expected = torch.stack([(outputs[:, 0] - column).square() for column in targets.unbind(1)]).mean(0)
    torch.testing.assert_close(ScalarCritic().loss(outputs, targets), expected)


def test_a_scalar_critic_knows_the_value_alone() -> None:
    outputs = torch.tensor([[2.0], [3.0]])
    assert ScalarCritic().value(outputs).tolist() == [2.0, 3.0]
    assert ScalarCritic().samples(outputs, 32).tolist() == [[2.0], [3.0]]
    for readout in (ScalarCritic().cvar, ScalarCritic().quantile):
        with pytest.raises(ValueError, match='`kind` of the critic must be "quantile" or "categorical"'):
            readout(outputs, 0.1)


@clipped
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), clip_range=st.sampled_from([1e-3, 0.2, 5.0]))
def test_clipping_never_lowers_the_loss_of_a_row(critic: Critic, seed: int, clip_range: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, old = torch.randn(2, 6, critic.num_outputs, generator=generator)
    targets = torch.randn(6, 3, generator=generator)
    assert (critic.loss(outputs, targets, old, clip_range) >= critic.loss(outputs, targets)).all()


@clipped
def test_clipping_is_the_larger_of_two_losses(critic: Critic, generator: torch.Generator) -> None:
    outputs, old = torch.randn(2, 6, critic.num_outputs, generator=generator)
    targets = torch.randn(6, 3, generator=generator)
    free = QuantileCritic(8) if isinstance(critic, QuantileCritic) else critic
    now, before = critic.samples(outputs, critic.num_outputs), critic.samples(old, critic.num_outputs)
    near = torch.minimum(torch.maximum(now, before - 0.1), before + 0.1)
    expected = torch.maximum(free.loss(now, targets), free.loss(near, targets))
    torch.testing.assert_close(critic.loss(outputs, targets, old, 0.1), expected)
    assert (expected > free.loss(now, targets)).any()


@clipped
def test_within_the_range_clipping_changes_nothing(critic: Critic, generator: torch.Generator) -> None:
    old = torch.randn(6, critic.num_outputs, generator=generator, requires_grad=True)
    outputs = (old + 1e-3).detach().requires_grad_()
    targets = torch.randn(6, 3, generator=generator)
    plain, limited = critic.loss(outputs, targets), critic.loss(outputs, targets, old, 0.5)
    torch.testing.assert_close(limited, plain)
    (expected,) = torch.autograd.grad(plain.sum(), outputs)
    limited.sum().backward()
    torch.testing.assert_close(outputs.grad, expected)
    assert old.grad is None


@clipped
def test_half_of_a_clip_is_refused(critic: Critic) -> None:
    outputs, targets = torch.zeros(2, critic.num_outputs), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="`old_outputs_BK` and `clip_range` must be given together"):
        critic.loss(outputs, targets, clip_range=0.2)
    with pytest.raises(ValueError, match="`old_outputs_BK` and `clip_range` must be given together"):
        critic.loss(outputs, targets, old_outputs_BK=outputs)


@every
def test_rows_that_would_be_broadcast_are_refused(critic: Critic) -> None:
    outputs = torch.zeros(4, critic.num_outputs)
    for targets in (torch.zeros(4), torch.zeros(1, 4), torch.zeros(4, 1, 1)):
        with pytest.raises(ValueError, match=r"`targets_BS` must be \[B, S\]"):
            critic.loss(outputs, targets)
    with pytest.raises(ValueError, match=r"`outputs_BK` is \[B, "):
        critic.loss(torch.zeros(4, critic.num_outputs + 1), torch.zeros(4, 1))


def test_the_config_makes_what_it_names() -> None:
    assert isinstance(make(CriticConfig()), ScalarCritic)
    quantile = make(CriticConfig(kind="quantile", num_quantiles=5, kappa=0.5, monotone=True))
    assert isinstance(quantile, QuantileCritic)
    assert (quantile.num_outputs, quantile.kappa, quantile.monotone) == (5, 0.5, True)
    categorical = make(CriticConfig(kind="categorical", low=0.0, high=4.0, bins=5, sigma=0.0))
    assert isinstance(categorical, CategoricalCritic)
    assert categorical.atoms_K.tolist() == [0, 1, 2, 3, 4] and categorical.sigma == 0


def test_defaults_are_declared_alike() -> None:
    quantile, categorical = make(CriticConfig(kind="quantile")), make(CriticConfig(kind="categorical"))
    assert isinstance(quantile, QuantileCritic) and isinstance(categorical, CategoricalCritic)
    assert (quantile.num_outputs, quantile.kappa, quantile.monotone) == (32, QuantileCritic().kappa, False)
    assert torch.equal(categorical.atoms_K, CategoricalCritic().atoms_K) and categorical.sigma == CategoricalCritic().sigma


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kappa": 1.0}, '`kappa` must be left out for a "scalar" critic, got 1.0. It has an effect with kind="quantile".'),
        ({"target_samples": 8, "samples_per_minibatch": 8}, "`target_samples` must be left out"),
        ({"kind": "quantile", "bins": 7}, '`bins` must be left out for a "quantile" critic'),
        ({"kind": "categorical", "num_quantiles": 7}, "`num_quantiles` must be left out"),
        ({"kind": "categorical", "low": 10.0}, "`low` must be below `high` = 10.0, got 10.0"),
        ({"kind": "categorical", "sigma": 0.3}, "`sigma` must be 0 or at least 0.5, got 0.3"),
        ({"kind": "quantile", "samples_per_minibatch": 64}, "`samples_per_minibatch` must be at most `target_samples` = 32"),
        ({"kind": "expectile"}, "`kind` must"),
        ({"kind": "quantile", "num_quantiles": 1}, "`num_quantiles` must"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        CriticConfig(**settings)


def test_a_config_can_be_replaced_and_reread() -> None:
    config = CriticConfig(kind="quantile", kappa=0.1, twin=True)
    assert CriticConfig(**config.model_dump()) == config
    assert config.replace(kappa=0.2).kappa == 0.2
