"""The newborn policy: rates are a closed form of the age of a seed, and everything about it is part of the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch.optim import Optimizer, lr_scheduler

from morphogen.governor import Governor, GovernorConfig
from morphogen.growth import GrowableModel, NewbornConfig, NewbornPolicy, Stage
from morphogen.growth.newborn import cosine, peak_factor, rate_factor, warm_up
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.config import GrowConfig
from morphogen.state import TrainingState, surgery
from morphogen.telemetry.events import discard
from morphogen.testing import HostCase, lead_to

PEAK, TOTAL_STEPS = 0.02, 40
CASE = HostCase("NC")
RESTART = NewbornConfig(learning_rate="restart", warmup_steps=5)
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=PEAK, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=PEAK, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=PEAK, foreach=True),
    "adamw-tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(PEAK, dtype=torch.float64), foreach=False),
}
CONFIGS = [
    NewbornConfig(),
    NewbornConfig(warmup_steps=6, learning_rate_scale=0.5, weight_decay=0.1),
    RESTART.replace(learning_rate_scale=3.0),
    NewbornConfig(learning_rate="boost", boost=1.5),
]


class Run:
    """A growing run with a newborn policy, on random data that depends on the step alone."""

    def __init__(
        self,
        config: NewbornConfig,
        optimizer: str = "adamw",
        schedule: Callable[[Optimizer], Any] = lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL_STEPS),
        **options: Any,
    ) -> None:
        self.model: GrowableModel = CASE.model()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = schedule(self.optimizer)
        self.policy = NewbornPolicy(config, self.model, self.optimizer, TOTAL_STEPS, **options)
        self.count = torch.zeros(())
        self.state = TrainingState(
            self.model,
            self.optimizer,
            self.scheduler,
            extras={"newborn": self.policy, "count": self.count},
            newborn_options=self.policy.options,
        )

    def step(self) -> None:
        data = torch.Generator().manual_seed(int(self.count))
        inputs, targets = torch.randn(4, 6, generator=data), torch.randn(4, 3, generator=data)
        self.optimizer.zero_grad()
        (self.model(inputs) - targets).square().mean().backward()
        self.model.sense()
        self.optimizer.step()
        self.scheduler.step()
        self.policy.step()
        self.count += 1

    def steps(self, count: int) -> list[dict[str, float]]:
        """Train, and return the rates with which each step was taken."""
        rates: list[dict[str, float]] = []
        for _ in range(count):
            rates.append(self.state.learning_rates())
            self.step()
        return rates

    def sow(self, slot: str = "early", stage: Stage = Stage.TRAINING) -> None:
        """Germinate, and let the seed learn."""
        self.model.germinate(slot, "mlp")
        lead_to(self.model, slot, stage, CASE.example())

    def parameters(self, owner: str) -> list[torch.nn.Parameter]:
        return [parameter for _, parameter in self.model.owners()[owner]]

    def contents(self) -> dict[str, Any]:
        """Weights, moments, rates and births, without the help of the code under test."""
        named = dict(self.model.named_parameters())
        return {
            "weights": {name: parameter.detach().clone() for name, parameter in named.items()},
            "moments": {
                name: {key: value.clone() for key, value in self.optimizer.state[parameter].items() if value is not None}
                for name, parameter in named.items()
                if parameter in self.optimizer.state
            },
            "rates": [(float(group["lr"]), float(group.get("initial_lr", -1.0))) for group in self.optimizer.param_groups],
            "newborn": self.policy.state_dict(),
        }


# -- the rules ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(0, 100))
def test_the_warm_up_rises_and_ends(age: int, length: int) -> None:
    now, then = warm_up(age, length), warm_up(age + 1, length)
    assert 0.0 < now <= then <= 1.0
    assert (now == 1.0) == (age + 1 >= length)


@given(st.integers(0, 300), st.integers(0, 100), st.integers(-5, 200), st.sampled_from(["inherit", "restart", "boost"]))
def test_factors_stay_between_zero_and_the_scale(age: int, length: int, left: int, curve: Any) -> None:
    config = NewbornConfig(learning_rate=curve, warmup_steps=length, learning_rate_scale=1.5)
    factor = rate_factor(config, age, left)
    assert 0.0 <= factor <= (1.5 if curve == "inherit" else 1.0)
    if curve != "inherit":
        assert rate_factor(config.replace(warmup_steps=0), age + 1, left) <= rate_factor(
            config.replace(warmup_steps=0), age, left
        )


def test_golden_factors() -> None:
    ages = (0, 1, 3, 4, 10, 20, 21)
    assert [rate_factor(NewbornConfig(warmup_steps=4, learning_rate_scale=2.0), age, 20) for age in ages] == [
        *(0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    ]
    golden = [0.25, 0.496922, 0.945503, 0.904508, 0.5, 0.0, 0.0]
    assert [rate_factor(RESTART.replace(warmup_steps=4), age, 20) for age in ages] == pytest.approx(golden, abs=1e-6)
    assert rate_factor(RESTART.replace(warmup_steps=0), 5, 20, schedule=lambda way: 1.0 - way) == 0.75
    assert [peak_factor(NewbornConfig(learning_rate=word, learning_rate_scale=0.5)) for word in ("restart", "boost")] == [
        0.5,
        1.0,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boost": 3.0}, "`boost` must be left out"),
        ({"boost": 3.0, "learning_rate": "restart"}, "`boost` must be left out"),
        ({"boost": 0.0, "learning_rate": "boost"}, "`boost` must be greater than 0"),
        ({"learning_rate": "faster"}, "`learning_rate` must"),
        ({"warmup_steps": -1}, "`warmup_steps` must"),
        ({"momentum": 1}, "`momentum` is not a setting"),
    ],
)
def test_a_setting_without_effect_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewbornConfig(**changes)


@pytest.mark.parametrize(
    ("config", "optimizer", "arguments", "message"),
    [
        ({"moments": "kept_step"}, torch.optim.SGD, {}, '`moments` must be "fresh" with SGD'),
        ({"moments": "kept_step"}, torch.optim.RMSprop, {}, '`moments` must be "fresh" with RMSprop'),
        ({"host_moments": "reset"}, torch.optim.SGD, {}, '`host_moments` must be "carry"'),
        ({"weight_decay": 0.1}, torch.optim.Rprop, {}, "`weight_decay` must be left out with Rprop"),
        ({}, torch.optim.Adam, {"peak_learning_rate": 0.1}, "`peak_learning_rate` must be left out"),
        ({}, torch.optim.Adam, {"schedule": cosine}, "`schedule` must be left out"),
        (
            {"learning_rate": "restart"},
            torch.optim.Adam,
            {"peak_learning_rate": math.inf},
            "`peak_learning_rate` must be positive",
        ),
        ({}, torch.optim.Adam, {"total_steps": 0}, "`total_steps` must be >= 1"),
    ],
)
def test_what_the_optimizer_cannot_do_is_refused(
    config: dict[str, Any], optimizer: Callable[..., Optimizer], arguments: dict[str, Any], message: str
) -> None:
    model = CASE.model()
    arguments = {"total_steps": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        NewbornPolicy(NewbornConfig(**config), model, optimizer(model.parameters(), lr=0.1), **arguments)


# -- rates --------------------------------------------------------------------------------------------------------------


def expected_rate(config: NewbornConfig, birth: int, step: int) -> float:
    """The closed form, written down once more."""
    warm = min(1.0, (step - birth + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.learning_rate == "inherit":
        way, peak = step / TOTAL_STEPS, PEAK
    else:
        way, peak = (step - birth) / (TOTAL_STEPS - birth), PEAK * (config.boost if config.learning_rate == "boost" else 1.0)
    return peak * config.learning_rate_scale * warm * (1 + math.cos(math.pi * way)) / 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.learning_rate)
def test_a_seed_goes_by_its_own_curve_from_birth_to_the_end(config: NewbornConfig, optimizer: str) -> None:
    run = Run(config, optimizer)
    run.steps(10)
    run.sow()
    rates = run.steps(8)
    lead_to(run.model, "early", Stage.FOSSILIZED, CASE.example())
    run.sow("late")
    rates += run.steps(22)
    assert [rate["early"] for rate in rates] == pytest.approx([expected_rate(config, 10, step) for step in range(10, 40)])
    assert [rate["late"] for rate in rates[8:]] == pytest.approx([expected_rate(config, 18, step) for step in range(18, 40)])
    host = NewbornConfig()
    assert [rate["host"] for rate in rates] == pytest.approx([expected_rate(host, 0, step) for step in range(10, 40)])
    decays = {group["owner"]: group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays["early"] == decays["late"] == (config.weight_decay or decays["host"])
    run.state.verify()


def test_the_first_step_of_a_seed_is_taken_at_its_first_rate() -> None:
    run = Run(RESTART, schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.9))
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    run.steps(3)
    run.sow()
    before = [parameter.detach().clone() for parameter in run.parameters("early")]
    run.step()
    moved = max(float((now.detach() - then).abs().max()) for now, then in zip(run.parameters("early"), before, strict=True))
    assert moved == pytest.approx(PEAK / 5, rel=1e-3)  # Adam's first step is one learning rate long


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_default_is_no_policy_at_all(kit: Any, optimizer: str) -> None:
    schedules: list[Callable[[Optimizer], Any]] = [
        lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=50, cycle_momentum=False),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ]
    for schedule in schedules:
        policy, plain = Run(NewbornConfig(), optimizer, schedule), Run(NewbornConfig(), optimizer, schedule)
        plain.state = TrainingState(plain.model, plain.optimizer, plain.scheduler)
        plain.policy.step = lambda: None
        for run in (policy, plain):
            run.steps(6)
            run.sow()
            run.steps(10)
        left, right = policy.contents(), plain.contents()
        assert kit.differences(left, right) == ["newborn"]


def test_the_peak_can_be_given_and_is_onecycles_maximum() -> None:
    cycle = Run(RESTART.replace(warmup_steps=0), schedule=lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=TOTAL_STEPS))
    given_ = Run(RESTART.replace(warmup_steps=0), peak_learning_rate=0.7)
    line = Run(RESTART.replace(warmup_steps=0), schedule=lambda o: lr_scheduler.ConstantLR(o, 1.0))
    for run, peak in ((cycle, 0.3), (given_, 0.7), (line, PEAK)):
        run.steps(5)
        run.sow()
        assert run.state.learning_rates()["early"] == pytest.approx(peak)


def test_the_peak_is_the_initial_rate_where_rates_are_set_by_hand() -> None:
    model = CASE.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK)
    policy = NewbornPolicy(NewbornConfig(learning_rate="restart"), model, optimizer, TOTAL_STEPS)
    state = TrainingState(model, optimizer, extras={"newborn": policy}, newborn_options=policy.options)
    surgery.set_learning_rate(optimizer, PEAK / 100)
    state.scale_learning_rates(0.5)
    model.germinate("early", "mlp")
    assert state.learning_rates() == pytest.approx({"host": PEAK / 200, "early": PEAK / 2})


def test_another_seed_in_the_slot_starts_anew_and_founders_follow_the_host() -> None:
    run = Run(RESTART)
    run.sow()
    run.steps(7)
    lead_to(run.model, "early", Stage.DORMANT, CASE.example())
    assert run.policy.ages_steps == {}
    run.step()
    run.sow()
    assert run.policy.ages_steps == {"early": 0}
    assert run.state.learning_rates()["early"] == pytest.approx(PEAK / 5)

    model = CASE.model()
    model.germinate("late", "mlp")
    optimizer = torch.optim.Adam([{"params": [p for _, p in owned], "owner": o} for o, owned in model.owners().items()], PEAK)
    policy = NewbornPolicy(RESTART, model, optimizer, TOTAL_STEPS)
    state = TrainingState(model, optimizer, extras={"newborn": policy}, newborn_options=policy.options)
    policy.step()
    model.germinate("early", "mlp")
    policy.step()
    assert policy.ages_steps == {"early": 1}
    assert state.learning_rates() == pytest.approx({"host": PEAK, "late": PEAK, "early": expected_rate(RESTART, 1, 2)})


def test_a_tensor_rate_stays_the_same_tensor() -> None:
    run = Run(RESTART, "adamw-tensor")
    run.sow()
    rate = run.optimizer.param_groups[1]["lr"]
    run.steps(3)
    assert run.optimizer.param_groups[1]["lr"] is rate and rate.dtype == torch.float64
    assert rate is not run.optimizer.param_groups[0]["lr"]


def test_a_run_that_does_not_know_the_policy_is_told() -> None:
    model = CASE.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK)
    policy = NewbornPolicy(RESTART, model, optimizer, TOTAL_STEPS)
    state = TrainingState(model, optimizer, extras={"newborn": policy})
    policy.step()
    model.germinate("early", "mlp")
    assert state.learning_rates() == {"host": PEAK, "early": PEAK}
    for _ in range(2):
        with pytest.raises(ValueError, match="`newborn_options` of the TrainingState must be"):
            policy.step()
        assert policy.state_dict()["steps"] == 1


def test_a_frozen_fossil_needs_no_parameters_to_keep_its_curve(tmp_path: Path) -> None:
    run, fresh = Run(RESTART), Run(RESTART)
    for each in (run, fresh):
        each.model.config = each.model.config.replace(freeze_fossils=True)
    run.sow(stage=Stage.FOSSILIZED)
    run.steps(3)
    run.state.save(tmp_path / "run")
    fresh.state.load(tmp_path / "run")
    assert fresh.steps(2) == run.steps(2)
    assert fresh.state.learning_rates()["early"] == pytest.approx(expected_rate(RESTART, 0, 5))


# -- moments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_kept_step_count_makes_the_first_step_too_long_as_the_formula_says(optimizer: str) -> None:
    moved: dict[str, float] = {}
    for moments in ("fresh", "kept_step"):
        run = Run(NewbornConfig(moments=moments, weight_decay=0.0), optimizer)
        run.steps(20)
        run.sow()
        before = run.model.slot("early").seed.get_parameter("body.outer.weight").detach().clone()  # pyright: ignore
        state = run.optimizer.state.get(run.parameters("early")[0], {})
        assert ({key: float(value.abs().sum()) for key, value in state.items()} or None) == (
            None
            if moments == "fresh"
            else {key: 20.0 if key == "step" else 0.0 for key in run.optimizer.state[run.parameters("host")[0]]}
        )
        run.state.verify()
        run.step()
        after = run.model.slot("early").seed.get_parameter("body.outer.weight")  # pyright: ignore
        moved[moments] = float((after.detach() - before).abs().max())
    ratio = (0.1 / (1 - 0.9**21)) / math.sqrt(0.001 / (1 - 0.999**21))
    assert moved["kept_step"] / moved["fresh"] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_germination_resets_the_hosts_moments_if_asked_and_no_others(kit: Any, optimizer: str) -> None:
    for host_moments in ("carry", "reset"):
        run = Run(NewbornConfig(host_moments=host_moments), optimizer)
        run.sow()
        run.steps(4)
        before = run.contents()["moments"]
        run.model.germinate("late", "norm")
        kept = before if host_moments == "carry" else {k: v for k, v in before.items() if k.startswith("slots.")}
        assert before and kit.same(run.contents()["moments"], kept)


def test_a_refused_germination_leaves_births_rates_and_moments(kit: Any) -> None:
    run = Run(RESTART.replace(moments="kept_step", host_moments="reset"))
    run.steps(3)
    before = run.contents()
    refusals = ["late"]

    def refuse() -> None:
        if refusals:
            raise RuntimeError(refusals.pop())

    run.model.on_topology_change(refuse)
    with pytest.raises(RuntimeError, match="late"):
        run.model.germinate("early", "mlp")
    assert kit.differences(before, run.contents()) == []
    run.model.germinate("early", "mlp")
    assert run.policy.ages_steps == {"early": 0}


# -- part of the run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_rewind_and_a_resumed_run_go_on_to_the_bit(kit: Any, optimizer: str, tmp_path: Path) -> None:
    run = Run(RESTART.replace(host_moments="reset"), optimizer)
    run.steps(5)
    run.sow()
    run.steps(4)
    snapshot = run.state.capture()
    run.state.save(tmp_path / "run")
    rates = run.steps(9)
    reference = run.contents()

    lead_to(run.model, "early", Stage.PRUNED, CASE.example())
    run.sow("late")
    run.steps(2)
    run.state.restore(snapshot)
    assert run.policy.ages_steps == {"early": 4}
    assert run.steps(9) == rates
    assert kit.differences(reference, run.contents()) == []

    fresh = Run(RESTART.replace(host_moments="reset"), optimizer)
    fresh.state.load(tmp_path / "run")
    assert fresh.steps(9) == rates
    assert kit.differences(reference, fresh.contents()) == []


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_a_rewind_that_rebuilds_a_group_puts_it_at_its_age(moments: Any) -> None:
    run = Run(RESTART)
    run.steps(5)
    run.sow()
    run.steps(4)
    snapshot = run.state.capture()
    run.model.prune("early")
    run.steps(3)
    run.state.restore(snapshot, moments)
    assert run.policy.ages_steps == {"early": 4}
    assert run.state.learning_rates()["early"] == pytest.approx(expected_rate(RESTART, 5, 9))


def test_an_adopted_run_brings_its_births_at_this_runs_peak() -> None:
    source, target = Run(RESTART), Run(RESTART)
    source.steps(6)
    source.sow()
    source.steps(2)
    target.state.scale_learning_rates(0.1)
    target.state.adopt(source.state.capture())
    assert target.policy.ages_steps == {"early": 2}
    assert target.state.learning_rates()["early"] == pytest.approx(0.1 * expected_rate(RESTART, 6, 8))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.learning_rate)
def test_lowered_rates_stay_lowered_for_seeds_of_before_and_after(config: NewbornConfig, optimizer: str) -> None:
    run = Run(config, optimizer)
    run.steps(3)
    run.sow()
    run.steps(4)
    snapshot = run.state.capture()
    run.state.scale_learning_rates(0.5)
    run.step()
    run.sow("late")
    for _ in range(2):
        rates, step = run.state.learning_rates(), int(run.count)
        assert rates["early"] == pytest.approx(0.5 * expected_rate(config, 3, step))
        assert rates["late"] == pytest.approx(0.5 * expected_rate(config, 8, step))
        run.steps(6)
    run.state.restore(snapshot)
    run.step()
    assert run.state.learning_rates()["early"] == pytest.approx(expected_rate(config, 3, 8))


def test_the_governors_penalty_reaches_newborns_and_stays() -> None:
    run = Run(RESTART)
    run.steps(2)
    run.sow()
    governor = Governor(run.state, GovernorConfig(snapshot_every=4, probation_steps=4, patience=1, skip_window_steps=0))
    for _ in range(12):
        assert governor.observe(torch.ones(()), grad_norm=torch.ones(())).proceed
        run.step()
    factors: list[float] = []
    while len(factors) < 2:
        rollback = governor.observe(torch.tensor(torch.nan), grad_norm=torch.ones(())).rollback
        factors += [] if rollback is None else [rollback.learning_rate_factor]
    assert factors == [1.0, 0.5] and int(run.count) < 14
    for _ in range(3):
        step = int(run.count)
        assert run.state.learning_rates()["early"] == pytest.approx(0.5 * expected_rate(RESTART, 2, step))
        assert run.policy.ages_steps == {"early": step - 2}
        run.step()


def test_the_grow_jobs_checkpoint_holds_the_policy(tmp_path: Path) -> None:
    newborn = RESTART.replace(moments="kept_step", host_moments="reset")
    config = GrowConfig(task="digits", policy="periodic", repeats=1, total_steps=200, newborn=newborn)
    whole, first, second = (ArmRun(config, "grown", 0, discard) for _ in range(3))
    while not whole.done:
        whole.run_tick()
    for _ in range(5):
        first.run_tick()
    first.save(tmp_path, 0)
    second.load(tmp_path)
    while not second.done:
        second.run_tick()
    results = [dataclasses.replace(run.finish(), wall_seconds=0.0) for run in (whole, second)]
    assert results[0] == results[1]
    assert whole.state.capture().checksum() == second.state.capture().checksum()
