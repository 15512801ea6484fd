"""Taking over another run: its weights and, as asked, its moments; the adopter keeps its groups, rates and chance."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import StateMismatch
from morphogen.state import TrainingState

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
STRATEGIES = ["reset", "copy", "rescale", "adaptive"]


def names_in(run: Any) -> dict[nn.Parameter, str]:
    """The names of the model's parameters; the tied one goes by its first in the alphabet."""
    return {parameter: name for name, parameter in run.model.named_parameters(remove_duplicate=False) if "head" not in name}


def moments(run: Any) -> dict[str, dict[str, Any]]:
    """Copies of all state by parameter name, read from the optimizers themselves."""
    names = names_in(run)
    found: dict[str, dict[str, Any]] = {}
    for optimizer in run.optimizers.values():
        found |= {names[parameter]: copy.deepcopy(values) for parameter, values in optimizer.state.items() if values}
    return found


def rates(run: Any) -> dict[str, float]:
    names = names_in(run)
    groups = [group for optimizer in run.optimizers.values() for group in optimizer.param_groups]
    return {names[parameter]: float(group["lr"]) for group in groups for parameter in group["params"]}


def pair(kit: Any, optimizer: str, schedule: str = "cosine", theirs: str = "") -> tuple[Any, Any]:
    """A source and a target of other weights, data, progress and order of registration."""
    source = kit.build(theirs or optimizer, schedule, seed=1)
    source.steps(5)
    target = kit.build(optimizer, schedule, seed=2, reverse=True)
    target.steps(2)
    return source, target


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", ["adamw-groups", "sgd-momentum", "rmsprop", "muon", "adamw-tensor-lr", "adafactor"])
def test_what_is_taken_over_and_what_is_kept(kit: Any, optimizer: str, strategy: Any) -> None:
    source, target = pair(kit, optimizer)
    target.model.norm.eval()
    theirs, before, identities = source.contents(), target.contents(), target.identities()
    snapshot = source.state.capture()
    checksum = snapshot.checksum()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    chance = target.contents()["global"]
    target.state.adopt(snapshot, strategy)
    now = target.contents()
    for part in ("tensors", "ema", "tally", "hidden"):
        assert kit.same(now[part], theirs[part])
    for part in ("schedulers", "streams", "training"):
        assert kit.same(now[part], before[part])
    assert kit.same(now["global"], chance)
    for part in target.optimizers:
        assert kit.same(now["optimizers"][part]["param_groups"], before["optimizers"][part]["param_groups"])
    assert target.identities() == identities
    assert kit.same(source.contents()["tensors"], theirs["tensors"])
    assert all(parameter.grad is None for parameter in target.model.parameters())
    target.steps(3)
    assert snapshot.checksum() == checksum
    after = target.contents()
    source.state.restore(snapshot)
    source.steps(2)
    assert kit.same(target.contents()["tensors"], after["tensors"])
    target.state.verify()


def test_reset_forgets_every_moment(kit: Any, any_optimizer: str) -> None:
    source, target = pair(kit, any_optimizer)
    target.state.adopt(source.state.capture(), "reset")
    assert moments(target) == {}
    target.steps(2)


def test_copied_moments_are_the_sources_by_name(kit: Any, any_optimizer: str) -> None:
    if any_optimizer == "lbfgs":
        pytest.skip("its one flat history depends on the order of the parameters; see below")
    source, target = pair(kit, any_optimizer)
    expected = moments(source)
    target.state.adopt(source.state.capture(), "copy")
    assert kit.same(moments(target), expected)


def test_a_twin_that_copies_everything_goes_on_as_the_source_does(kit: Any, any_optimizer: str) -> None:
    if any_optimizer == "lbfgs":
        pytest.skip("its one flat history depends on the order of the parameters; see below")
    source = kit.build(any_optimizer, "lambda", seed=1)
    source.steps(3)
    target = kit.build(any_optimizer, "lambda", seed=2, reverse=True)
    target.steps(3)
    target.state.adopt(source.state.capture(), "copy")
    for name in ("data", "noise"):
        stream, other = source.extras[name], target.extras[name]
        if name == "data":
            other.set_state(stream.get_state())
        else:
            other.bit_generator.state = stream.bit_generator.state
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()
    expected = source.steps(3)
    torch.set_rng_state(chance[0]), random.setstate(chance[1]), np.random.set_state(chance[2])
    assert target.steps(3) == expected
    assert kit.same(target.contents()["tensors"], source.contents()["tensors"])
    assert kit.same(moments(target), moments(source))


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum", "adamw-groups", "rmsprop", "nadam", "muon", "adafactor"])
def test_rescaled_momentum_keeps_its_velocity(kit: Any, optimizer: str) -> None:
    source, target = pair(kit, optimizer)
    for group in next(iter(target.optimizers.values())).param_groups:
        group["lr"] *= 3.0
    theirs, own, old = rates(source), rates(target), moments(source)
    target.state.adopt(source.state.capture(), "rescale")
    now = moments(target)
    assert set(now) == set(old)
    for name, values in now.items():
        for key, value in values.items():
            if key in FIRST_MOMENTS:
                torch.testing.assert_close(own[name] * value, theirs[name] * old[name][key], rtol=1e-5, atol=0)
            else:
                assert kit.same(value, old[name][key])


def test_a_rate_of_zero_leaves_momentum_as_it_is(kit: Any) -> None:
    source, target = pair(kit, "sgd-momentum", "none")
    target.optimizers[""].param_groups[0]["lr"] = 0.0
    target.state.adopt(source.state.capture(), "rescale")
    assert kit.same(moments(target), moments(source))


