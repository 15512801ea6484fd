"""Membership is derived from ownership: after any sequence of changes the optimizer steps exactly what is owned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from morphogen.errors import StateMismatch
from morphogen.state import sync_groups

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "named": lambda p: torch.optim.NAdam([(f"host.{i}", q) for i, q in enumerate(p)], lr=0.1),
}
SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=500),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[10 * float(group["lr"]) for group in o.param_groups], total_steps=500, cycle_momentum=False
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, [float(g["lr"]) for g in o.param_groups], [3 * float(g["lr"]) for g in o.param_groups], 7, cycle_momentum=False
    ),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=500),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.7),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=0, eps=0.0, min_lr=[0.2 * float(group["lr"]) for group in o.param_groups]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=400)], milestones=[4]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=5), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
}
SHAPES = [(3,), (2, 3), (1,), (2, 1, 2)]


def advance(scheduler: Any) -> None:
    scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def parameter(shape: tuple[int, ...] = (2,)) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def differentiate(parameters: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for stepped in parameters:
        stepped.grad = torch.randn(stepped.shape, generator=generator)


class Membership(RuleBasedStateMachine):
    """Owners come and go, parameters move, freeze and train; a reference of one group says what the rates must be."""

    @initialize(optimizer=st.sampled_from(sorted(OPTIMIZERS)), schedule=st.sampled_from(sorted(SCHEDULES)))
    def start(self, optimizer: str, schedule: str) -> None:
        host = [parameter((2, 3)), parameter()]
        self.optimizer = OPTIMIZERS[optimizer](host)
        self.reference = torch.optim.SGD([parameter()], lr=1.0)
        self.schedulers = [SCHEDULES[schedule](stepped) for stepped in (self.optimizer, self.reference)]
        self.owners: dict[str, list[tuple[str, nn.Parameter]]] = {"host": [(f"host.{i}", p) for i, p in enumerate(host)]}
        self.share = {"host": 0.1}  # learning rate over the reference's
        self.born = 0
        self.sync()

    def rate(self) -> float:
        return float(self.reference.param_groups[0]["lr"])

    def owned(self, trainable: bool) -> list[tuple[str, nn.Parameter]]:
        pairs = [(owner, p) for owner, owned in self.owners.items() for _, p in owned]
        return [(owner, p) for owner, p in pairs if p.requires_grad == trainable]

    def sync(self, options: dict[str, dict[str, float]] | None = None) -> None:
        groups = self.optimizer.param_groups
        before = {
            id(group): {k: v for k, v in group.items() if k not in ("params", "param_names", "owner")} for group in groups
        }
        dicts = {group["owner"]: id(group) for group in groups if "owner" in group}
        state = copy.deepcopy({id(p): dict(values) for p, values in self.optimizer.state.items()})
        sync_groups(self.optimizer, self.owners, options=options, schedulers=self.schedulers[:1])
        for group in groups:
            if group["owner"] in dicts:
                assert id(group) == dicts[group["owner"]]
                assert before[id(group)].items() <= group.items()
        for p in [p for group in groups for p in group["params"]]:
            assert len(self.optimizer.state.get(p, {})) == len(state.get(id(p), {}))
            for key, value in self.optimizer.state.get(p, {}).items():
                old = state[id(p)][key]
                assert torch.equal(value, old) if isinstance(value, Tensor) else value == old

    @rule(shapes=st.lists(st.sampled_from(SHAPES), min_size=0, max_size=3), share=st.sampled_from([None, 0.02, 0.3]))
    def add_owner(self, shapes: list[tuple[int, ...]], share: float | None) -> None:
        owner = f"seed{self.born}"
        self.born += 1
        self.owners[owner] = [(f"{owner}.{index}", parameter(shape)) for index, shape in enumerate(shapes)]
        self.share[owner] = share or self.share[self.optimizer.param_groups[0]["owner"]]
        self.sync({owner: {"lr": share * self.rate()}} if share else None)

    @precondition(lambda self: len(self.owners) > 1)
    @rule(data=st.data())
    def remove_owner(self, data: st.DataObject) -> None:
        del self.owners[data.draw(st.sampled_from(sorted(self.owners)))]
        self.sync()

    @rule(data=st.data())
    def move_a_parameter(self, data: st.DataObject) -> None:
        pairs = [(owner, index) for owner, owned in self.owners.items() for index in range(len(owned))]
        if pairs:
            owner, index = data.draw(st.sampled_from(pairs))
            moved = self.owners[owner].pop(index)
            self.owners[data.draw(st.sampled_from(sorted(self.owners)))].append(moved)
            self.sync()

    @rule(data=st.data())
    def drop_a_parameter(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        if self.owners[owner]:
            self.owners[owner].pop()
            self.sync()

    @rule(data=st.data(), trainable=st.booleans())
    def freeze_or_thaw(self, data: st.DataObject, trainable: bool) -> None:
        candidates = self.owned(trainable)
        if candidates:
            index = data.draw(st.integers(0, len(candidates) - 1))
            candidates[index][1].requires_grad_(not trainable)
            self.sync()

    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        differentiate([p for _, p in self.owned(True)], seed)
        before = {p: p.detach().clone() for _, p in self.owned(True)}
        self.optimizer.step()
        assert all(not torch.equal(p, old) for p, old in before.items())
        self.reference.step()
        for scheduler in self.schedulers:
            advance(scheduler)

    @invariant()
    def the_optimizer_steps_what_is_owned(self) -> None:
        if not hasattr(self, "owners"):
            return
        held = [(group["owner"], id(p)) for group in self.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted((owner, id(p)) for owner, p in self.owned(True))
        assert {id(p) for p in self.optimizer.state} <= {key for _, key in held}
        assert {group["owner"] for group in self.optimizer.param_groups} == set(self.owners)

    @invariant()
    def it_can_be_saved_and_rates_keep_their_ratios(self) -> None:
        if not hasattr(self, "owners"):
            return
        saved = self.optimizer.state_dict()
        assert len(saved["param_groups"]) == len(self.owners)
        for group in self.optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(self.share[group["owner"]] * self.rate(), rel=1e-6)
            assert len(group.get("param_names", group["params"])) == len(group["params"])


Membership.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestMembership = Membership.TestCase


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps_before", [0, 3, 6])
def test_a_newborn_keeps_its_ratio_for_the_rest_of_the_schedule(schedule: str, steps_before: int) -> None:
    host, seed = parameter(), parameter()
    optimizer = torch.optim.SGD([host], lr=0.1)
    scheduler = SCHEDULES[schedule](optimizer)

    def step() -> None:
        optimizer.step()
        advance(scheduler)

    for _ in range(steps_before):
        step()
    rate = float(optimizer.param_groups[0]["lr"])
    owners = {"host": [host], "seed": [seed]}
    sync_groups(optimizer, owners, options={"seed": {"lr": 0.25 * rate}}, schedulers=[scheduler])
    first = optimizer.param_groups[0]
    for _ in range(12):
        assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.25 * float(first["lr"]), rel=1e-9)
        step()
    sync_groups(optimizer, {"seed": [seed]}, schedulers=[scheduler])
    assert optimizer.param_groups[0] is not first
    step()


def test_a_newborn_under_a_rate_of_zero_goes_by_the_initial_rate() -> None:
    host, seed = parameter(), parameter()
    optimizer = torch.optim.SGD([host], lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 4) / 4)  # warm-up from zero
    sync_groups(optimizer, {"host": [host], "seed": [seed]}, options={"seed": {"lr": 0.02}}, schedulers=[scheduler])
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.02])


def test_a_newborn_is_modelled_on_the_group_its_parameters_were_in() -> None:
    host, other, late = parameter(), parameter(), parameter()
    optimizer = torch.optim.AdamW([{"params": [host]}, {"params": [other, late], "lr": 0.3, "weight_decay": 0.7}], lr=0.1)
    sync_groups(optimizer, {"host": [host], "other": [other], "split": [late], "new": [parameter()]})
    rates = {group["owner"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {"host": (0.1, 0.01), "other": (0.3, 0.7), "split": (0.3, 0.7), "new": (0.1, 0.01)}


def test_a_tensor_rate_is_not_shared_with_a_newborn() -> None:
    host, seed = parameter(), parameter()
    optimizer = torch.optim.Adam([host], lr=torch.tensor(0.1), foreach=False)
    sync_groups(optimizer, {"host": [host], "seed": [seed]})
    optimizer.param_groups[0]["lr"].fill_(9.0)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.1)


def test_two_groups_of_one_owner_stay_two_even_when_all_in_one_is_frozen() -> None:
    """Weight decay or none is decided once, when the optimizer is made; freezing a layer must not undo it."""
    weight, bias = parameter((2, 2)), parameter()
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], lr=0.1)
    groups = list(optimizer.param_groups)
    bias.requires_grad_(False)
    sync_groups(optimizer, {"model": [weight, bias]})
    assert [group is old for group, old in zip(optimizer.param_groups, groups, strict=True)] == [True, True]
    assert optimizer.param_groups[1]["params"] == []
    differentiate([weight])
    optimizer.step()


def test_groups_may_become_empty_and_all_owners_may_leave() -> None:
    host = parameter()
    for make in OPTIMIZERS.values():
        host.requires_grad_(True)
        optimizer = make([host])
        host.requires_grad_(False)
        sync_groups(optimizer, {"host": [host]})
        assert [group["params"] for group in optimizer.param_groups] == [[]]
        optimizer.step()
        sync_groups(optimizer, {})
        assert optimizer.param_groups == []
        newborn = parameter()
        sync_groups(optimizer, {"new": [newborn]})
        differentiate([newborn])
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"]


def contents(kit: Any, optimizer: Optimizer, scheduler: Any = None) -> Any:
    groups = [(id(group), dict(group), list(group["params"])) for group in optimizer.param_groups]
    members = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for _, group, _ in groups]
    lists = {} if scheduler is None else {k: copy.copy(v) for k, v in vars(scheduler).items() if isinstance(v, list)}
    return [key for key, _, _ in groups], members, options, kit.optimizer(optimizer), lists


class PerGroup(lr_scheduler.LRScheduler):
    """A scheduler of somebody else's, with a list per group of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.speeds = [1.0] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base * speed for base, speed in zip(self.base_lrs, self.speeds, strict=True)]


