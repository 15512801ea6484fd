"""Any training run as a member, and where its hyperparameters take effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from morphogen.errors import StateMismatch
from morphogen.pbt import Attribute, HyperparameterMismatch, LearningRate, Option, StateMember
from morphogen.pbt.member import bind
from morphogen.pbt.snapshots import from_bytes, to_bytes
from morphogen.state import RandomStreams, TrainingState


def state_of(width: int = 3, **options: Any) -> TrainingState:
    model = nn.Sequential(nn.Linear(width, 2), nn.Dropout(0.1))
    data = torch.Generator().manual_seed(0)
    return TrainingState(model, torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options}), extras={"data": data})


def member(state: TrainingState | None = None, **knobs: Any) -> StateMember:
    state = state or state_of(momentum=0.9)
    model, optimizer, data = state.models[""], state.optimizers[""], state._parts.extras["data"]

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=data)).square().mean().backward()
        optimizer.step()

    def score() -> float:
        return float(model[0].weight.detach().square().sum())

    return StateMember(state, step=step, score=score, knobs=knobs or {"lr": LearningRate(state)})


def test_it_trains_up_to_a_step_and_scores() -> None:
    one = member()
    assert one.train(3) != one.train(5) == one.train(5)
    assert one.num_steps == 5


def test_taking_over_without_words_resets_moments_and_keeps_streams() -> None:
    source, target = member(), member()
    source.train(4)
    target.train(2)
    drawn = target.state.capture().meta["extras"]["data"], target.state.capture().loose["extras.data"].clone()
    target.set_parameters(source.get_parameters())
    assert target.num_steps == 4 and not target.state.capture().table("optimizer")
    assert torch.equal(target.state.models[""][0].weight, source.state.models[""][0].weight)
    assert torch.equal(target.state.capture().loose["extras.data"], drawn[1])


@pytest.mark.parametrize("way", ["in memory", "as bytes"])
def test_one_that_was_saved_goes_on_as_if_it_had_not_been(way: str) -> None:
    one, other = member(), member()
    one.apply_hyperparameters({"lr": 0.03})
    one.train(4)
    state = one.state_dict() if way == "in memory" else from_bytes(to_bytes(one.state_dict()))
    chance = torch.get_rng_state()
    expected = one.train(9)
    other.load_state_dict(state)
    torch.set_rng_state(chance)
    assert other.hyperparameters() == {"lr": 0.03} and other.num_steps == 4
    assert other.train(9) == expected


def test_knobs_read_what_is_in_force_and_write_to_where_it_is_used() -> None:
    state = state_of(momentum=0.9, weight_decay=0.01)
    knobs = {
        "lr": LearningRate(state),
        "momentum": Option(state, "momentum"),
        "dropout": Attribute(state.models[""][1], "p"),
    }
    one = member(state, **knobs)
    assert one.hyperparameters() == {"lr": 0.1, "momentum": 0.9, "dropout": 0.1}
    values = {"lr": 0.07, "momentum": 0.5, "dropout": 0.3}
    assert one.apply_hyperparameters(values) == values == one.hyperparameters()
    (group,) = state.optimizers[""].param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], state.models[""][1].p) == (0.07, 0.5, 0.01, 0.3)


def test_an_option_is_set_in_the_groups_that_share_it() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]
    groups = [
        {"params": layer.parameters(), "weight_decay": decay} for layer, decay in zip(layers, (0.1, 0.0, 0.1), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    state = TrainingState(nn.ModuleList(layers), optimizer)
    Option(state, "weight_decay").write(0.2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.2]


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    state = state_of()
    with pytest.raises(ValueError, match=r"(?s)."):
        LearningRate(state).write(rate)
    assert LearningRate(state).read() == 0.1


def test_of_several_optimizers_one_is_named() -> None:
    models = {"actor": nn.Linear(2, 1), "critic": nn.Linear(2, 1)}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    state = TrainingState(models, optimizers)
    LearningRate(state, "critic").write(0.5)
    assert [LearningRate(state, name).read() for name in models] == [0.1, 0.5]


def test_what_is_not_there_is_refused_when_the_knob_is_made() -> None:
    state = state_of()
    with pytest.raises(ValueError, match="`beta` must be one of"):
        Option(state, "beta")
    with pytest.raises(AttributeError):
        Attribute(state.models[""], "p")
    with pytest.raises(ValueError, match="`streams` must be derive or inherit"):
        StateMember(state, step=lambda: None, score=lambda: 0.0, knobs={}, streams="keep")


def test_an_unknown_hyperparameter_changes_nothing() -> None:
    one = member()
    with pytest.raises(ValueError, match="`gamma` must be one of lr"):
        one.apply_hyperparameters({"lr": 0.5, "gamma": 0.9})
    assert one.hyperparameters() == {"lr": 0.1}


def test_a_value_that_is_not_in_force_afterwards_is_a_mismatch() -> None:
    class Rounding:
        value = 0.0

        def read(self) -> float:
            return self.value

        def write(self, value: Any) -> None:
            self.value = round(value, 1)

    one = member(None, p=Rounding())
    bind(one, {"p": 0.5}, "member 3")
    with pytest.raises(HyperparameterMismatch, match=r"member 3: `p` must be 0.55 .* and 0\.\d is in force"):
        bind(one, {"p": 0.55}, "member 3")


def test_a_run_of_another_shape_is_refused_and_nothing_changes() -> None:
    one, other = member(), state_of(width=4, momentum=0.9)
    before = one.state.capture().checksum()
    with pytest.raises(StateMismatch):
        one.adopt({"snapshot": other.capture(), "num_steps": 7}, "copy", seed=1)
    assert one.state.capture().checksum() == before and one.num_steps == 0


def test_streams_are_derived_from_the_seed_by_name() -> None:
    one = member()
    one.train(2)
    one.adopt(member().get_parameters(), "reset", seed=11)
    data: Any = one.state._parts.extras["data"]
    assert torch.equal(data.get_state(), RandomStreams(11).torch("data").get_state())
