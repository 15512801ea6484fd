"""Running statistics against those of all data at once; what freezes, what travels, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from morphogen.errors import StateMismatch
from morphogen.rl.normalizers import ObservationNormalizer, RewardNormalizer, RunningMoments, ValueNormalizer
from morphogen.state.trees import decode, encode


@pytest.fixture
def chance() -> np.random.Generator:
    return np.random.default_rng(0)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, -3.0, 1e6, 1e8]),
    seed=st.integers(0, 2**31),
)
def test_moments_are_those_of_all_rows_at_once(sizes: list[int], offset: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    batches = [chance.normal(size=(size, 3)) * [1.0, 10.0, 0.0] + offset for size in sizes]
    moments, rows = RunningMoments(3), np.concatenate(batches)
    for batch in batches:
        moments.update(batch)
    assert moments.count == len(rows)
    if len(rows):
        np.testing.assert_allclose(moments.mean_D, rows.mean(0), rtol=1e-12)
        exact = ((rows - rows.mean(0)) ** 2).mean(0)
        np.testing.assert_allclose(moments.variance_D(), exact, rtol=1e-5, atol=1e-7)


def test_merging_is_seeing_both(chance: np.random.Generator) -> None:
    left, right = chance.normal(size=(50, 2)), 5.0 + 3.0 * chance.normal(size=(7, 2))
    both, merged, other = RunningMoments(2), RunningMoments(2), RunningMoments(2)
    both.update(np.concatenate([left, right]))
    merged.update(left)
    other.update(right)
    before = other.state_dict()
    merged.merge(other)
    merged.merge(RunningMoments(2))
    assert merged.count == both.count
    np.testing.assert_allclose(merged.mean_D, both.mean_D, rtol=1e-12)
    np.testing.assert_allclose(merged.squares_D, both.squares_D, rtol=1e-12)
    assert_same(before, other.state_dict())
    with pytest.raises(ValueError, match="`other` must have width 2, got 3"):
        merged.merge(RunningMoments(3))


def test_normalised_observations_have_mean_0_and_deviation_1(chance: np.random.Generator) -> None:
    observations = (chance.normal(size=(40, 8, 3)) * [1.0, 100.0, 1e-3] + [0.0, 5.0, 1000.0]).astype(np.float32)
    normalizer = ObservationNormalizer(3)
    for step in observations:
        normalizer.update(step)
    normalized = normalizer.normalize(observations)
    assert normalized.dtype == np.float32 and normalized.shape == observations.shape
    np.testing.assert_allclose(normalized.mean((0, 1)), 0.0, atol=1e-4)
    np.testing.assert_allclose(normalized.std((0, 1)), 1.0, atol=6e-3)  # the third is near the epsilon of 1e-8


def test_some_entries_pass_untouched_and_others_are_clamped() -> None:
    normalizer = ObservationNormalizer(3, np.array([True, False, True]), clip=2.0)
    rows = np.array([[0.0, 0.0, 7.0], [2.0, 1.0, 7.0]], dtype=np.float32)
    assert normalizer.normalize(rows).tolist() == [[0.0, 0.0, 2.0], [2.0, 1.0, 2.0]]  # nothing seen yet: clamped alone
    normalizer.update(rows)
    normalized = normalizer.normalize(np.array([[1000.0, 1000.0, 8.0]], dtype=np.float32))
    assert normalized.tolist() == [[2.0, 1000.0, 1.0]]  # the last never varied, so it is shifted and not scaled


def test_filler_rows_never_enter(chance: np.random.Generator) -> None:
    rows, valid = chance.normal(size=(4, 2)).astype(np.float32), np.array([True, False, True, False])
    poisoned = np.where(valid[:, None], rows, np.float32(np.nan))
    filtered, masked = ObservationNormalizer(2), ObservationNormalizer(2)
    filtered.update(rows[valid])
    masked.update(poisoned, valid)
    assert_same(filtered.state_dict(), masked.state_dict())
    masked.update(poisoned, np.zeros(4, dtype=bool))
    assert_same(filtered.state_dict(), masked.state_dict())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_whole(bad: float) -> None:
    normalizer = ObservationNormalizer(2)
    normalizer.update(np.ones((3, 2), dtype=np.float32))
    before = normalizer.state_dict()
    with pytest.raises(ValueError, match="rows must be finite"), np.errstate(invalid="ignore"):
        normalizer.update(np.array([[0.0, 1.0], [0.0, bad]], dtype=np.float32))
    assert_same(before, normalizer.state_dict())


def naive_reward_scale(rewards: np.ndarray, ended: np.ndarray, gamma: float, valid: np.ndarray) -> tuple[float, list[float]]:
    """Each environment's own running returns, one number at a time."""
    returns: list[float] = []
    under_way = []
    for env in range(rewards.shape[1]):
        total = 0.0
        for step in range(rewards.shape[0]):
            if valid[step, env]:
                total = total * gamma + float(rewards[step, env])
                returns.append(total)
                total = 0.0 if ended[step, env] else total
        under_way.append(total)
    return float(np.std(returns)), under_way


