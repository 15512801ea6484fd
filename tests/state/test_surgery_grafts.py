"""Moments grow with their parameter: as if the whole had been one parameter from the start."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from morphogen.errors import StateMismatch
from morphogen.state import surgery
from morphogen.state.surgery_grafts import Graft, drop_misshapen, grow_moments

ELEMENTWISE: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=1.0),
}


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer: Optimizer, gradients: Sequence[tuple[Parameter, Tensor]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient.clone()
    optimizer.step()
    optimizer.zero_grad()


def grow(optimizer: Optimizer, host: Parameter, seed: Parameter, dim: int, scale: float = 1.0) -> dict[Parameter, str]:
    """What a merge does: other data, moments, and the seed leaves."""
    host.data = torch.cat([host.data, scale * seed.data], dim)
    reset = grow_moments([optimizer], [Graft(host, dim, seed, scale)])
    surgery.sync_groups(optimizer, {"host": [host]})
    return reset


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_whole_goes_on_as_if_it_had_been_one(kit: Any, name: str, dim: int) -> None:
    make = ELEMENTWISE[name]
    start, part = values(3, 4, seed=0), values(*((2, 4) if dim == 0 else (3, 2)), seed=1)
    host, seed, whole = Parameter(start), Parameter(part), Parameter(torch.cat([start, part], dim))
    optimizer, twin = make([host, seed]), make([whole])
    for index in range(4):
        gradients = [values(*tensor.shape, seed=10 * index + place) for place, tensor in enumerate((start, part))]
        step(optimizer, [(host, gradients[0]), (seed, gradients[1])])
        step(twin, [(whole, torch.cat(gradients, dim))])
    assert grow(optimizer, host, seed, dim) == {}
    for index in range(3):
        gradient = values(*whole.shape, seed=100 + index)
        step(optimizer, [(host, gradient)])
        step(twin, [(whole, gradient)])
    torch.testing.assert_close(host, whole, rtol=1e-5, atol=1e-6)
    assert kit.same(copy.deepcopy(optimizer.state_dict())["state"].keys(), twin.state_dict()["state"].keys())
    for key, value in twin.state[whole].items():
        torch.testing.assert_close(optimizer.state[host][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"rprop", "asgd"}))
def test_a_factor_on_the_part_divides_its_gradients(name: str) -> None:
    """The twin is the scaled part from the start, which sees the gradient divided by the factor."""
    scale, make = 0.5, ELEMENTWISE[name]
    host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(1, 3, seed=1))
    whole = Parameter(torch.cat([host.data, scale * seed.data]))
    optimizer, twin = make([host, seed]), make([whole])
    for index in range(4):
        first, second = values(2, 3, seed=10 * index), values(1, 3, seed=10 * index + 1)
        step(optimizer, [(host, first), (seed, second)])
        step(twin, [(whole, torch.cat([first, second / scale]))])
    grow(optimizer, host, seed, 0, scale)
    for key, value in twin.state[whole].items():
        if key != "acc_delta":  # the twin's steps are scaled too, which eps in the root keeps from being exact
            torch.testing.assert_close(optimizer.state[host][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adam-amsgrad", "adamw-fused", "adamw-foreach", "adamax", "radam"])
def test_a_young_part_keeps_the_size_of_its_steps(name: str) -> None:
    """With equal gradients all along, bias-corrected moments are those gradients at any age, so steps go on as they were."""
    host, seed = Parameter(torch.zeros(2, 3)), Parameter(torch.zeros(1, 3))
    optimizer = ELEMENTWISE[name]([{"params": [host]}, {"params": [seed]}])
    for index in range(60):
        step(optimizer, [(host, torch.ones(2, 3)), *([(seed, 5.0 * torch.ones(1, 3))] if index >= 55 else [])])
    grow(optimizer, host, seed, 0)
    assert float(optimizer.state[host]["step"]) == 60.0
    state = {key: value.clone() for key, value in optimizer.state[host].items()}
    torch.testing.assert_close(state["exp_avg"][2] / state["exp_avg"][0], torch.full((3,), 5.0), rtol=1e-4, atol=0.0)
    if name != "adamax":
        torch.testing.assert_close(state["exp_avg_sq"][2] / state["exp_avg_sq"][0], torch.full((3,), 25.0), rtol=1e-4, atol=0.0)
    before = host.detach().clone()
    step(optimizer, [(host, torch.tensor([[1.0] * 3, [1.0] * 3, [5.0] * 3]))])
    moved = (before - host).detach()
    torch.testing.assert_close(moved[2], moved[0], rtol=1e-4, atol=1e-6)


def test_hand_made_moments_of_adam() -> None:
    host, seed = Parameter(torch.zeros(2, 1)), Parameter(torch.zeros(1, 1))
    optimizer = torch.optim.Adam([{"params": [host]}, {"params": [seed], "betas": (0.8, 0.99)}], lr=0.1)
    optimizer.state[host] = {"step": torch.tensor(3.0), "exp_avg": torch.tensor([[1.0], [2.0]]), "exp_avg_sq": torch.ones(2, 1)}
    optimizer.state[seed] = {"step": torch.tensor(1.0), "exp_avg": torch.tensor([[3.0]]), "exp_avg_sq": torch.tensor([[4.0]])}
    grow(optimizer, host, seed, 0, scale=0.5)
    first = 3.0 / 0.5 * (1 - 0.9**3) / (1 - 0.8)
    second = 4.0 / 0.25 * (1 - 0.999**3) / (1 - 0.99)
    torch.testing.assert_close(optimizer.state[host]["exp_avg"], torch.tensor([[1.0], [2.0], [first]]))
    torch.testing.assert_close(optimizer.state[host]["exp_avg_sq"], torch.tensor([[1.0], [1.0], [second]]))
    assert float(optimizer.state[host]["step"]) == 3.0


@pytest.mark.parametrize("name", sorted(set(ELEMENTWISE) - {"sgd"}))
def test_a_part_without_a_past_starts_from_the_hosts_second_moments(name: str) -> None:
    host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(1, 3, seed=1))
    optimizer = ELEMENTWISE[name]([host])
    for index in range(3):
        step(optimizer, [(host, values(2, 3, seed=index + 5))])
    old = copy.deepcopy(optimizer.state[host])
    grow(optimizer, host, seed, 0, scale=2.0)
    for key, value in optimizer.state[host].items():
        if key in ("exp_avg", "momentum_buffer", "grad_avg", "prev"):
            assert not value[2].any()
        elif key == "ax":
            torch.testing.assert_close(value[2:], 2.0 * seed.detach())
        elif value.ndim:
            torch.testing.assert_close(value[2], old[key].mean().expand(3))
            assert torch.equal(value[:2], old[key])
    before = host.detach().clone()
    step(optimizer, [(host, values(3, 3, seed=30))])
    assert bool(host.isfinite().all()) and float((host.detach() - before).abs().max()) < 5.0


def test_another_kind_of_optimizer_has_no_moments_to_give() -> None:
    host, seed = Parameter(values(3, 3, seed=0)), Parameter(values(1, 3, seed=1))
    matrices, rest = torch.optim.Muon([host], lr=0.1), torch.optim.AdamW([seed], lr=0.1)
    step(matrices, [(host, values(3, 3, seed=2))])
    step(rest, [(seed, values(1, 3, seed=3))])
    old = matrices.state[host]["momentum_buffer"].clone()
    host.data = torch.cat([host.data, seed.data])
    assert grow_moments([matrices, rest], [Graft(host, 0, seed)]) == {}
    assert torch.equal(matrices.state[host]["momentum_buffer"], torch.cat([old, torch.zeros(1, 3)]))


def test_muon_joins_momentum() -> None:
    host, seed = Parameter(values(3, 3, seed=0)), Parameter(values(3, 1, seed=1))
    optimizer = torch.optim.Muon([host, seed], lr=0.1)
    step(optimizer, [(host, values(3, 3, seed=2)), (seed, values(3, 1, seed=3))])
    expected = torch.cat([optimizer.state[host]["momentum_buffer"], optimizer.state[seed]["momentum_buffer"]], 1)
    grow(optimizer, host, seed, 1)
    assert torch.equal(optimizer.state[host]["momentum_buffer"], expected)
    step(optimizer, [(host, values(3, 4, seed=4))])
    assert bool(host.isfinite().all())


def test_factored_moments_start_anew_with_a_reason() -> None:
    host, bias, seed, more = (Parameter(values(*shape, seed=0)) for shape in ((3, 4), (3,), (1, 4), (1,)))
    optimizer = torch.optim.Adafactor([host, bias, seed, more], lr=0.01)
    step(optimizer, [(p, values(*p.shape, seed=1)) for p in (host, bias, seed, more)])
    expected = torch.cat([optimizer.state[bias]["variance"], optimizer.state[more]["variance"]])
    host.data, bias.data = torch.cat([host.data, seed.data]), torch.cat([bias.data, more.data])
    reset = grow_moments([optimizer], [Graft(host, 0, seed), Graft(bias, 0, more)])
    assert list(reset) == [host] and "factored" in reset[host]
    assert host not in optimizer.state
    assert torch.equal(optimizer.state[bias]["variance"], expected)
    surgery.sync_groups(optimizer, {"host": [host, bias]})
    step(optimizer, [(p, values(*p.shape, seed=2)) for p in (host, bias)])
    assert bool(host.isfinite().all())


class Unknown(torch.optim.SGD):
    """Keeps a moment that nobody here knows."""


def test_an_unknown_moment_of_the_parameters_shape_starts_anew() -> None:
    host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(1, 3, seed=1))
    optimizer = Unknown([host, seed], lr=0.1)
    optimizer.state[host]["secret"] = torch.ones(2, 3)
    reset = grow(optimizer, host, seed, 0)
    assert reset == {host: "moment `secret` of Unknown is not known here"}
    assert host not in optimizer.state


def test_what_the_optimizer_does_not_hold_or_has_not_stepped_is_left_alone() -> None:
    frozen, host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(2, 3, seed=1)), Parameter(values(1, 3, seed=2))
    optimizer = torch.optim.Adam([host, seed])
    for parameter in (frozen, host):
        parameter.data = torch.cat([parameter.data, seed.data])
    assert grow_moments([optimizer], [Graft(frozen, 0, seed), Graft(host, 0, seed)]) == {}
    assert not optimizer.state


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_is_positive_and_finite(kit: Any, scale: float) -> None:
    host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(1, 3, seed=1))
    optimizer = torch.optim.Adam([host, seed])
    step(optimizer, [(host, values(2, 3, seed=2)), (seed, values(1, 3, seed=3))])
    before = kit.optimizer(optimizer)
    host.data = torch.cat([host.data, seed.data])
    with pytest.raises(ValueError, match="`scale` must be positive and finite, got"):
        grow_moments([optimizer], [Graft(host, 0, seed, scale)])
    assert kit.same(kit.optimizer(optimizer), before)


def test_lbfgs_is_refused() -> None:
    host = Parameter(values(2, 3, seed=0))
    with pytest.raises(StateMismatch, match="LBFGS"):
        grow_moments([torch.optim.LBFGS([host])], [Graft(host, 0, Parameter(values(1, 3, seed=1)))])


def test_memory_format_of_moments_is_the_parameters() -> None:
    host = Parameter(values(2, 3, 3, 3, seed=0).to(memory_format=torch.channels_last))
    seed = Parameter(values(1, 3, 3, 3, seed=1).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([host, seed], fused=True)
    step(optimizer, [(p, values(*p.shape, seed=2)) for p in (host, seed)])
    grow(optimizer, host, seed, 0)
    assert host.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[host]["exp_avg"].stride() == host.stride()


def test_remember_puts_grown_moments_back(kit: Any) -> None:
    host, seed = Parameter(values(2, 3, seed=0)), Parameter(values(1, 3, seed=1))
    optimizer = torch.optim.Adam([host, seed])
    step(optimizer, [(host, values(2, 3, seed=2)), (seed, values(1, 3, seed=3))])
    before, data, put_back = kit.optimizer(optimizer), host.data, surgery.remember(optimizer)
    grow(optimizer, host, seed, 0)
    host.data = data
    put_back()
    assert kit.same(kit.optimizer(optimizer), before)


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_misshapen_moments_are_dropped_with_a_reason(name: str) -> None:
    host, other = Parameter(values(3, 4, seed=0)), Parameter(values(3, 4, seed=1))
    makers = {**ELEMENTWISE, "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01)}
    optimizer = makers[name]([host, other])
    step(optimizer, [(p, values(3, 4, seed=2)) for p in (host, other)])
    assert drop_misshapen(optimizer) == {}
    for shape in ((3, 5), (2, 4)):
        host.data = values(*shape, seed=3)
        dropped = drop_misshapen(optimizer)
        assert list(dropped) == [host] and re.search(r"moment `\w+` ", dropped[host])
        assert host not in optimizer.state and other in optimizer.state
        step(optimizer, [(p, values(*p.shape, seed=4)) for p in (host, other)])