def _adam(*groups: Any) -> Optimizer:
    return torch.optim.Adam([{"params": list(group)} for group in groups], lr=0.1)


A, B, C = parameter((2, 2)), parameter((2, 2)), parameter()
REFUSED: dict[str, tuple[Callable[[], Optimizer], Callable[[Optimizer], Any], dict[str, Any], Any, type[Exception], str]] = {
    "two owners": (lambda: _adam([A]), lambda o: None, {"a": [A], "b": [("x.w", A)]}, {}, ValueError,
                   "parameter `x.w` must have one owner, got 'a' and 'b'"),
    "unknown option": (lambda: _adam([A]), lambda o: None, {"a": [A], "b": [B]}, {"b": {"momentum": 0.9}}, ValueError,
                       "options of `b` must be options of Adam, got .'momentum'.. Known: lr, betas"),
    "rate below zero": (lambda: _adam([A]), lambda o: None, {"a": [A], "b": [B]}, {"b": {"lr": -0.1}}, ValueError,
                        "`lr` of `b` must be >= 0 and finite, got -0.1"),
    "rate not finite": (lambda: _adam([A]), lambda o: None, {"a": [A], "b": [B]}, {"b": {"lr": float("nan")}}, ValueError,
                        "`lr` of `b` must be >= 0 and finite, got nan"),
    "lbfgs": (lambda: torch.optim.LBFGS([A]), lambda o: None, {"a": [A], "b": [B]}, {}, StateMismatch,
              "LBFGS must keep its parameters"),
    "lbfgs frozen": (lambda: torch.optim.LBFGS([A, B]), lambda o: None, {"a": [A]}, {}, StateMismatch,
                     "LBFGS must keep its parameters"),
    "lbfgs split": (lambda: torch.optim.LBFGS([A, B]), lambda o: None, {"a": [A], "b": [B]}, {}, StateMismatch,
                    "LBFGS must keep its parameters"),
    "muon": (lambda: torch.optim.Muon([A]), lambda o: None, {"a": [A], "b": [C]}, {}, StateMismatch,
             r"Muon must own 2-D parameters only, got shape \(2,\) from `b`"),
    "unknown schedule": (lambda: _adam([A]), PerGroup, {"a": [A], "b": [B]}, {}, StateMismatch,
                         "PerGroup must keep only known per-group lists .*, got `speeds` of 1 entries"),
    "no group to follow": (lambda: _adam([A]), lambda o: (lr_scheduler.StepLR(o, 3), o.param_groups.clear())[0],
                           {"a": [A]}, {}, StateMismatch, "StepLR must have an entry of `base_lrs` for each group"),
    "group added by hand": (lambda: _adam([A]), lambda o: (lr_scheduler.StepLR(o, 3), o.add_param_group({"params": [B]}))[0],
                            {"a": [A], "b": [B], "c": [C]}, {}, StateMismatch, "StepLR must have an entry of `base_lrs`"),
    "not a parameter": (lambda: _adam([A]), lambda o: None, {"a": [A], "b": [A * 2]}, {}, TypeError,
                        r"`b\.0` must be a leaf tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_follow_is_refused_and_nothing_changes(kit: Any, case: str) -> None:
    make, schedule, owners, options, error, message = REFUSED[case]
    optimizer = make()
    scheduler = schedule(optimizer)
    if case not in ("no group to follow", "lbfgs", "lbfgs frozen", "lbfgs split"):
        differentiate([A])
        optimizer.step()
    before = contents(kit, optimizer, scheduler)
    with pytest.raises(error, match=message):
        sync_groups(optimizer, owners, options=options, schedulers=[scheduler] if scheduler else [])
    assert kit.same(contents(kit, optimizer, scheduler), before)


def test_lbfgs_and_unknown_schedules_may_stay_as_they_are() -> None:
    optimizer = torch.optim.LBFGS([A, B])
    sync_groups(optimizer, {"all": [B, A]})
    assert optimizer.param_groups[0]["params"] == [A, B]
    adam = _adam([A], [B])
    scheduler = PerGroup(adam)
    sync_groups(adam, {"a": [A], "b": [B]}, schedulers=[scheduler])
    assert [group["owner"] for group in adam.param_groups] == ["a", "b"]


def test_schedulers_inside_others_follow_too() -> None:
    class Wrapper:
        """Not torch's: holds a scheduler as an attribute, as warm-up wrappers do."""

        def __init__(self, after: Any) -> None:
            self.optimizer, self.after_scheduler = after.optimizer, after

    optimizer = _adam([A])
    inner = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    sync_groups(optimizer, {"a": [A], "b": [B]}, schedulers=[Wrapper(inner)])
    optimizer.step()
    inner.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
