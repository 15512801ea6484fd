"""A member that takes over another one *is* that one, but for what was to change: weights, moments, schedule, chance."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from morphogen.errors import StateMismatch
from morphogen.growth import Stage
from morphogen.pbt import LearningRate, PPOMember, StateMember
from morphogen.pbt.engines.hosting import Birth, Members, Succession
from morphogen.pbt.members.handover import PARTS, hand_over
from morphogen.rl import PPO, PPOConfig
from morphogen.rl.policy import PolicyConfig
from morphogen.state import TrainingState
from morphogen.testing.hosts import HostCase, lead_to

BEFORE, AFTER = 10, 100


class Run:
    """A small training run with everything that one can have: dropout, batch normalisation, averages, scaler, schedule."""

    def __init__(self, seed: int, optimizer: Any, schedule: Any = None, *, scaled: bool = False) -> None:
        torch.manual_seed(seed)  # the test's own stream: see conftest
        self.model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
        self.average = copy.deepcopy(self.model)
        self.optimizer = optimizer(self.model.parameters())
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7, enabled=scaled)
        self.data = torch.Generator().manual_seed(seed)
        scaler = self.scaler if scaled else None
        extras = {"average": self.average, "data": self.data}
        self.state = TrainingState(self.model, self.optimizer, scheduler=self.schedule, scaler=scaler, extras=extras)

    def member(self, streams: str = "inherit") -> StateMember:
        knobs = {"lr": LearningRate(self.state)} if self.optimizer.param_groups[0]["lr"] > 0 else {}
        return StateMember(self.state, step=self.step, score=lambda: 0.0, knobs=knobs, streams=streams)

    def step(self) -> None:
        input_B3 = torch.randn(8, 3, generator=self.data)
        loss = (self.model(input_B3)[:, 0] - input_B3.prod(1)).square().mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(1.0)
        elif self.schedule is not None:
            self.schedule.step()
        with torch.no_grad():
            for ours, theirs in zip(self.average.parameters(), self.model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)


def warm_up_and_cosine(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=15), lr_scheduler.CosineAnnealingLR(optimizer, 120)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[15])


RUNS: dict[str, Callable[[int], Run]] = {
    "SGD with momentum": lambda seed: Run(seed, functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)),
    "Adam": lambda seed: Run(seed, functools.partial(torch.optim.Adam, lr=0.01)),
    "AMSGrad": lambda seed: Run(seed, functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True)),
    "AdamW, foreach": lambda seed: Run(seed, functools.partial(torch.optim.AdamW, lr=0.01, foreach=True)),
    "AdamW, warm-up and cosine": lambda seed: Run(
        seed, functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), warm_up_and_cosine
    ),
    "RMSprop": lambda seed: Run(seed, functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True)),
    "scaler": lambda seed: Run(seed, functools.partial(torch.optim.Adam, lr=0.01), scaled=True),
}


def bits(snapshot: Any, *, without: tuple[str, ...] = ()) -> dict[tuple[str, str], Tensor]:
    return {(table, name): tensor.clone() for table, name, tensor in snapshot.named_tensors() if table not in without}


def assert_same(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", RUNS)
def test_copied_without_any_change_it_repeats_its_source_for_100_steps(name: str) -> None:
    source, target = RUNS[name](1), RUNS[name](2)
    theirs, member = source.member(), target.member()
    theirs.train(BEFORE)
    member.train(BEFORE)
    values = theirs.get_parameters(include_optimizer=True)
    theirs.train(BEFORE + AFTER)
    expected = bits(theirs.state.capture())
    assert not torch.equal(member.state.capture().tensor("model", "0.weight"), expected["model", "0.weight"])
    member.adopt(values, "copy", seed=5)
    member.apply_hyperparameters({name: knob.read() for name, knob in theirs._knobs.items()})
    member.train(BEFORE + AFTER)
    assert_same(bits(member.state.capture()), expected)
    assert source.optimizer.param_groups[0]["lr"] == target.optimizer.param_groups[0]["lr"]
    assert source.scaler.get_scale() == target.scaler.get_scale() and member.num_steps == BEFORE + AFTER


@pytest.mark.parametrize("forgotten", ["reset", ("exp_avg_sq",), ("exp_avg", "exp_avg_sq")])
def test_what_is_not_copied_shows_within_100_steps(forgotten: Any) -> None:
    source, target = RUNS["Adam"](1).member(), RUNS["Adam"](2).member()
    source.train(BEFORE)
    values = source.get_parameters(include_optimizer=True)
    source.train(BEFORE + AFTER)
    target.adopt(values, forgotten, seed=5)
    target.train(BEFORE + AFTER)
    assert not torch.equal(target.state.models[""][0].weight, source.state.models[""][0].weight)


def test_recurrent_ppo_copied_without_any_change_repeats_its_source() -> None:
    def agent(seed: int) -> PPO:
        policy = PolicyConfig(hidden=(8,), memory="lstm", memory_width=8)
        shape: dict[str, Any] = {"num_envs": 2, "rollout_steps": 16, "epochs": 2, "minibatch_size": 16, "sequence_steps": 8}
        return PPO(
            "CartPole-v1", PPOConfig(policy=policy, normalize_observations=True, schedule_steps=8000, seed=seed, **shape)
        )

    source, target = agent(1), agent(2)
    source.learn(64)
    target.learn(64)
    whole, values = source.state.capture(), PPOMember(source).get_parameters(include_optimizer=True)
    source.learn(100 * 32)
    member = PPOMember(target)
    member.adopt(values, "copy", seed=5)
    target.state.follow_streams(whole)  # streams, environments, episodes under way and what is remembered of them
    target.learn(100 * 32)
    assert_same(bits(target.state.capture()), bits(source.state.capture()))
    assert target.recent_returns == source.recent_returns and target.num_steps == source.num_steps
    source.close()
    target.close()


def test_a_grown_network_travels_with_its_structure() -> None:
    def grown(seed: int, blueprint: str | None) -> StateMember:
        case = HostCase("NC")
        model = case.model(seed=seed)
        data = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        state = TrainingState(model, optimizer, extras={"data": data})

        def step() -> None:
            loss = model(torch.randn(4, 6, generator=data)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.tick()

        if blueprint is not None:
            model.germinate("early", blueprint)
            lead_to(model, "early", Stage.HOLDING, case.example())
        return StateMember(state, step=step, score=lambda: 0.0, knobs={"lr": LearningRate(state)}, streams="inherit")

    source, target = grown(1, "mlp"), grown(2, None)
    source.train(BEFORE)
    target.train(BEFORE)
    values = source.get_parameters(include_optimizer=True)
    source.train(BEFORE + AFTER)
    assert len([*target.state.models[""].parameters()]) < len([*source.state.models[""].parameters()])
    target.adopt(values, "copy", seed=5)
    target.train(BEFORE + AFTER)
    assert_same(bits(target.state.capture()), bits(source.state.capture()))
    target.state.verify()


# -- chance -----------------------------------------------------------------------------------------------------------


def children(seeds: tuple[int, ...]) -> list[dict[Any, Tensor]]:
    """Return the weights of the source and of children of it that have trained ten steps more, hyperparameters unchanged."""
    members = Members(lambda place, values, seed: RUNS["Adam"](seed).member("derive"), "score")
    for place in range(len(seeds) + 1):
        assert not members.begin(Birth(place, {"lr": 0.01}, 20 + place))
        assert members.train(place, BEFORE).trained
    values = members.read(0, "copy")
    assert values is not None
    for place, seed in enumerate(seeds, 1):
        assert not members.take_over(Succession(place, {"lr": 0.01}, seed, "copy"), values)
    found: list[dict[Any, Tensor]] = []
    for place in range(len(seeds) + 1):
        assert members.train(place, BEFORE + 10).trained
        snapshot = (members.read(place, "copy") or {})["snapshot"]
        found.append(bits(snapshot))
    return found


def test_children_of_one_source_draw_other_chance_than_each_other_and_than_the_source() -> None:
    first = children((7, 8))
    weights = [each["model", "0.weight"] for each in first]
    assert not any(torch.equal(weights[one], weights[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    for one, other in zip(first, children((7, 8)), strict=True):
        assert_same(one, other)  # the same seeds: the same run
    twins = children((7, 7))
    assert_same(twins[1], twins[2])


def test_streams_of_a_child_hang_on_its_seed_and_not_on_what_it_drew_before() -> None:
    source = RUNS["Adam"](1).member()
    values = source.get_parameters(include_optimizer=True)
    drawn = []
    for steps in (0, 3):
        run = RUNS["Adam"](2)
        member = run.member("derive")
        member.train(steps)
        member.adopt(values, "copy", seed=9)
        drawn.append(torch.randn(4, generator=run.data))
    assert torch.equal(*drawn)


# -- nothing is shared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["reset", "copy", "rescale", "adaptive", ("exp_avg_sq", "step")])
def test_neither_notices_when_the_other_trains_on(strategy: Any) -> None:
    source, target = RUNS["Adam"](1).member("derive"), RUNS["Adam"](2).member("derive")
    source.train(BEFORE)
    values = source.get_parameters(include_optimizer=True)
    content = bits(values["snapshot"])
    target.adopt(values, strategy, seed=3)
    before = bits(source.state.capture(), without=("loose",))
    target.train(BEFORE + 5)
    assert_same(bits(source.state.capture(), without=("loose",)), before)
    after = bits(target.state.capture(), without=("loose",))
    source.train(BEFORE + 5)
    assert_same(bits(target.state.capture(), without=("loose",)), after)
    assert_same(bits(values["snapshot"]), content)


# -- hyperparameters that were applied stay ---------------------------------------------------------------------------------

SCHEDULES: dict[str, Any] = {
    "none": None,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.99**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.98),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [5, 11]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=11),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "SequentialLR": warm_up_and_cosine,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.97), lr_scheduler.LinearLR(o, 0.2, total_iters=20)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, o.param_groups[0]["lr"], 4 * o.param_groups[0]["lr"], step_size_up=6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 4 * o.param_groups[0]["lr"], total_steps=60),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 50, power=2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.5 * o.param_groups[0]["lr"], anneal_epochs=8),
}


def test_every_schedule_of_torch_is_here() -> None:
    assert {*lr_scheduler.__all__} - {"LRScheduler"} <= SCHEDULES.keys()


@pytest.mark.parametrize("strategy", ["reset", "copy"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_applied_rate_is_in_force_for_good_whatever_the_schedule(schedule: str, strategy: Any) -> None:
    """Against ray-project/ray issue 62173: what came with the source's checkpoint put the perturbed rate out of force."""

    def run(seed: int, rate: float) -> Run:
        return Run(seed, functools.partial(torch.optim.SGD, lr=rate, momentum=0.9), SCHEDULES[schedule])

    source, target, reference = run(1, 0.01), run(2, 0.002), run(3, 0.005)
    members = [each.member("derive") for each in (source, target, reference)]
    rate = reference.optimizer.param_groups[0].get("initial_lr", 0.005)
    for each in members:
        each.apply_hyperparameters(each.hyperparameters())
        each.train(BEFORE)
    member = members[1]
    member.adopt({"snapshot": source.state.capture(), "num_steps": BEFORE}, strategy, seed=4)
    assert member.apply_hyperparameters({"lr": rate}) == {"lr": rate} == member.hyperparameters()
    for _ in range(6):
        live, wanted = (each.optimizer.param_groups[0]["lr"] for each in (target, reference))
        assert live == pytest.approx(wanted, rel=1e-9)
        target.step()
        reference.step()
        assert member.hyperparameters() == {"lr": rate}


