"""Moments are reset, zeroed, copied and rescaled as promised, and rates are scaled for good."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from morphogen.errors import StateMismatch
from morphogen.state import copy_moments, rescale_moments, reset_moments, surgery


def stepped(make: Callable[[list[nn.Parameter]], Optimizer], steps: int = 3, seed: int = 0) -> Optimizer:
    """An optimizer over a matrix and a vector after some steps on drawn gradients."""
    optimizer = make([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in surgery.parameters_of(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def named(optimizer: Optimizer, *names: str) -> dict[str, nn.Parameter]:
    return dict(zip(names or ("w", "b"), surgery.parameters_of(optimizer), strict=True))


def adam(parameters: Any) -> Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


def momentum(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def state_of(optimizer: Optimizer) -> Any:
    return copy.deepcopy([optimizer.state.get(parameter, {}) for parameter in surgery.parameters_of(optimizer)])


def test_reset_forgets_all_or_the_given_parameters(kit: Any) -> None:
    optimizer = stepped(adam)
    first, second = surgery.parameters_of(optimizer)
    before, groups = state_of(optimizer), kit.optimizer(optimizer)["param_groups"]
    reset_moments(optimizer, [first, nn.Parameter(torch.ones(1))])
    assert first not in optimizer.state
    assert kit.same(state_of(optimizer)[1], before[1])
    reset_moments(optimizer)
    assert not optimizer.state
    assert kit.same(kit.optimizer(optimizer)["param_groups"], groups)
    second.grad = torch.full((3,), 7.0)
    old = second.detach().clone()
    optimizer.step()
    torch.testing.assert_close(old - second, torch.full((3,), 0.1))  # Adam's first step is one learning rate long


@pytest.mark.parametrize("make", [adam, momentum, lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True)])
def test_zero_momentum_zeroes_first_moments_alone(kit: Any, make: Any) -> None:
    optimizer = stepped(make)
    before = state_of(optimizer)
    addresses = [v.data_ptr() for values in optimizer.state.values() for v in values.values()]
    surgery.zero_momentum(optimizer)
    for now, old in zip(state_of(optimizer), before, strict=True):
        for key in old:
            if key in ("exp_avg", "momentum_buffer"):
                assert not now[key].any()
                assert old[key].any()
            else:
                assert kit.same(now[key], old[key])
    assert [v.data_ptr() for values in optimizer.state.values() for v in values.values()] == addresses


def test_zero_momentum_heals_a_first_moment_and_refuses_a_sick_second(kit: Any) -> None:
    optimizer = stepped(adam)
    values = optimizer.state[surgery.parameters_of(optimizer)[0]]
    values["exp_avg"][0, 0] = float("nan")
    surgery.zero_momentum(optimizer)
    assert not values["exp_avg"].any()
    values["exp_avg"].fill_(1.0)
    values["exp_avg_sq"][0, 0] = float("nan")
    before = state_of(optimizer)
    with pytest.raises(StateMismatch, match=r"second moment `exp_avg_sq` of a parameter of shape \(2, 3\) must be finite"):
        surgery.zero_momentum(optimizer)
    assert kit.same(state_of(optimizer), before)


def test_rescaling_keeps_the_velocity_when_the_rate_changes() -> None:
    optimizer = stepped(momentum)
    twin_parameters = [nn.Parameter(p.detach().clone()) for p in surgery.parameters_of(optimizer)]
    twin = momentum(twin_parameters)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rescale_moments(optimizer, 0.1 / 0.025)
    surgery.set_learning_rate(optimizer, 0.025)
    for one in (optimizer, twin):
        for parameter in surgery.parameters_of(one):
            parameter.grad = torch.zeros_like(parameter)
        one.step()
    for parameter, other in zip(surgery.parameters_of(optimizer), twin_parameters, strict=True):
        torch.testing.assert_close(parameter, other)


def test_rescaling_by_parameter_touches_only_those_and_never_second_moments(kit: Any) -> None:
    optimizer = stepped(adam)
    first, second = surgery.parameters_of(optimizer)
    before = state_of(optimizer)
    rescale_moments(optimizer, {first: 2.0, nn.Parameter(torch.ones(1)): 3.0})
    now = state_of(optimizer)
    assert torch.equal(now[0]["exp_avg"], before[0]["exp_avg"] * 2.0)
    assert kit.same({**now[0], "exp_avg": 0}, {**before[0], "exp_avg": 0})
    assert kit.same(now[1], before[1])


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_is_positive_and_finite(kit: Any, ratio: float) -> None:
    optimizer = stepped(adam)
    first, second = surgery.parameters_of(optimizer)
    before = state_of(optimizer)
    for given in (ratio, {first: 2.0, second: ratio}):
        with pytest.raises(ValueError, match="`ratio` must be positive and finite, got"):
            rescale_moments(optimizer, given)
        assert kit.same(state_of(optimizer), before)


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (adam, 2, 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 2, 4),
        (momentum, 2, 0),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), 2, 2),
        (lambda p: torch.optim.Adagrad(p), 0, 2),
        (lambda p: torch.optim.Adafactor(p), 0, 3),
        (lambda p: torch.optim.SGD(p, 0.1), 0, 0),
    ],
)
def test_moments_are_scaled_in_place_and_counted(kit: Any, make: Any, first: int, second: int) -> None:
    optimizer = stepped(make)
    before = state_of(optimizer)
    assert surgery.scale_moments(optimizer, first=-3.0) == first
    assert surgery.scale_moments(optimizer, second=0.5) == second
    scaled = 0
    for now, old in zip(state_of(optimizer), before, strict=True):
        for key, value in old.items():
            factor = -3.0 if key in ("exp_avg", "momentum_buffer") else 1.0 if key == "step" else 0.5
            assert kit.same(now[key], value * factor if isinstance(value, Tensor) else value)
            scaled += factor != 1.0 and isinstance(value, Tensor)
    assert scaled == first + second


@pytest.mark.parametrize("factors", [{"first": float("nan")}, {"second": -1.0}, {"second": float("inf")}])
def test_moments_are_scaled_by_finite_factors(kit: Any, factors: dict[str, float]) -> None:
    optimizer = stepped(adam)
    before = state_of(optimizer)
    with pytest.raises(ValueError, match="`first` must be finite and `second` finite and >= 0"):
        surgery.scale_moments(optimizer, **factors)
    assert kit.same(state_of(optimizer), before)


def test_moments_are_copied_by_name_and_never_shared(kit: Any) -> None:
    source = stepped(adam, seed=1)
    vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
    target = torch.optim.Adam([{"params": [vector], "lr": 0.7}, {"params": [matrix]}], lr=0.2)
    copy_moments(target, source, target_parameters={"b": vector, "w": matrix}, source_parameters=named(source))
    assert kit.same([dict(target.state[matrix]), dict(target.state[vector])], state_of(source))
    assert [group["lr"] for group in target.param_groups] == [0.7, 0.2]
    before = state_of(source)
    for _ in range(2):  # the second time the copies go into what is there
        matrix.grad = vector.grad = None
        matrix.grad, vector.grad = torch.ones(2, 3), torch.ones(3)
        target.step()
        assert kit.same(state_of(source), before)
        copy_moments(target, source, target_parameters={"b": vector, "w": matrix}, source_parameters=named(source))
        assert kit.same([dict(target.state[matrix]), dict(target.state[vector])], before)
    storages = {v.data_ptr() for values in (*source.state.values(), *target.state.values()) for v in values.values()}
    assert len(storages) == 12


def test_a_flat_history_of_tensors_is_not_shared_either() -> None:
    def made() -> tuple[Optimizer, nn.Parameter]:
        weight = nn.Parameter(torch.tensor([3.0, 1.0]))
        optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (weight**2 * torch.tensor([1.0, 5.0])).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return optimizer, weight

    (source, theirs), (target, ours) = made(), made()
    copy_moments(target, source, target_parameters={"w": ours}, source_parameters={"w": theirs})
    old, new = source.state[theirs], target.state[ours]
    assert len(new["old_dirs"]) == len(old["old_dirs"]) > 0
    assert new["old_dirs"] is not old["old_dirs"]
    assert not {t.data_ptr() for t in new["old_dirs"]} & {t.data_ptr() for t in old["old_dirs"]}


SOURCES: dict[str, tuple[Callable[[], Optimizer], tuple[str, ...], str]] = {
    "class": (lambda: stepped(momentum), ("w", "b"), "optimizer is Adam, the snapshot's was SGD"),
    "name": (lambda: stepped(adam), ("w", "c"), "optimizer parameter `c` is not in the model"),
    "shape": (lambda: stepped(adam), ("b", "w"), r"moment `exp_avg` of `b` is \(2, 3\), the parameter \(3,\)"),
    "structure": (lambda: stepped(lambda p: torch.optim.Adam(p, amsgrad=True)), ("w", "b"), "option `amsgrad` is"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_copying_what_does_not_fit_changes_nothing(kit: Any, case: str) -> None:
    make, names, message = SOURCES[case]
    source, target = make(), stepped(adam, seed=2)
    before = state_of(target)
    with pytest.raises(StateMismatch, match=message):
        copy_moments(target, source, target_parameters=named(target), source_parameters=named(source, *names))
    assert kit.same(state_of(target), before)


@pytest.mark.parametrize("side", ["target", "source"])
def test_copying_needs_a_name_for_each_parameter(side: str) -> None:
    parameters = {"target": (target := stepped(adam)), "source": (source := stepped(adam))}
    names = {key: named(optimizer) for key, optimizer in parameters.items()}
    del names[side]["b"]
    with pytest.raises(StateMismatch, match=r"holds a parameter of shape \(3,\) that is in no model"):
        copy_moments(target, source, target_parameters=names["target"], source_parameters=names["source"])


MISSHAPEN = {
    "rmsprop": (lambda p: torch.optim.RMSprop(p, centered=True), "grad_avg"),
    "adamax": (torch.optim.Adamax, "exp_inf"),
    "adadelta": (torch.optim.Adadelta, "acc_delta"),
    "rprop": (torch.optim.Rprop, "step_size"),
    "asgd": (torch.optim.ASGD, "ax"),
    "adagrad": (torch.optim.Adagrad, "sum"),
    "nadam": (torch.optim.NAdam, "exp_avg_sq"),
    "amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), "max_exp_avg_sq"),
}


@pytest.mark.parametrize("case", MISSHAPEN)
def test_every_moment_of_a_wrong_shape_is_seen(case: str) -> None:
    make, key = MISSHAPEN[case]
    optimizer = stepped(make)
    names = {id(parameter): name for name, parameter in named(optimizer).items()}
    assert surgery.misshapen(optimizer, names) == []
    values = optimizer.state[surgery.parameters_of(optimizer)[1]]
    values[key] = values[key][:2]
    assert surgery.misshapen(optimizer, names) == [f"moment `{key}` of `b` is (2,), the parameter (3,)"]


class Projected(torch.optim.Optimizer):
    """Somebody else's optimizer, whose first moment is smaller than its parameter on purpose."""

    def step(self, closure: Any = None) -> None:
        for parameter in surgery.parameters_of(self):
            self.state[parameter]["exp_avg"] = torch.zeros(1)


