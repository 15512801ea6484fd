"""The factor answers to noise over time, and to nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import StateMismatch
from morphogen.rl.gradient_variance import GradientVarianceConfig, GradientVarianceScaling
from morphogen.state.trees import decode, encode

SHAPES = {"weight": (30, 40), "bias": (30,), "scale": ()}
PARAMETERS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
CONFIG = GradientVarianceConfig(warmup_steps=10)
Draw = Callable[[int], list[Tensor]]


def made(config: GradientVarianceConfig = CONFIG) -> GradientVarianceScaling:
    return GradientVarianceScaling(config, PARAMETERS)


def factors(draw: Draw, steps: int, config: GradientVarianceConfig = CONFIG) -> list[float]:
    """The factors of ``steps`` updates with the gradients that ``draw`` gives."""
    scaling, path = made(config), []
    for step in range(steps):
        grads = draw(step)
        scaling.update(grads)
        path.append(float(scaling.scale_(grads)))
    return path


def noisy(generator: torch.Generator, noise: float, size: float = 1.0) -> Draw:
    """A gradient that varies by four orders of magnitude across elements, with temporal noise relative to each."""
    signal = {name: 10.0 ** (4.0 * torch.rand(shape, generator=generator) - 2.0) for name, shape in SHAPES.items()}
    return lambda step: [size * mean * (1.0 + noise * torch.randn(mean.shape, generator=generator)) for mean in signal.values()]


def expected_factor(noise: float, config: GradientVarianceConfig = CONFIG) -> float:
    """Noise over signal is ``noise ** 2`` in every element."""
    return config.min_factor + (1.0 - config.min_factor) / (1.0 + config.alpha * noise**2)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e3])
def test_a_constant_gradient_is_left_exactly_alone(generator: torch.Generator, beta: float, size: float) -> None:
    config = GradientVarianceConfig(beta=beta, warmup_steps=2)
    assert set(factors(noisy(generator, 0.0, size), 300, config)) == {1.0}


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_factor_is_that_of_the_noise_from_the_first_step_on(generator: torch.Generator, noise: float) -> None:
    """Without the correction for few gradients it would start near 1, since an average of one gradient has no variance."""
    path = factors(noisy(generator, noise), 400)
    assert path[:9] == [1.0] * 9
    for step in (9, 20, 50, 399):
        assert path[step] == pytest.approx(expected_factor(noise), abs=0.04)


def test_it_falls_as_noise_grows_and_recovers(generator: torch.Generator) -> None:
    path = [factors(noisy(generator, noise), 100)[-1] for noise in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 100.0)]
    assert path == sorted(path, reverse=True) and len(set(path)) == len(path)
    assert CONFIG.min_factor <= path[-1] < CONFIG.min_factor + 0.1
    loud, calm = noisy(torch.Generator().manual_seed(3), 5.0), noisy(torch.Generator().manual_seed(3), 0.0)
    path = factors(lambda step: (loud if step < 200 else calm)(step), 2000)
    assert path[199] < 0.5 and path[-1] > 0.999


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e3])
def test_magnitude_does_not_matter(size: float) -> None:
    paths = [factors(noisy(torch.Generator().manual_seed(1), 1.0, of), 60) for of in (1.0, size)]
    torch.testing.assert_close(*(torch.tensor(path) for path in paths), rtol=1e-4, atol=0.0)


def test_how_parameters_are_split_does_not_matter(generator: torch.Generator) -> None:
    whole = GradientVarianceScaling(CONFIG, {"all": torch.zeros(1200)})
    pieces = GradientVarianceScaling(CONFIG, {str(index): torch.zeros(100, 4) for index in range(3)})
    for _ in range(30):
        grad = torch.linspace(1e-4, 10.0, 1200) * (1.0 + torch.randn(1200, generator=generator))
        whole.update([grad])
        pieces.update([piece.view(100, 4) for piece in grad.split(400)])
    assert float(whole.factor()) < 0.98
    assert torch.equal(whole.factor(), pieces.factor())


def test_elements_without_gradient_and_outliers_weigh_little(generator: torch.Generator) -> None:
    def draw(step: int) -> list[Tensor]:
        grads = noisy_draw(step)
        grads[0][:15] = 0.0
        return grads

    def with_outlier(step: int) -> list[Tensor]:
        grads = [torch.ones(shape) for shape in SHAPES.values()]
        grads[0][0, 0] = 100.0 * (-1) ** step
        return grads

    noisy_draw = noisy(generator, 1.0)
    assert factors(draw, 100)[-1] == pytest.approx(expected_factor(1.0), abs=0.04)
    assert factors(with_outlier, 100)[-1] > 0.98  # 1e4 times the power of all others together would give 0.1


def test_gradients_are_scaled_by_the_factor_and_measured_raw(generator: torch.Generator) -> None:
    draw = noisy(generator, 1.0)
    scaling, untouched = made(), made()
    for step in range(20):
        grads = draw(step)
        raw = [grad.clone() for grad in grads]
        scaling.update(grads)
        assert all(torch.equal(grad, before) for grad, before in zip(grads, raw, strict=True))
        untouched.update(raw)
        factor = scaling.scale_(grads)
        assert all(torch.equal(grad, factor * before) for grad, before in zip(grads, raw, strict=True))
    assert torch.equal(scaling.factor(), untouched.factor()) and factor < 1.0


def spoilt(grads: list[Tensor], value: float) -> list[Tensor]:
    grads[0][3, 3] = value
    return grads


@pytest.mark.parametrize(
    ("value", "ok"), [(float("nan"), None), (float("inf"), True), (1e25, None), (1.0, False), (float("nan"), False)]
)
def test_what_is_not_finite_or_not_ok_leaves_every_bit(generator: torch.Generator, value: float, ok: bool | None) -> None:
    scaling, draw = made(), noisy(generator, 1.0)
    for step in range(20):
        scaling.update(draw(step), torch.tensor(True))
    before = scaling.state_dict()
    scaling.update(spoilt(draw(0), value), None if ok is None else torch.tensor(ok))
    assert_same(before, scaling.state_dict())
    scaling.update(draw(0))
    assert not torch.equal(before["mean"]["bias"], scaling.state_dict()["mean"]["bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_measured_in_float32(dtype: torch.dtype) -> None:
    scaling = GradientVarianceScaling(CONFIG, {"w": torch.zeros(3, dtype=dtype)})
    for step in range(20):
        grads = [torch.tensor([1.0, -3e-4, 2e-4], dtype=dtype) * (1 + step % 2)]
        scaling.update(grads)
    factor = scaling.scale_(grads)
    assert factor.dtype == torch.float32 and 0.9 < factor < 1.0 and grads[0].dtype == dtype
    assert scaling.state_dict()["square"]["w"].dtype == torch.float32


def test_on_a_real_task_the_factor_is_no_constant() -> None:
    """Regression by minibatches: the mean gradient leads at first, noise in the end."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 5, generator=generator)
    targets = torch.sin(2.0 * inputs[:, :1]) + 0.3 * torch.randn(512, 1, generator=generator)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))
    scaling = GradientVarianceScaling(GradientVarianceConfig(), dict(model.named_parameters()))
    optimizer, path = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(800):
        rows = torch.randint(512, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        scaling.update(grads)
        path.append(float(scaling.scale_(grads)))
        optimizer.step()
    measured = torch.tensor(path[20:])
    assert measured.max() - measured.min() > 0.2
    assert measured[:50].mean() > measured[-200:].mean() + 0.1
    assert not (measured == measured.min()).float().mean() > 0.05
    assert float(measured.max()) < 1.0


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert torch.equal(left["weight"], right["weight"])
    for kind in ("mean", "square"):
        assert left[kind].keys() == right[kind].keys()
        assert all(torch.equal(value, right[kind][name]) for name, value in left[kind].items())


def test_state_travels_by_name_and_gives_the_same_next_factor(generator: torch.Generator) -> None:
    draw, source = noisy(generator, 1.0), made()
    for step in range(30):
        source.update(draw(step))
    tensors: dict[str, Tensor] = {}
    state = decode(json.loads(json.dumps(encode(source.state_dict(), tensors, "variance"))), tensors)
    target = made(GradientVarianceConfig(alpha=0.5, warmup_steps=10))
    state["mean"] = dict(reversed(state["mean"].items()))
    target.load_state_dict(state)
    assert target.config.alpha == 0.5 and target.factor() < source.factor()
    target.config = CONFIG
    assert torch.equal(target.factor(), source.factor())
    kept = target.state_dict()
    state["mean"]["weight"].zero_()
    source.update(draw(0))
    assert_same(kept, target.state_dict())
    target.reset()
    assert_same(target.state_dict(), made().state_dict())
    assert float(target.factor()) == 1.0


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda state: state.pop("weight"), "`weight` is missing"),
        (lambda state: state.update(beta=0.9), "`beta` is unknown"),
        (lambda state: state.update(weight=torch.tensor(1.5)), "`weight` is 1.5, expected a number in"),
        (lambda state: state["mean"].pop("bias"), "`mean` lacks `bias`"),
        (lambda state: state["square"].update(more=torch.zeros(1)), "`square` has `more`, which is not in the model"),
        (lambda state: state["mean"].update(bias=torch.zeros(31)), r"`mean` of `bias` is \(31,\), the parameter \(30,\)"),
        (lambda state: state["mean"]["bias"].fill_(torch.nan), "`mean` of `bias` holds numbers that no statistic has"),
        (lambda state: state["square"]["scale"].fill_(-1.0), "`square` of `scale` holds numbers that no statistic has"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    generator: torch.Generator, spoil: Callable[[dict[str, Any]], object], problem: str
) -> None:
    scaling = made()
    scaling.update(noisy(generator, 1.0)(0))
    before, state = scaling.state_dict(), scaling.state_dict()
    spoil(state)
    with pytest.raises(StateMismatch, match=problem):
        scaling.load_state_dict(state)
    assert_same(before, scaling.state_dict())


def test_misuse_is_refused() -> None:
    scaling = made()
    with pytest.raises(ValueError, match="`grads` must hold 3 gradients of the parameters' sizes, got 2"):
        scaling.update([torch.zeros(30, 40), torch.zeros(30)])
    with pytest.raises(ValueError, match="`grads` must hold 3 gradients"):
        scaling.update([torch.zeros(30, 40), torch.zeros(30), torch.zeros(2)])
    with pytest.raises(ValueError, match="`named_parameters` must name at least one parameter"):
        GradientVarianceScaling(CONFIG, {})
    for settings in ({"beta": 0.9999}, {"alpha": 0.0}, {"warmup_steps": 1}, {"min_factor": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            GradientVarianceConfig(**settings)