def test_rates_of_groups_keep_their_ratio() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    state = TrainingState(model, optimizer, scheduler=lr_scheduler.ExponentialLR(optimizer, 0.5))
    knob = LearningRate(state)
    knob.write(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert knob.read() == 0.05


# -- optimizer strategies ---------------------------------------------------------------------------------------------------


def handed_over(strategy: Any, own_rate: float = 0.01) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """Return moments by name: of the source, and of who took it over."""
    source, target = RUNS["Adam"](1), RUNS["Adam"](2)
    source.member().train(BEFORE)
    target.member().train(BEFORE + 3)
    LearningRate(target.state).write(own_rate)
    hand_over(target.state, source.state.capture(), strategy, 1)
    moments = [each.state.capture().table("optimizer") for each in (source, target)]
    return {**moments[0]}, {**moments[1]}


def test_reset_leaves_no_moments_and_copy_all_of_them() -> None:
    theirs, ours = handed_over("reset")
    assert theirs and not ours
    theirs, ours = handed_over("copy")
    assert_same(ours, theirs)


@pytest.mark.parametrize("own_rate", [0.005, 0.02])
@pytest.mark.parametrize("strategy", ["rescale", "adaptive"])
def test_rescaled_first_moments_keep_their_velocity(strategy: str, own_rate: float) -> None:
    theirs, ours = handed_over(strategy, own_rate)
    for name, moment in theirs.items():
        expected = moment * (0.01 / own_rate) if name.endswith(".exp_avg") else moment
        torch.testing.assert_close(ours[name], expected)


def test_adaptive_resets_where_the_rates_are_far_apart() -> None:
    assert not handed_over("adaptive", own_rate=0.0009)[1]
    assert handed_over("rescale", own_rate=0.0009)[1]


@pytest.mark.parametrize("kept", [("exp_avg_sq", "step"), ("exp_avg",), ("step",)])
def test_a_part_of_the_moments_is_copied_and_the_others_are_zero(kept: tuple[str, ...]) -> None:
    theirs, ours = handed_over(kept)
    assert ours.keys() == theirs.keys() and ours
    for name, moment in theirs.items():
        own = name.rpartition(".")[2] in kept
        assert torch.equal(ours[name], moment if own else torch.zeros_like(moment)), name


def test_moments_that_no_optimizer_has_are_named_and_nothing_changes() -> None:
    source, target = RUNS["Adam"](1), RUNS["Adam"](2)
    source.member().train(2)
    before = bits(target.state.capture())
    with pytest.raises(ValueError, match=r"exp_avg, exp_avg_sq, step, got 'momentum_buffer'"):
        hand_over(target.state, source.state.capture(), ("exp_avg", "momentum_buffer"), 1)
    assert_same(bits(target.state.capture()), before)


def test_a_run_that_does_not_fit_changes_nothing() -> None:
    source, target = RUNS["Adam"](1), RUNS["SGD with momentum"](2)
    source.member().train(2)
    target.member().train(2)
    before = bits(target.state.capture())
    with pytest.raises(StateMismatch):
        hand_over(target.state, source.state.capture(), "copy", 1)
    assert_same(bits(target.state.capture()), before)


def test_the_fate_of_every_part_is_written_down() -> None:
    text = " ".join(part.what for part in PARTS)
    for part in ("weights", "buffers", "moments", "groups", "schedule", "scaler", "normalisers", "streams", "environments"):
        assert part in text
