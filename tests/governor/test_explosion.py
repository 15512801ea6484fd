"""Explosion: one rule for losses of any scale and sign, quick on what stays up, silent on what is normal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from morphogen.governor import ExplosionConfig, Finding, Observation
from morphogen.governor.detectors import Explosion
from morphogen.governor.detectors.levels import Level, level_of

QUIET_STEPS = 150


def first_finding(
    losses: Sequence[float], norms: Sequence[float] | None = None, config: ExplosionConfig | None = None
) -> tuple[int, Finding] | None:
    """Show a run to a detector as the governor does; return step and finding of the first alarm."""
    detector = Explosion(config or ExplosionConfig())
    for step, loss in enumerate(losses):
        observation = Observation(step=step, loss=loss, grad_norm=None if norms is None else norms[step])
        finding = detector.inspect(observation)
        if finding is not None:
            return step, finding
        detector.accept(observation)
    return None


def quiet(scale: float, steps: int = QUIET_STEPS, noise: float = 0.15, seed: int = 0) -> list[float]:
    return list(scale * np.random.default_rng(seed).lognormal(0.0, noise, steps))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 10.0, 1e6])
def test_a_loss_five_times_as_high_that_stays_is_found_in_two_steps(scale: float, seed: int) -> None:
    found = first_finding(quiet(scale, seed=seed) + quiet(5 * scale, 20, seed=seed + 10))
    assert found is not None and QUIET_STEPS <= found[0] <= QUIET_STEPS + 1
    assert found[1].value > found[1].threshold > scale


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_alternating_spikes_are_found_each_time(scale: float) -> None:
    """A normal step in between resets nothing, and no spike is learned as normal."""
    detector = Explosion(ExplosionConfig())
    for loss in quiet(0.5 * scale):
        detector.accept(Observation(step=0, loss=loss))
    for _ in range(50):
        assert detector.inspect(Observation(step=0, loss=50.0 * scale)) is not None
        normal = Observation(step=0, loss=0.5 * scale)
        assert detector.inspect(normal) is None
        detector.accept(normal)


@pytest.mark.parametrize(("level", "noise"), [(-3.0, 0.1), (0.0, 0.05), (-1e-3, 1e-4), (2.0, 0.1)])
def test_losses_at_and_below_zero_have_limits_too(level: float, noise: float) -> None:
    losses = list(level + noise * np.random.default_rng(1).standard_normal(400))
    assert first_finding(losses) is None
    raised = abs(level) * 4 + 60 * noise
    assert first_finding([*losses, level + raised]) is not None


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_falls_through_zero_is_healthy_and_its_explosion_is_found(seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal(400)
    losses = list(4.0 - 0.02 * np.arange(400) + 0.1 * noise)
    assert first_finding(losses) is None
    assert first_finding(losses[:220] + [loss + 10.0 for loss in losses[220:]]) is not None


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("seed", range(3))
def test_growth_of_five_percent_a_step_is_found_before_it_is_learned(what: str, seed: int) -> None:
    grown = [value * 1.05**step for step, value in enumerate(quiet(1.0, 60, noise=0.1, seed=seed + 5))]
    values = quiet(1.0, noise=0.1, seed=seed) + grown
    level = [1.0] * len(values)
    found = first_finding(values, level) if what == "loss" else first_finding(level, values)
    assert found is not None and found[0] < QUIET_STEPS + 45 and found[1].message.startswith(what)


def test_a_norm_ten_times_as_high_is_found_at_once() -> None:
    norms = [*quiet(0.3), 3.0]
    found = first_finding([1.0] * len(norms), norms)
    assert found is not None and found[0] == QUIET_STEPS
    assert found[1].message.startswith("gradient norm 3 exceeds") and 0.3 < found[1].threshold < 3.0


HEALTHY: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "falls to nothing": lambda chance: np.exp(-np.arange(500) / 50) * chance.lognormal(0, 0.3, 500),
    "heavy tails": lambda chance: chance.lognormal(0.0, 0.6, 500),
    "two tasks in turn": lambda chance: np.where(np.arange(500) % 4 == 0, 20.0, 1.0) * chance.lognormal(0, 0.2, 500),
    "mostly exact zeros": lambda chance: np.where(chance.random(500) < 0.8, 0.0, chance.lognormal(-2, 0.5, 500)),
    "exact zeros for long": lambda chance: np.where(np.arange(500) < 300, 0.0, chance.lognormal(-2, 0.5, 500)),
    "constant": lambda chance: np.full(500, 0.7),
    "constant below zero": lambda chance: np.full(500, -0.7),
    "all zero": lambda chance: np.zeros(500),
    "warm restarts": lambda chance: (0.3 + 0.3 * (np.arange(500) % 100 < 20)) * chance.lognormal(0, 0.3, 500),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_what_is_normal_raises_no_alarm_as_loss_or_as_norm(kind: str) -> None:
    for seed in range(5):
        values = list(HEALTHY[kind](np.random.default_rng(seed)))
        assert first_finding(values) is None, seed
        assert first_finding([1.0] * 500, [abs(value) for value in values]) is None, seed


@given(
    scale=st.floats(1e-6, 1e6),
    noise=st.lists(st.floats(-1, 1), min_size=80, max_size=80),
    last=st.floats(-50, 50),
)
@settings(max_examples=100, deadline=None)
def test_the_verdict_does_not_depend_on_the_unit_of_the_loss(scale: float, noise: list[float], last: float) -> None:
    scale = 2.0 ** round(math.log2(scale))  # exact in binary, so that rounding is no excuse
    losses = [2.0 + value for value in noise] + [last]
    plain, scaled = first_finding(losses), first_finding([scale * loss for loss in losses])
    assert (plain is None) == (scaled is None)
    if plain is not None and scaled is not None:
        assert plain[0] == scaled[0] and scaled[1].threshold == pytest.approx(scale * plain[1].threshold)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), floor=st.floats(0, 2))
def test_a_level_is_the_upper_median_and_the_way_to_the_highest(values: list[float], floor: float) -> None:
    median = sorted(values)[len(values) // 2]
    expected = Level(median, max(max(values) - median, floor * abs(median), 0.5))
    assert level_of(values, floor, 0.5) == expected
    assert expected.limit(2.0) == median + 2.0 * expected.spread


def test_evidence_is_of_the_quantity_that_is_named() -> None:
    detector = Explosion(ExplosionConfig(min_steps=20))
    for step in range(60):
        norm = None if step < 30 else 1.0
        detector.accept(Observation(step=step, loss=1.0, grad_norm=norm))
    loss = detector.inspect(Observation(step=60, loss=9.0, grad_norm=1.0))
    norm = detector.inspect(Observation(step=60, loss=1.0, grad_norm=50.0))
    assert loss is not None and norm is not None
    assert (loss.value, loss.threshold, loss.window_steps) == (9.0, 1.0 + 15.0 * 0.25, 60)
    assert norm.value == 50.0 and norm.window_steps == 30
    assert norm.threshold == pytest.approx(math.exp(3.0 * 0.6))
    assert (loss.detector, loss.non_finite, loss.lasted_steps) == ("explosion", False, 1)


def test_a_finding_says_for_how_long_most_values_were_high() -> None:
    """Highest so far 1, so a spread of 0.25 above 1 is higher than all before; the limit is at 1.375."""
    shown = {"": 1, "h": 2, "hh": 3, "lh": 2, "hl": 3, "hlh": 4, "hll": 1, "hhlll": 1, "hhhlll": 7}
    for newest, lasted in shown.items():
        detector = Explosion(ExplosionConfig(min_steps=20, lag_steps=8))
        for loss in [1.0] * 40 + [1.3 if sign == "h" else 1.0 for sign in newest]:
            assert detector.inspect(Observation(step=0, loss=loss)) is None
            detector.accept(Observation(step=0, loss=loss))
        finding = detector.inspect(Observation(step=0, loss=99.0))
        assert finding is not None and finding.lasted_steps == lasted, newest


def test_the_run_length_is_as_configured() -> None:
    detector = Explosion(ExplosionConfig(min_steps=20, run_steps=3, lag_steps=8))
    for loss in [1.0] * 40 + [1.6, 1.6]:
        assert detector.inspect(Observation(step=0, loss=loss)) is None
        detector.accept(Observation(step=0, loss=loss))
    finding = detector.inspect(Observation(step=0, loss=1.6))
    assert finding is not None and finding.threshold == 1.0 + 1.5 * 0.25
    assert detector.inspect(Observation(step=0, loss=1.3)) is None


def test_limits_follow_a_falling_loss() -> None:
    """After the fall, what was normal at the beginning is an explosion."""
    losses = [10.0] * 80 + quiet(0.1, 300)
    assert first_finding(losses) is None
    found = first_finding([*losses, 10.0])
    assert found is not None and found[1].threshold < 2.0


def test_nothing_is_judged_before_enough_was_seen() -> None:
    config = ExplosionConfig()
    wild = [10.0 ** (step % 7) for step in range(config.min_steps - 1)]
    assert first_finding(wild, wild) is None
    assert first_finding([1.0] * (config.min_steps - 1) + [1e9]) is None
    assert first_finding([1.0] * config.min_steps + [1e9]) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lag_steps": 80}, r"`min_steps` must be above `lag_steps` = 80 and at most .* got 64\."),
        ({"min_steps": 1000}, r"at most `window_steps` \+ `lag_steps` = 144, got 1000\."),
        ({"run_steps": 17}, r"`run_steps` must be at most `lag_steps` = 16, got 17\."),
        ({"loss_floor": 0.0}, r"`loss_floor` must be greater than 0, got 0\.0\."),
    ],
)
def test_a_config_that_could_never_find_anything_is_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplosionConfig(**given)
