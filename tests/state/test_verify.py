"""verify() names what is wrong with a run, and is silent about a sound one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from morphogen.errors import StateMismatch
from morphogen.state import TrainingState


def problems(run: Any) -> tuple[str, ...]:
    with pytest.raises(StateMismatch, match="the training state is not sound") as caught:
        run.state.verify()
    assert all(line in str(caught.value) for line in caught.value.problems)
    return caught.value.problems


def test_a_sound_run_passes(kit: Any, any_optimizer: str) -> None:
    run = kit.build(any_optimizer, "onecycle")
    run.state.verify()
    before = run.contents()
    run.steps(3)
    run.state.verify()
    if any_optimizer != "lbfgs":  # which keeps its frozen parameters too
        run.state.reshape()
    run.state.verify()
    assert not kit.same(run.contents(), before)
    before = run.contents()
    run.state.verify()
    assert kit.same(run.contents(), before)


def test_replaced_parameters_are_orphaned_and_untracked(kit: Any) -> None:
    run = kit.build()
    run.steps(1)
    run.model.body.load_state_dict(copy.deepcopy(run.model.body.state_dict()), assign=True)
    assert problems(run) == (
        "orphaned: the optimizer steps `body.weight`, which is no longer in the model",
        "orphaned: the optimizer steps `body.bias`, which is no longer in the model",
        "untracked: `body.weight` is trainable but in no optimizer",
        "untracked: `body.bias` is trainable but in no optimizer",
    )


def test_names_survive_a_second_replacement(kit: Any) -> None:
    run = kit.build()
    for _ in range(3):
        run.model.body.load_state_dict(copy.deepcopy(run.model.body.state_dict()), assign=True)
        assert len([line for line in problems(run) if "orphaned" in line and "body" in line]) == 2


def test_a_tied_parameter_that_was_untied_is_untracked(kit: Any) -> None:
    run = kit.build()
    run.model.head.weight = nn.Parameter(run.model.head.weight.detach().clone())
    assert problems(run) == ("untracked: `head.weight` is trainable but in no optimizer",)


def test_an_optimizer_of_another_model_is_orphaned_by_shape() -> None:
    model = nn.Linear(2, 3, bias=False)
    optimizer = torch.optim.SGD(nn.Linear(4, 1, bias=False).parameters(), lr=0.1)
    state = TrainingState(model, optimizer)
    with pytest.raises(StateMismatch) as caught:
        state.verify()
    assert caught.value.problems == (
        "orphaned: the optimizer steps `of shape (1, 4)`, which is no longer in the model",
        "untracked: `weight` is trainable but in no optimizer",
    )


def test_a_thawed_parameter_is_untracked_until_reshape(kit: Any) -> None:
    run = kit.build()
    run.state.reshape()
    run.model.frozen.bias.requires_grad_(True)
    assert problems(run) == ("untracked: `frozen.bias` is trainable but in no optimizer",)
    run.state.reshape()
    run.state.verify()


def test_a_parameter_stepped_twice_is_duplicated(kit: Any) -> None:
    model = nn.Linear(2, 1)
    optimizers = {
        "first": torch.optim.SGD(model.parameters(), lr=0.1),
        "second": torch.optim.Adam([model.bias], lr=0.1),
    }
    with pytest.raises(StateMismatch) as caught:
        TrainingState(model, optimizers).verify()
    assert caught.value.problems == ("duplicated: `bias` is stepped 2 times",)
    twice = torch.optim.SGD([model.weight, model.bias], lr=0.1)
    twice.param_groups[0]["params"].append(model.weight)
    with pytest.raises(StateMismatch, match="duplicated: `weight` is stepped 2 times"):
        TrainingState(model, twice).verify()


def test_trainable_extras_are_nobodys_to_step(kit: Any) -> None:
    run = kit.build()
    extras = {
        "ema": AveragedModel(run.model),
        "target": copy.deepcopy(run.model).requires_grad_(True),
        "temperature": nn.Parameter(torch.ones(1)),
    }
    TrainingState(run.model, run.optimizers, extras=extras).verify()


def test_a_run_without_optimizer_has_nothing_untracked() -> None:
    TrainingState(nn.Linear(2, 1)).verify()


def _moment(run: Any, key: str) -> torch.Tensor:
    return run.optimizers[""].state[run.model.body.weight][key]


PLACES: dict[str, tuple[Callable[[Any], torch.Tensor], str]] = {
    "parameter": (lambda run: run.model.body.weight.data, "`body.weight` holds 1 of 36 values"),
    "frozen parameter": (lambda run: run.model.frozen.bias.data, "`frozen.bias` holds 1 of 6 values"),
    "buffer": (lambda run: run.model.norm.running_var, "`norm.running_var` holds 1 of 6 values"),
    "non-persistent buffer": (lambda run: run.model.level, "`level` holds 1 of 6 values"),
    "first moment": (lambda run: _moment(run, "exp_avg"), "`exp_avg of body.weight` holds 1 of 36 values"),
    "second moment": (lambda run: _moment(run, "exp_avg_sq"), "`exp_avg_sq of body.weight` holds 1 of 36 values"),
    "ema": (lambda run: run.extras["ema"].body.bias.data, "`extras.ema.body.bias` holds 1 of 6 values"),
    "tensor extra": (lambda run: run.extras["hidden"], "`extras.hidden` holds 1 of 7 values"),
}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("place", PLACES)
def test_a_value_that_is_not_finite_is_found_by_name(kit: Any, place: str, value: float) -> None:
    run = kit.build("adam")
    run.steps(1)
    where, message = PLACES[place]
    where(run).view(-1)[3] = value
    assert problems(run) == (f"non-finite: {message} that are NaN or Inf",)


def test_huge_values_are_finite(kit: Any) -> None:
    run = kit.build("adam")
    run.model.body.weight.data.fill_(3e38)
    run.state.verify()


def test_a_parameter_that_grew_under_its_moments_is_misshapen(kit: Any) -> None:
    """A fused step would write past the end of the moments, without an error."""
    run = kit.build("adamw-fused")
    run.steps(1)
    run.model.body.weight.data = torch.zeros(9, 6)
    assert problems(run) == (
        "misshapen: moment `exp_avg` of `body.weight` is (6, 6), the parameter (9, 6)",
        "misshapen: moment `exp_avg_sq` of `body.weight` is (6, 6), the parameter (9, 6)",
        "misshapen: the gradient of `body.weight` is (6, 6), the parameter (9, 6)",
    )