@pytest.mark.parametrize("all_valid", [True, False])
def test_rewards_are_divided_by_the_deviation_of_returns(chance: np.random.Generator, all_valid: bool) -> None:
    rewards = (5.0 + chance.normal(size=(60, 4))).astype(np.float32)
    ended, valid = chance.random((60, 4)) < 0.1, chance.random((60, 4)) < (2.0 if all_valid else 0.7)
    normalizer = RewardNormalizer(4, clip=1e9)
    for reward, end, mask in zip(np.where(valid, rewards, np.float32(1e6)), ended, valid, strict=True):
        last = normalizer.update_and_normalize(reward, end, 0.9, mask)
    deviation, under_way = naive_reward_scale(rewards, ended, 0.9, valid)
    expected = np.where(valid[-1], rewards[-1], 1e6) / np.sqrt(deviation**2 + 1e-8)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    np.testing.assert_allclose(normalizer.state_dict()["returns"], under_way, rtol=1e-12)


def test_reward_signs_survive_and_sizes_are_bounded() -> None:
    normalizer = RewardNormalizer(2)
    constant = np.ones(2, dtype=np.float32)
    assert normalizer.update_and_normalize(constant, np.ones(2, dtype=bool), 0.0).tolist() == [1.0, 1.0]  # no return differs
    normalizer.update(np.array([1.5, -1.5], dtype=np.float32), np.ones(2, dtype=bool), 0.99)
    assert normalizer.normalize(np.array([1e9, -1e9], dtype=np.float32)).tolist() == [10.0, -10.0]
    assert np.sign(normalizer.normalize(np.array([1e-3, -1e-3]))).tolist() == [1.0, -1.0]


def test_gamma_is_that_of_each_call() -> None:
    normalizer = RewardNormalizer(1)
    for gamma in (0.5, 0.0, 1.0):
        normalizer.update(np.array([1.0]), np.array([False]), gamma)
    assert normalizer.state_dict()["returns"].tolist() == [2.0]  # 1, then 0 * 1 + 1, then 1 * 1 + 1


def test_returns_of_episodes_resume_but_do_not_travel() -> None:
    source = RewardNormalizer(2)
    source.update(np.array([1.0, 3.0]), np.array([False, True]), 0.9)
    resumed, other, larger = RewardNormalizer(2), RewardNormalizer(2), RewardNormalizer(3)
    resumed.load_state_dict(source.state_dict())
    assert_same(resumed.state_dict(), source.state_dict())
    other.update(np.array([5.0, 7.0]), np.array([False, False]), 0.9)
    other.load_state_dict(source.portable_state_dict())
    assert other.state_dict()["returns"].tolist() == [5.0, 7.0]
    with pytest.raises(StateMismatch, match="`returns` must be 3 finite numbers, one per environment"):
        larger.load_state_dict(source.state_dict())
    larger.load_state_dict(source.portable_state_dict())
    assert larger.normalize(np.array([1.0])) == source.normalize(np.array([1.0]))


def test_values_go_there_and_back(generator: torch.Generator) -> None:
    returns = 300.0 + 50.0 * torch.randn(64, 8, generator=generator)
    normalizer = ValueNormalizer()
    assert torch.equal(normalizer.normalize(returns), returns)
    for row in returns.split(10):
        normalizer.update(row)
    normalized = normalizer.normalize(returns)
    assert float(normalized.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(normalized.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(normalizer.denormalize(normalized), returns, rtol=1e-6, atol=1e-4)
    assert normalizer.normalize(returns.bfloat16()).dtype == torch.float32


def test_invalid_returns_have_no_weight(generator: torch.Generator) -> None:
    returns, valid = torch.randn(16, 3, generator=generator), torch.arange(16) % 3 > 0
    poisoned = torch.where(valid[:, None], returns, torch.nan)
    filtered, masked = ValueNormalizer(), ValueNormalizer()
    filtered.update(returns[valid])
    masked.update(poisoned, valid[:, None])
    masked.update(poisoned, torch.zeros(16, 1, dtype=torch.bool))
    for name, value in filtered.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], value, rtol=1e-12, atol=0.0)