def test_moments_of_foreign_optimizers_may_have_any_shape() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Projected([parameter], {"lr": 0.1})
    optimizer.step()
    assert surgery.misshapen(optimizer, {id(parameter): "w"}) == []


def test_a_moment_that_is_made_anew_lies_in_memory_as_its_parameter_does() -> None:
    """Fused kernels walk parameter and moment side by side; in another order they pair the wrong values."""
    image = nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([image], fused=True)
    saved = {"w": {"exp_avg": torch.randn(2, 3, 4, 4), "exp_avg_sq": torch.rand(2, 3, 4, 4), "step": torch.tensor(3.0)}}
    for live, value in surgery.write_state(optimizer, saved, {"w": image}):
        live.copy_(value)
    values = optimizer.state[image]
    assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == image.stride()
    assert torch.equal(values["exp_avg"], saved["w"]["exp_avg"])
    assert not values["exp_avg"].requires_grad


def test_rates_are_read_and_set_by_owner() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": torch.tensor(0.5)}, {"params": [second]}], lr=0.1)
    optimizer.param_groups[1]["owner"] = "late"
    assert surgery.group_rates(optimizer) == {"group0": 0.5, "late": 0.1}
    surgery.set_learning_rate(optimizer, 0.25, "late")
    assert surgery.learning_rates(optimizer) == {first: 0.5, second: 0.25}
    rate = optimizer.param_groups[0]["lr"]
    surgery.set_learning_rate(optimizer, 0.125)
    assert optimizer.param_groups[0]["lr"] is rate
    assert surgery.learning_rates(optimizer) == {first: 0.125, second: 0.125}
    with pytest.raises(ValueError, match=r"`owner` must be one of \['None', 'late'\], got 'early'"):
        surgery.set_learning_rate(optimizer, 0.5, "early")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`learning_rate` must be >= 0 and finite, got"):
            surgery.set_learning_rate(optimizer, bad)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.01),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, eta_min=0.01),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[1.0, 0.3], total_steps=30, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.2], [0.3, 0.9], step_size_up=3, cycle_momentum=False),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=[0.03, 0.02]),
    "plateau one": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, min_lr=0.03),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=[0.03, 0.01], anneal_epochs=6),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.02)], milestones=[6]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 6), lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.01)]
    ),
}


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scaled_schedule_is_the_old_one_times_the_factor_for_good(schedule: str, rate: Any) -> None:
    def made() -> tuple[Optimizer, Any]:
        groups = [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))], "lr": rate * 2}]
        optimizer = torch.optim.SGD(groups, lr=copy.deepcopy(rate))
        return optimizer, SCHEDULES[schedule](optimizer)

    (scaled, scaled_schedule), (twin, twin_schedule) = made(), made()
    for step in range(12):
        if step in (3, 7):
            surgery.scale_learning_rates(scaled, 0.25, [scaled_schedule] if scaled_schedule else [])
        factor = 0.25 ** ((step >= 3) + (step >= 7))
        expected = [factor * float(group["lr"]) for group in twin.param_groups]
        assert [float(group["lr"]) for group in scaled.param_groups] == pytest.approx(expected, rel=1e-6)
        for optimizer, scheduler in ((scaled, scaled_schedule), (twin, twin_schedule)):
            optimizer.step()
            if scheduler is not None:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("factor", [0.0, -2.0, float("inf"), float("nan")])
def test_a_factor_is_positive_and_finite(factor: float) -> None:
    optimizer = stepped(adam)
    with pytest.raises(ValueError, match="`factor` must be positive and finite, got"):
        surgery.scale_learning_rates(optimizer, factor)
    assert surgery.group_rates(optimizer) == {"group0": 0.1}


def test_a_scheduler_that_cannot_be_scaled_leaves_the_rates() -> None:
    class PerGroup(lr_scheduler.LRScheduler):
        speeds: list[float]

        def get_lr(self) -> list[float]:
            return [group["lr"] for group in self.optimizer.param_groups]

    optimizer = stepped(adam)
    scheduler = PerGroup(optimizer)
    scheduler.speeds = [1.0]
    with pytest.raises(StateMismatch, match="PerGroup must keep only known per-group lists"):
        surgery.scale_learning_rates(optimizer, 0.5, [scheduler])
    assert surgery.group_rates(optimizer) == {"group0": 0.1}
    assert scheduler.base_lrs == [0.1]