def test_adaptive_takes_what_is_safe_for_each_parameter(kit: Any) -> None:
    source, target = pair(kit, "adamw-groups", "none", theirs="adamw-foreach")
    decayed, plain = target.optimizers[""].param_groups
    decayed["lr"], plain["lr"] = 0.01 / 4, 0.01 / 25  # theirs is 0.01
    source.optimizers[""].state[source.model.body.weight]["exp_avg_sq"][0, 0] = float("inf")
    old = moments(source)
    target.state.adopt(source.state.capture(), "adaptive")
    now = moments(target)
    assert set(now) == {"embed.weight"}  # the others: rates 25 times apart, or a moment that is not finite
    expected = old["embed.weight"]
    assert torch.equal(now["embed.weight"]["exp_avg"], expected["exp_avg"] * 4.0)
    assert torch.equal(now["embed.weight"]["exp_avg_sq"], expected["exp_avg_sq"])
    assert now["embed.weight"]["step"] == 5
    target.steps(2)


@pytest.mark.parametrize("theirs", ["sgd-momentum", "adamw-amsgrad", "adam"])
def test_adaptive_resets_where_the_optimizers_differ(kit: Any, theirs: str) -> None:
    source, target = pair(kit, "adamw-groups", "none", theirs=theirs)
    target.state.adopt(source.state.capture(), "adaptive")
    assert moments(target) == {}
    assert kit.same(target.contents()["tensors"], source.contents()["tensors"])


DIFFERENT = {
    "sgd-momentum": "optimizer is AdamW, the snapshot's was SGD",
    "adamw-amsgrad": r"option `amsgrad` is \[False\] here and \[True\] in the source",
}


@pytest.mark.parametrize("strategy", ["copy", "rescale"])
@pytest.mark.parametrize("theirs", DIFFERENT)
def test_moments_of_another_kind_are_refused_and_nothing_changes(kit: Any, theirs: str, strategy: Any) -> None:
    source, target = pair(kit, "adamw-groups", theirs=theirs)
    before, identities = target.contents(), target.identities()
    with pytest.raises(StateMismatch, match=DIFFERENT[theirs]):
        target.state.adopt(source.state.capture(), strategy)
    assert kit.same(target.contents(), before)
    assert target.identities() == identities


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_parameter_that_only_one_side_steps_is_refused_by_name(kit: Any, side: str) -> None:
    source, target = pair(kit, "adam", "none")
    run = source if side == "source" else target
    left_out, optimizer = run.model.body.weight, run.optimizers[""]
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not left_out]
    del optimizer.state[left_out]
    before = target.contents()
    message = "the source has no moments for" if side == "source" else "the target's optimizer does not hold"
    with pytest.raises(StateMismatch, match=f"{message} `body.weight`"):
        target.state.adopt(source.state.capture(), "copy")
    assert kit.same(target.contents(), before)
    target.state.adopt(source.state.capture(), "adaptive")
    assert "body.weight" not in moments(target)
    assert "embed.weight" in moments(target)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_frozen_is_taken_over_and_membership_follows(kit: Any, strategy: Any) -> None:
    source, target = pair(kit, "adam")
    source.model.body.requires_grad_(False)
    target.model.norm.requires_grad_(False)
    target.state.reshape()
    target.state.adopt(source.state.capture(), strategy)
    frozen = {name for name, parameter in target.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"body.weight", "body.bias", "frozen.weight", "frozen.bias"}
    target.state.verify()
    expected = {} if strategy == "reset" else {name for name in moments(source) if "body" not in name}
    assert set(moments(target)) == set(expected)
    target.steps(2)
    assert kit.same(target.model.body.weight, source.model.body.weight)


def test_lbfgs_copies_only_between_equal_orders(kit: Any) -> None:
    source, target = pair(kit, "lbfgs", "none")
    snapshot = source.state.capture()
    before = target.contents()
    with pytest.raises(StateMismatch, match="LBFGS holds one flat history"):
        target.state.adopt(snapshot, "copy")
    assert kit.same(target.contents(), before)
    target.state.adopt(snapshot, "adaptive")
    assert moments(target) == {}
    twin = kit.build("lbfgs", seed=3)
    twin.steps(1)
    twin.state.adopt(snapshot, "copy")
    assert kit.same(moments(twin), moments(source))


def test_a_snapshot_without_optimizer_is_adopted_by_reset_alone(kit: Any) -> None:
    source, target = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    snapshot = TrainingState(source).capture()
    state = TrainingState(target, optimizer)
    for strategy in ("copy", "rescale"):
        with pytest.raises(StateMismatch, match="optimizer '' is in the run and missing from the snapshot"):
            state.adopt(snapshot, strategy)
        assert not torch.equal(target.weight, source.weight)
    state.adopt(snapshot)
    assert torch.equal(target.weight, source.weight)


def test_a_scaler_is_taken_over() -> None:
    def run(scale: float) -> tuple[TrainingState, torch.amp.GradScaler]:
        model, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=scale)
        return TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler), scaler

    source, target = run(8.0), run(64.0)
    target[0].adopt(source[0].capture())
    assert target[1].get_scale() == 8.0


class Whitened(nn.Linear):
    """Its extra state belongs to its weights."""

    scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)


def test_extra_states_belong_to_the_weights_and_train_mode_to_the_run() -> None:
    def run(scale: float) -> tuple[nn.Module, nn.Module, TrainingState]:
        model, slow = Whitened(2, 1), Whitened(2, 1)
        model.scale, slow.scale = scale, -scale
        return model, slow, TrainingState(model, extras={"ema": slow})

    source, target = run(3.0), run(5.0)
    source[0].eval()
    target[2].adopt(source[2].capture())
    assert (target[0].scale, target[1].scale) == (3.0, -3.0)
    assert target[0].training
