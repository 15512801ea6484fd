"""Capture and restore: identity, bit-identical continuation, and nothing shared with the snapshot."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn

from morphogen.state import TrainingState


def test_a_restored_run_continues_bit_identically(kit: Any, any_optimizer: str, any_schedule: str) -> None:
    run = kit.build(any_optimizer, any_schedule)
    run.steps(3)
    before, identities = run.contents(), run.identities()
    snapshot = run.state.capture()
    checksum = snapshot.checksum()
    assert kit.same(run.contents(), before)  # capturing changes nothing, draws nothing
    losses, after = run.steps(4), run.contents()
    assert not kit.same(before, after)
    for _ in range(3):
        run.state.restore(snapshot)
        assert kit.same(run.contents(), before)
        assert run.identities() == identities
        assert all(parameter.grad is None for parameter in run.model.parameters())
        assert run.steps(4) == losses
        assert kit.same(run.contents(), after)
        assert snapshot.checksum() == checksum
    run.state.verify()


def test_restoring_to_before_the_first_step_empties_the_optimizer(kit: Any, any_optimizer: str) -> None:
    run = kit.build(any_optimizer, "lambda")
    before = run.contents()
    snapshot = run.state.capture()
    losses, after = run.steps(4), run.contents()
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.steps(4) == losses
    assert kit.same(run.contents(), after)


def test_named_groups_keep_their_names(kit: Any) -> None:
    run = kit.build("adamw-groups", "plateau")
    groups = run.optimizers[""].param_groups
    named = [list(group["param_names"]) for group in groups]
    run.steps(2)
    snapshot = run.state.capture()
    run.steps(2)
    run.model.body.requires_grad_(False)
    run.state.reshape()
    run.model.body.requires_grad_(True)
    run.state.reshape()
    assert [group["param_names"] for group in groups] != named
    run.state.restore(snapshot)
    assert [group["param_names"] for group in groups] == named


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam", "adamw-single", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_continues_bit_identically(kit: Any, optimizer: str, dtype: torch.dtype) -> None:
    run = kit.build(optimizer, "cosine")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    state = TrainingState(run.model, run.optimizers, run.schedulers, scaler, run.extras)

    def step() -> float:
        tokens = torch.randint(0, 7, (4, 3), generator=run.extras["data"])
        for stepped in run.optimizers.values():
            stepped.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = run.model(tokens).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(stepped)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            scaler.step(stepped)
            scaler.update()
        for scheduler in run.schedulers.values():
            scheduler.step()
        return float(loss.detach())

    for _ in range(3):
        step()
    snapshot, before, scale = state.capture(), run.contents(), scaler.state_dict()
    losses, after, later_scale = [step() for _ in range(4)], run.contents(), scaler.state_dict()
    assert scale != later_scale
    for _ in range(2):
        state.restore(snapshot)
        assert kit.same(run.contents(), before)
        assert scaler.state_dict() == scale
        assert [step() for _ in range(4)] == losses
        assert kit.same(run.contents(), after)
        assert scaler.state_dict() == later_scale


@pytest.mark.parametrize("strategy", ["restore", "reset", "keep"])
def test_a_restore_between_unscale_and_update_leaves_the_scaler_ready(strategy: Any) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    state = TrainingState(model, optimizer, scaler=scaler)
    snapshot = state.capture()
    for _ in range(2):  # the second time round, unscale_ raises if the scaler still thinks it has been called
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        state.restore(snapshot, strategy)


@pytest.mark.parametrize("optimizer", ["adam", "sgd-momentum", "rmsprop", "adagrad", "muon", "adafactor"])
def test_reset_forgets_moments_and_leaves_rates_and_schedule(kit: Any, optimizer: str) -> None:
    run = kit.build(optimizer, "cosine")
    run.steps(2)
    snapshot = run.state.capture()
    saved = run.contents()
    run.steps(3)
    later, identities = run.contents(), run.identities()
    run.state.restore(snapshot, "reset")
    now = run.contents()
    assert run.identities() == identities
    for part in ("tensors", "ema", "tally", "hidden", "streams", "global"):
        assert kit.same(now[part], saved[part])
    assert kit.same(now["schedulers"], later["schedulers"])
    for part, stepped in run.optimizers.items():
        assert not stepped.state_dict()["state"]
        assert kit.same(now["optimizers"][part]["param_groups"], later["optimizers"][part]["param_groups"])
    _first_update_is_that_of_a_new_optimizer(kit, run)


def _first_update_is_that_of_a_new_optimizer(kit: Any, run: Any) -> None:
    twin = copy.deepcopy((run.model, run.optimizers))
    for stepped in twin[1].values():
        assert not stepped.state_dict()["state"]
    for model, optimizers in (twin, (run.model, run.optimizers)):
        for stepped in optimizers.values():
            model.eval()
            loss = model(torch.arange(6).reshape(2, 3)).square().sum()
            stepped.zero_grad()
            loss.backward()
            stepped.step()
    assert kit.same(kit.tensors(twin[0]), kit.tensors(run.model))


def test_keep_leaves_the_optimizer_alone(kit: Any) -> None:
    run = kit.build("adamw-groups", "onecycle")
    run.steps(2)
    snapshot, saved = run.state.capture(), run.contents()
    run.steps(3)
    later = run.contents()
    run.state.restore(snapshot, "keep")
    now = run.contents()
    assert kit.same(now["optimizers"], later["optimizers"])
    assert kit.same(now["schedulers"], later["schedulers"])
    for part in ("tensors", "ema", "tally", "hidden", "streams", "global"):
        assert kit.same(now[part], saved[part])


def test_train_modes_and_frozen_parameters_come_back(kit: Any) -> None:
    run = kit.build("adam")
    run.model.norm.eval()
    snapshot, before = run.state.capture(), run.contents()
    run.model.eval()
    run.model.body.requires_grad_(False)
    run.model.frozen.requires_grad_(True)
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)


@pytest.mark.parametrize("strategy", ["restore", "reset", "keep"])
def test_a_parameter_frozen_since_is_trained_again(kit: Any, strategy: Any) -> None:
    run = kit.build("adam", "lambda")
    run.steps(1)
    snapshot = run.state.capture()
    run.model.body.requires_grad_(False)
    run.state.reshape()
    assert len(run.optimizers[""].param_groups[0]["params"]) == len(list(run.model.parameters())) - 4
    run.steps(1)
    run.state.restore(snapshot, strategy)
    run.state.verify()
    before = run.model.body.weight.detach().clone()
    run.steps(1)
    assert not torch.equal(run.model.body.weight, before)


def test_a_group_added_since_is_gone_after_a_restore(kit: Any) -> None:
    run = kit.build("adam", "lambda")
    run.steps(2)
    snapshot, before = run.state.capture(), run.contents()
    losses = run.steps(2)
    late = nn.Parameter(torch.zeros(2))
    run.optimizers[""].add_param_group({"params": [late], "lr": 0.5})
    run.schedulers[""].base_lrs.append(0.5)
    run.schedulers[""].lr_lambdas.append(lambda step: 1.0)
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.steps(2) == losses


def test_a_group_removed_since_is_back_after_a_restore(kit: Any) -> None:
    run = kit.build("adamw-groups", "lambda")
    run.steps(2)
    snapshot, before = run.state.capture(), run.contents()
    losses = run.steps(2)
    removed = run.optimizers[""].param_groups.pop()
    for parameter in removed["params"]:
        run.optimizers[""].state.pop(parameter, None)
    for name in ("base_lrs", "lr_lambdas", "_last_lr"):
        getattr(run.schedulers[""], name).pop()
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.steps(2) == losses


def test_a_tensor_rate_is_written_in_place_also_after_it_was_replaced(kit: Any) -> None:
    run = kit.build("adamw-tensor-lr", "cosine")
    run.steps(2)
    snapshot, before = run.state.capture(), run.contents()
    losses = run.steps(2)
    run.optimizers[""].param_groups[0]["lr"] = 0.5  # a float where a tensor was
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    run.optimizers[""].param_groups[0]["lr"].fill_(9.0)
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.steps(2) == losses


def test_models_optimizers_and_schedulers_by_name(kit: Any) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    models = {"actor": nn.Sequential(shared, nn.Linear(3, 2)), "critic": nn.Sequential(shared, nn.Linear(3, 1))}
    optimizers = {
        "actor": torch.optim.Adam(models["actor"].parameters(), lr=0.01),
        "critic": torch.optim.SGD(models["critic"][1].parameters(), lr=0.1, momentum=0.9),
    }
    schedulers = {name: torch.optim.lr_scheduler.ExponentialLR(value, 0.9) for name, value in optimizers.items()}
    state = TrainingState(models, optimizers, schedulers)

    def step() -> None:
        inputs = torch.rand(4, 3)
        (models["actor"](inputs).square().sum() + (models["critic"](inputs) - 1).square().sum()).backward()
        for name, optimizer in optimizers.items():
            optimizer.step()
            optimizer.zero_grad()
            schedulers[name].step()

    def contents() -> Any:
        return [(kit.tensors(models[n]), kit.optimizer(optimizers[n]), kit.schedule(schedulers[n])) for n in models]

    step()
    snapshot, before = state.capture(), contents()
    step()
    after = contents()
    state.restore(snapshot)
    assert kit.same(contents(), before)
    step()
    assert kit.same(contents(), after)
    state.reshape()
    assert kit.same(contents()[0][1]["state"], after[0][1]["state"])
    state.verify()
    assert state.learning_rates() == pytest.approx({"actor.model.actor": 0.0081, "critic.model.critic": 0.081})


class Remembering(nn.Linear):
    """A module with ``get_extra_state``."""

    calls = 0
    limit = 99

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "scale": torch.tensor(float(self.calls))}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["calls"] > self.limit:
            raise ValueError("too many calls")
        self.calls = state["calls"]


def test_extra_state_of_modules_comes_back() -> None:
    model = nn.Sequential(Remembering(2, 2))
    state = TrainingState(model)
    model[0].calls = 3
    snapshot = state.capture()
    model[0].calls = 7
    state.restore(snapshot)
    assert model[0].calls == 3


def test_what_belongs_to_no_run_is_refused(kit: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"`model` must be a Module or a dict of them by name \(no dots\), got int"):
        TrainingState(3)
    with pytest.raises(TypeError, match="`model` must be .* under 'a.b'"):
        TrainingState({"a.b": model})
    with pytest.raises(TypeError, match="`optimizer` must be .*, got Linear"):
        TrainingState(model, model)
    with pytest.raises(TypeError, match="`scheduler` must have `state_dict` and `load_state_dict`, got function"):
        TrainingState(model, scheduler=lambda step: 1.0)
    with pytest.raises(TypeError, match="`scaler` must have `state_dict` and `load_state_dict`, got float"):
        TrainingState(model, scaler={"a": 1.0})
    with pytest.raises(TypeError, match="extra `clock` must be a module, a tensor, a generator or have .*, got int"):
        TrainingState(model, extras={"clock": 3})
    with pytest.raises(ValueError, match="`snapshot_location` must be one of device, host, got 'disk'"):
        TrainingState(model, snapshot_location="disk")
    with pytest.raises(ValueError, match="`weight` must hold data"):
        TrainingState(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="`weight` must hold data"):
        TrainingState(nn.Linear(2, 1, device="meta"))


def test_an_unknown_strategy_is_refused_by_name(kit: Any) -> None:
    run = kit.build()
    snapshot = run.state.capture()
    with pytest.raises(ValueError, match="`optimizer` must be one of restore, reset, keep, got 'zero'"):
        run.state.restore(snapshot, "zero")
    with pytest.raises(ValueError, match="`optimizer` must be one of reset, copy, rescale, adaptive, got 'restore'"):
        run.state.adopt(snapshot, "restore")


def test_an_orphan_makes_capture_refuse(kit: Any) -> None:
    run = kit.build()
    run.model.load_state_dict(run.model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"an optimizer holds a parameter of shape \(7, 6\) that is in no model"):
        run.state.capture()


def test_every_other_stateful_extra(kit: Any) -> None:
    """Python's own generators, and an extra that is a parameter in the optimizer."""
    stream, temperature = random.Random(3), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([temperature], lr=0.1)
    state = TrainingState({}, optimizer, extras={"stream": stream, "temperature": temperature})

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        (temperature * stream.random()).sum().backward()
        optimizer.step()
        return stream.random(), float(temperature.detach())

    step()
    snapshot = state.capture()
    expected = [step(), step()]
    state.restore(snapshot)
    assert [step(), step()] == expected
    state.reshape()
    assert optimizer.param_groups[0]["params"] == [temperature]
    state.verify()
