"""Ramps: golden numbers, and what holds for every ramp."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from morphogen.growth.ramps import CURVES, Curve, Ramp, eased

GOLDEN: list[tuple[Curve, float, list[float]]] = [
    ("linear", 12.0, [0.2, 0.4, 0.6, 0.8, 1.0]),
    ("cosine", 12.0, [0.095492, 0.345492, 0.654508, 0.904508, 1.0]),
    ("sigmoid", 6.0, [0.104320, 0.339080, 0.660920, 0.895680, 1.0]),
    ("sigmoid", 12.0, [0.024244, 0.230141, 0.769859, 0.975756, 1.0]),
    ("sigmoid", 24.0, [0.000740, 0.083168, 0.916832, 0.999260, 1.0]),
    ("sigmoid", 12.0, [0.117310, 0.882690, 1.0]),
    ("sigmoid", 12.0, [0.008557, 0.045177, 0.180847, 0.5, 0.819153, 0.954823, 0.991443, 1.0]),
]


def trace(ramp: Ramp | None) -> list[float]:
    """Alpha after each tick until the ramp is at rest."""
    alphas: list[float] = []
    while ramp is not None:
        alpha, ramp = ramp.ticked()
        alphas.append(alpha)
    return alphas


@pytest.mark.parametrize(("curve", "steepness", "alphas"), GOLDEN)
def test_golden_numbers(curve: Curve, steepness: float, alphas: list[float]) -> None:
    ramp = Ramp(start=0.0, target=1.0, num_ticks=len(alphas), curve=curve, steepness=steepness)
    assert trace(ramp) == pytest.approx(alphas, abs=5e-7)
    assert trace(ramp)[-1] == 1.0


@pytest.mark.parametrize(("curve", "steepness", "alphas"), GOLDEN)
def test_a_ramp_down_mirrors_the_ramp_up(curve: Curve, steepness: float, alphas: list[float]) -> None:
    down = trace(Ramp(start=1.0, target=0.0, num_ticks=len(alphas), curve=curve, steepness=steepness))
    assert down == pytest.approx([1.0 - alpha for alpha in alphas], abs=5e-7)
    assert down[-1] == 0.0


def test_a_ramp_starts_where_it_is_told() -> None:
    assert trace(Ramp(start=0.25, target=0.75, num_ticks=2, curve="linear")) == [0.5, 0.75]
    assert trace(Ramp(start=0.25, target=0.75, num_ticks=4, tick=2, curve="linear")) == [0.625, 0.75]


shares = st.floats(0.0, 1.0)
ramps = st.builds(
    Ramp,
    start=shares,
    target=shares,
    num_ticks=st.integers(1, 40),
    curve=st.sampled_from(CURVES),
    steepness=st.one_of(st.floats(0.1, 60.0), st.floats(0.1, 1e300)),
)


@given(ramps)
def test_every_ramp_is_monotone_stays_between_its_ends_and_ends_exactly(ramp: Ramp) -> None:
    alphas = trace(ramp)
    assert len(alphas) == ramp.num_ticks
    assert alphas[-1] == ramp.target
    path = [ramp.start, *alphas]
    upward = ramp.target >= ramp.start
    assert path == sorted(path, reverse=not upward)
    assert min(path) >= min(ramp.start, ramp.target) and max(path) <= max(ramp.start, ramp.target)
    assert not any(math.copysign(1.0, alpha) < 0 for alpha in alphas)


@given(st.sampled_from(CURVES), st.floats(0.1, 1e6), shares)
def test_easing_keeps_its_ends_and_is_symmetric(curve: Curve, steepness: float, t: float) -> None:
    assert eased(0.0, curve, steepness) == pytest.approx(0.0, abs=1e-12)
    assert eased(1.0, curve, steepness) == pytest.approx(1.0, abs=1e-12)
    assert eased(t, curve, steepness) + eased(1.0 - t, curve, steepness) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("start", value) for value in (-0.1, 1.1, math.nan)],
        *[("target", value) for value in (-0.1, 1.1, math.nan, math.inf)],
        *[("num_ticks", value) for value in (0, -1)],
        *[("tick", value) for value in (-1, 5)],
        ("curve", "cubic"),
        *[("steepness", value) for value in (0.0, 0.09, -1.0, math.inf, math.nan)],
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    fields: dict[str, object] = {"start": 0.0, "target": 1.0, "num_ticks": 5}
    with pytest.raises(ValueError, match=f"`{field}`.*got"):
        Ramp(**{**fields, field: value})
