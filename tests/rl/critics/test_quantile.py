"""The quantile critic: its loss against the definition, what it converges to, and what is read from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from morphogen.rl.critics import QuantileCritic, ScalarCritic
from morphogen.rl.critics.quantile import _QuantileHuber

MIDPOINTS = (torch.arange(32) + 0.5) / 32
NORMAL = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000)


def by_definition(quantiles: list[float], targets: list[float], kappa: float) -> float:
    total = 0.0
    for i, quantile in enumerate(quantiles):
        for target in targets:
            u, tau = target - quantile, (i + 0.5) / len(quantiles)
            huber = u * u / (2 * kappa) if abs(u) <= kappa and kappa else abs(u) - kappa / 2
            total += abs(tau - (u < 0)) * huber
    return 4 * total / len(quantiles) / len(targets)


@pytest.mark.parametrize("kappa", [0.0, 0.02, 0.5, 3.0])
@pytest.mark.parametrize("num_targets", [1, 5])
def test_the_loss_is_the_definition(kappa: float, num_targets: int, generator: torch.Generator) -> None:
    outputs, targets = torch.randn(6, 7, generator=generator), torch.randn(6, num_targets, generator=generator)
    expected = [by_definition(row.tolist(), column.tolist(), kappa) for row, column in zip(outputs, targets, strict=True)]
    torch.testing.assert_close(QuantileCritic(7, kappa).loss(outputs, targets), torch.tensor(expected))


@pytest.mark.parametrize("kappa", [0.0, 0.3, 5.0])
def test_the_gradient_is_that_of_the_loss(kappa: float, generator: torch.Generator) -> None:
    quantiles = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    skew = QuantileCritic(5).skew_K.double()
    assert torch.autograd.gradcheck(lambda q: _QuantileHuber.apply(q, targets, skew, kappa), quantiles)


def test_the_loss_is_a_squared_error_where_all_quantiles_agree(generator: torch.Generator) -> None:
    value, targets = torch.randn(5, 1, generator=generator), torch.rand(5, 3, generator=generator)
    near = value + targets - 0.5
    torch.testing.assert_close(QuantileCritic(8, kappa=1.0).loss(value.expand(5, 8), near), ScalarCritic().loss(value, near))


def test_a_small_kappa_comes_to_the_plain_quantile_loss(generator: torch.Generator) -> None:
    outputs, targets = torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)
    plain = QuantileCritic(4, kappa=0.0).loss(outputs, targets)
    for kappa in (1e-1, 1e-3, 1e-5):
        assert (QuantileCritic(4, kappa).loss(outputs, targets) - plain).abs().max() <= 2 * kappa + 1e-6


@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize(
    ("sample", "expected"),
    [(NORMAL, torch.special.ndtri(MIDPOINTS)), (-torch.log1p(-torch.special.ndtr(NORMAL)), -torch.log1p(-MIDPOINTS))],
    ids=["normal", "exponential"],
)
def test_quantiles_come_out_in_order(fit: Callable[..., Tensor], monotone: bool, sample: Tensor, expected: Tensor) -> None:
    critic = QuantileCritic(kappa=0.001, monotone=monotone)
    learned = critic.quantiles(fit(critic, sample, steps=800, lr=0.1))[0]
    torch.testing.assert_close(learned, expected, atol=0.08, rtol=0.0)
    assert (learned.diff() > 0).all()


def test_two_returns_are_told_apart(fit: Callable[..., Tensor]) -> None:
    critic = QuantileCritic(8)
    outputs = fit(critic, torch.tensor([-1.0, 3.0, 3.0, 3.0]))
    torch.testing.assert_close(outputs, torch.tensor([[-1.0] * 2 + [3.0] * 6]), atol=0.1, rtol=0.0)
    assert critic.value(outputs).item() == pytest.approx(2.0, abs=0.05)
    assert critic.cvar(outputs, 0.25).item() == pytest.approx(-1.0, abs=0.1)


@pytest.mark.parametrize(
    ("kappa", "deviation", "errors"),
    [
        (0.0, 0.980, {0.05: -0.043, 0.1: -0.022, 0.25: -0.011}),
        (0.02, 0.975, {0.05: -0.047, 0.1: -0.027, 0.25: -0.017}),
        (0.25, 0.915, {0.05: -0.097, 0.1: -0.082, 0.25: -0.080}),
        (1.0, 0.775, {0.05: -0.217, 0.1: -0.213, 0.25: -0.224}),
    ],
)
def test_the_documented_errors_are_the_errors(
    fit: Callable[..., Tensor], kappa: float, deviation: float, errors: dict[float, float]
) -> None:
    critic = QuantileCritic(kappa=kappa)
    outputs = fit(critic, NORMAL)
    assert critic.samples(outputs, 32).std(correction=0).item() == pytest.approx(deviation, abs=0.006)
    for level, error in errors.items():
        cut = torch.special.ndtri(torch.tensor(level)).item()
        exact = -math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) / level
        assert critic.cvar(outputs, level).item() / exact - 1 == pytest.approx(error, abs=0.006)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_monotone_quantiles_never_fall(seed: int, scale: float) -> None:
    critic = QuantileCritic(16, monotone=True)
    outputs = scale * torch.randn(20, 16, generator=torch.Generator().manual_seed(seed))
    quantiles = critic.quantiles(outputs)
    assert (quantiles.diff() >= 0).all()
    torch.testing.assert_close(quantiles.mean(-1), critic.value(outputs), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(critic.value(outputs), outputs[:, 0])


def test_monotone_quantiles_start_as_those_of_the_normal_distribution() -> None:
    critic = QuantileCritic(monotone=True)
    start = critic.quantiles(critic.initial_bias().unsqueeze(0))[0]
    torch.testing.assert_close(start, torch.special.ndtri(MIDPOINTS), atol=1e-5, rtol=0.0)
    assert not QuantileCritic().initial_bias().any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), num=st.integers(1, 50))
def test_samples_rise_and_keep_the_mean(seed: int, num: int) -> None:
    critic = QuantileCritic(12)
    outputs = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(seed))
    samples = critic.samples(outputs, num)
    assert samples.shape == (3, 4, num)
    torch.testing.assert_close(samples.mean(-1), critic.value(outputs), atol=1e-5, rtol=1e-5)
    assert num == 12 or (samples.diff() >= -1e-4).all()


def test_as_many_samples_as_quantiles_are_the_quantiles(generator: torch.Generator) -> None:
    outputs = torch.randn(2, 12, generator=generator)
    assert torch.equal(QuantileCritic(12).samples(outputs, 12), outputs)


def test_readouts_do_not_mind_crossed_quantiles() -> None:
    critic, crossed = QuantileCritic(4), torch.tensor([[3.0, 0.0, 1.0, 2.0]])
    assert [critic.quantile(crossed, level).item() for level in (0.01, 0.25, 0.26, 0.5, 0.75, 1.0)] == [0, 0, 1, 1, 2, 3]
    assert [critic.cvar(crossed, level).item() for level in (0.25, 0.375, 0.5, 1.0)] == pytest.approx([0, 1 / 3, 0.5, 1.5])


def test_quantile_levels_survive_rounding() -> None:
    critic, outputs = QuantileCritic(50), torch.arange(50.0).unsqueeze(0)
    assert [critic.quantile(outputs, (i + 1) / 50).item() for i in range(50)] == list(range(50))


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, math.nan])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    for readout in (QuantileCritic().quantile, QuantileCritic().cvar):
        with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\]"):
            readout(torch.zeros(1, 32), level)


def test_a_tail_beyond_the_lowest_quantile_is_refused() -> None:
    with pytest.raises(ValueError, match="`level` must be at least 0.03125, got 0.01"):
        QuantileCritic().cvar(torch.zeros(1, 32), 0.01)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo itself does
def test_the_loss_runs_in_a_full_graph(generator: torch.Generator) -> None:
    critic = QuantileCritic(8)
    outputs, targets = torch.randn(5, 8, generator=generator), torch.randn(5, 3, generator=generator)
    compiled = torch.compile(critic.loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(outputs, targets), critic.loss(outputs, targets))