def test_decay_forgets() -> None:
    forgetful, faithful = ValueNormalizer(decay=0.5), ValueNormalizer()
    for value in (0.0, 4.0, 0.0, 8.0):
        for normalizer in (forgetful, faithful):
            normalizer.update(torch.full((10,), value))
    values, weights = torch.tensor([0.0, 4.0, 0.0, 8.0]), torch.tensor([1.25, 2.5, 5.0, 10.0])
    mean = (weights * values).sum() / weights.sum()
    assert float(forgetful.state_dict()["mean"]) == pytest.approx(float(mean))
    assert float(forgetful.state_dict()["squares"]) == pytest.approx(float((weights * (values - mean).square()).sum()))
    assert float(faithful.state_dict()["mean"]) == 3.0


def seen(normalizer: Any) -> Any:
    chance = np.random.default_rng(1)
    for _ in range(3):
        rows = chance.normal(size=(4, 2)).astype(np.float32)
        if isinstance(normalizer, RewardNormalizer):
            normalizer.update(rows[:, 0], chance.random(4) < 0.5, 0.9)
        elif isinstance(normalizer, ValueNormalizer):
            normalizer.update(torch.from_numpy(rows))
        else:
            normalizer.update(rows)
    return normalizer


def answer(normalizer: Any) -> list[float]:
    rows = np.array([[0.3, -2.0]], dtype=np.float32)
    return normalizer.normalize(torch.from_numpy(rows) if isinstance(normalizer, ValueNormalizer) else rows).tolist()


MAKERS: list[Callable[[], Any]] = [lambda: ObservationNormalizer(2), lambda: RewardNormalizer(4), ValueNormalizer]
KINDS = pytest.mark.parametrize("make", MAKERS, ids=["observations", "rewards", "values"])


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(right[name]))


@KINDS
def test_state_goes_through_a_file_bit_for_bit_and_is_never_shared(make: Callable[[], Any]) -> None:
    source, target = seen(make()), make()
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(source.state_dict(), tensors, "normalizer"), allow_nan=False)
    state = decode(json.loads(text), tensors)
    target.load_state_dict(state)
    assert answer(target) == answer(source) != answer(make())
    kept, own = target.state_dict(), target.state_dict()
    seen(source)
    for value in (*state.values(), *own.values()):
        if not isinstance(value, int):
            value += 1.0
    assert_same(kept, target.state_dict())
    seen(target)
    assert_same(source.state_dict(), target.state_dict())


@KINDS
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mean": np.zeros(5)}, r"`mean` is \(5,\)"),
        ({"squares": np.full(2, np.nan)}, "`squares` is"),
        ({"count": -1}, "`count` is -1"),
        ({"count": float("nan")}, "`count` is nan"),
        ({"weight": 1.0}, "`weight` is unknown"),
        ({"mean": None}, "`mean` is missing"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(make: Callable[[], Any], change: dict[str, Any], problem: str) -> None:
    normalizer = seen(make())
    before = normalizer.state_dict()
    broken = {name: value for name, value in (before | change).items() if value is not None}
    with pytest.raises(StateMismatch, match=problem):
        normalizer.load_state_dict(broken)
    assert_same(before, normalizer.state_dict())


@KINDS
def test_negative_squares_are_refused(make: Callable[[], Any]) -> None:
    normalizer = seen(make())
    state = normalizer.state_dict()
    with pytest.raises(StateMismatch, match="negative sums of squares"):
        normalizer.load_state_dict(state | {"squares": -state["squares"]})


def test_normalising_changes_no_statistics() -> None:
    for make in MAKERS:
        normalizer = seen(make())
        before = normalizer.state_dict()
        answer(normalizer)
        assert_same(before, normalizer.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObservationNormalizer(0), "`width` must be at least 1"),
        (lambda: ObservationNormalizer(2, np.array([True])), r"`normalizable_D` must have shape \(2,\)"),
        (lambda: ObservationNormalizer(2, clip=0.0), "`clip` must be a finite number > 0"),
        (lambda: RewardNormalizer(0), "`num_envs` must be at least 1"),
        (lambda: RewardNormalizer(2, epsilon=float("nan")), "`epsilon` must be a finite number > 0"),
        (lambda: ValueNormalizer(decay=0.0), r"`decay` must be in \(0, 1\]"),
    ],
)
def test_misuse_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
