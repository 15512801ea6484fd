"""Shapley values: equal to the average over all orders, axioms, honest errors; chance from the caller alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from morphogen.growth import GrowableModel, Stage, measure_contributions, measure_shapley
from morphogen.growth.shapley import Weights, exact_weights, latin_square, square_weights
from morphogen.state import draw_from
from morphogen.testing import LENIENT, lead_to

Game = Callable[[frozenset[str]], float]


def metric(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs - targets).square().mean(1)


def grown(num_slots: int) -> GrowableModel:
    """A chain of layers with a random seed behind each, which interact strongly; one alpha is partial."""
    generator = torch.Generator().manual_seed(3)
    with draw_from(generator):
        host = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(num_slots)))
    example = torch.randn(2, 6, generator=generator)
    model = GrowableModel(host, {f"s{index}": str(index) for index in range(num_slots)}, example, config=LENIENT)
    for name in model.stages():
        model.germinate(name, "mlp")
        lead_to(model, name, Stage.HOLDING, example)
        for _, parameter in model.owners()[name]:
            nn.init.normal_(parameter, std=0.6, generator=generator)
    model.double().set_alpha_target("s0", 0.6, over=0)
    return model


def data(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, sum(sizes), 6, generator=generator, dtype=torch.float64)
    return list(zip(*(part.split(list(sizes)) for part in made), strict=True))


def table(model: GrowableModel, batches: list[tuple[Tensor, Tensor]], names: Sequence[str]) -> dict[frozenset[str], Tensor]:
    """The metric per sample under every coalition, one pass each."""
    found: dict[frozenset[str], Tensor] = {}
    model.eval()
    for on in subsets(names):
        off = dict.fromkeys(set(names) - on, 0.0)
        with torch.no_grad():
            found[on] = torch.cat([metric(model(x, alphas=off), y).double() for x, y in batches])
    model.train()
    return found


def subsets(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(some) for size in range(len(names) + 1) for some in itertools.combinations(names, size)]


def by_orders(v: Mapping[frozenset[str], Any], names: Sequence[str], target: tuple[str, ...]) -> Any:
    """The average over every order in which the slots, or the pair as one, join: the definition, unlike the code's."""
    total: Any = 0.0
    units = [*(((name,)) for name in names if name not in target), target]
    orders = list(itertools.permutations(units))
    for order in orders:
        before = frozenset(name for unit in order[: order.index(target)] for name in unit)
        if len(target) == 1:
            total = total + v[before | set(target)] - v[before]
        else:
            a, b = target
            total = total + v[before | {a, b}] - v[before | {a}] - v[before | {b}] + v[before]
    return total / len(orders)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4])
def test_exact_values_are_the_average_over_all_orders(num_slots: int) -> None:
    model, batches = grown(num_slots), data(7, 4)
    names = list(model.stages())
    v = table(model, batches, names)
    result = measure_shapley(model, batches, metric)
    assert result.num_permutations is None
    assert result.metric == pytest.approx(float(v[frozenset(names)].mean()), abs=1e-6)
    assert result.baseline == pytest.approx(float(v[frozenset()].mean()), abs=1e-6)
    assert list(result.slots) == names
    assert list(result.interactions) == list(itertools.combinations(names, 2))
    found = {**{(name,): value for name, value in result.slots.items()}, **result.interactions}
    for target, effect in found.items():
        samples = by_orders(v, names, target)
        assert effect.value == pytest.approx(float(samples.mean()), abs=1e-6) and abs(effect.value) > 1e-3
        assert effect.error == pytest.approx(float(samples.std()) / math.sqrt(11), abs=1e-6)


@pytest.mark.parametrize("num_slots", [2, 4, 5, 6])
def test_values_sum_to_what_all_slots_add(num_slots: int) -> None:
    generator = torch.Generator().manual_seed(0)
    result = measure_shapley(grown(num_slots), data(6), metric, generator=generator, num_permutations=1)
    total = sum(found.value for found in result.slots.values())
    assert total == pytest.approx(result.metric - result.baseline, abs=1e-12)
    assert abs(total) > 1e-3


def test_one_slot_is_its_contribution_and_two_split_their_interaction() -> None:
    model, batches = grown(3), data(9)
    alone = measure_shapley(model, batches, metric, ["s1"])
    contribution = measure_contributions(model, batches, metric, ["s1"]).slots["s1"]
    assert alone.slots["s1"].value == pytest.approx(contribution.value, abs=1e-9)
    assert alone.slots["s1"].error == pytest.approx(contribution.error, abs=1e-9)
    both = measure_shapley(model, batches, metric, ["s2", "s0"])
    v = {on: float(values.mean()) for on, values in table(model, batches, ["s0", "s2"]).items()}
    together = v[frozenset({"s0", "s2"})] - v[frozenset({"s0"})] - v[frozenset({"s2"})] + v[frozenset()]
    assert list(both.interactions) == [("s2", "s0")]
    assert both.interactions["s2", "s0"].value == pytest.approx(together, abs=1e-6)
    assert both.slots["s0"].value == pytest.approx(v[frozenset({"s0"})] - v[frozenset()] + together / 2, abs=1e-6)


def test_sampled_values_lie_about_the_exact_ones_as_their_errors_say() -> None:
    """Five slots, 32 coalitions: the truth over these samples is known, so the part that permutations add can be judged."""
    model, batches = grown(5), data(40)
    names = list(model.stages())
    v = table(model, batches, names)
    targets = [*((name,) for name in names), *itertools.combinations(names, 2)]
    truth = {target: by_orders(v, names, target) for target in targets}
    scores: list[float] = []
    for seed in range(12):
        result = measure_shapley(
            model, batches, metric, generator=torch.Generator().manual_seed(seed), num_permutations=60 if seed else 400
        )
        assert result.num_permutations == (60 if seed else 400)
        found = {**{(name,): value for name, value in result.slots.items()}, **result.interactions}
        assert list(found) == targets
        for target, effect in found.items():
            over_samples = float(truth[target].std()) / math.sqrt(40)
            assert effect.error > 0.8 * over_samples
            over_blocks = math.sqrt(max(effect.error**2 - over_samples**2, 1e-12))
            scores.append((effect.value - float(truth[target].mean())) / over_blocks)
            assert effect.value == pytest.approx(float(truth[target].mean()), abs=6 * effect.error)
    assert 0.1 < float(np.median(np.abs(scores))) < 1.5, (
        "the part of the error that permutations make must be of the right size"
    )


def test_more_permutations_come_closer() -> None:
    model, batches = grown(5), data(10)
    names = list(model.stages())
    truth = {name: float(by_orders(table(model, batches, names), names, (name,)).mean()) for name in names}

    def miss(num_permutations: int) -> float:
        gaps: list[float] = []
        for seed in range(6):
            chance = np.random.default_rng(seed)
            result = measure_shapley(model, batches, metric, generator=chance, num_permutations=num_permutations)
            gaps += [result.slots[name].value - truth[name] for name in names]
        return float(np.sqrt(np.mean(np.square(gaps))))

    assert miss(1000) < 0.5 * miss(20)


# -- the design -----------------------------------------------------------------------------------------------------


def targets_of(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return (*((name,) for name in names), *itertools.combinations(names, 2))


def scored(weights: Weights, game: Mapping[frozenset[str], float]) -> float:
    return sum(weight * game[on] for on, weight in weights.items())


@pytest.mark.parametrize("count", [5, 6])
def test_a_block_estimates_without_bias(count: int) -> None:
    """Over every naming of the slots the weights average to the exact ones."""
    names = "abcdef"[:count]
    targets = targets_of(names)
    total: list[Weights] = [{} for _ in targets]
    for order in itertools.permutations(names):
        for into, weights in zip(total, square_weights(latin_square(order), targets), strict=True):
            for on, weight in weights.items():
                into[on] = into.get(on, 0.0) + weight / math.factorial(count)
    for ours, exact in zip(total, exact_weights(names, targets), strict=True):
        assert {on: weight for on, weight in ours.items() if abs(weight) > 1e-12} == pytest.approx(exact)


@pytest.mark.parametrize("count", [5, 6, 7, 8])
def test_a_block_is_balanced(count: int) -> None:
    names = "abcdefgh"[:count]
    block = latin_square(names)
    times = len(block) // count
    assert times == 1 + count % 2
    assert sorted(list(row) for row in block) == sorted(list(row[::-1]) for row in block), (
        "every permutation comes with its reverse"
    )
    for place in range(count):
        assert sorted(row[place] for row in block) == sorted(names * times)
    pairs = [frozenset(row[place : place + 2]) for row in block for place in range(count - 1)]
    assert {pairs.count(frozenset(pair)) for pair in itertools.combinations(names, 2)} == {2 * times}


@st.composite
def games(draw: st.DrawFn) -> tuple[str, dict[frozenset[str], float]]:
    names = "abcdefg"[: draw(st.integers(1, 7))]
    value = st.floats(-100, 100)
    return names, {on: draw(value) for on in subsets(names)}


@given(games(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_axioms(found: tuple[str, dict[frozenset[str], float]], chance: Any) -> None:
    """Efficiency for any game; a slot that adds a constant gets it, and interacts with none; equal slots share equally."""
    names, game = found
    targets = targets_of(names)
    order = list(names)
    chance.shuffle(order)
    designs = [exact_weights(names, targets)] if len(names) < 5 else [square_weights(latin_square(order), targets)]
    designs += [exact_weights(names, targets)]
    last = names[-1]
    constant = {on: game[on - {last}] + (3.0 if last in on else 0.0) for on in game}
    for weights in designs:
        by_target = dict(zip(targets, weights, strict=True))
        total = sum(scored(by_target[(name,)], game) for name in names)
        assert total == pytest.approx(game[frozenset(names)] - game[frozenset()], abs=1e-9)
        assert scored(by_target[(last,)], constant) == pytest.approx(3.0, abs=1e-9)
        assert all(scored(by_target[pair], constant) == pytest.approx(0.0, abs=1e-9) for pair in targets if last in pair[1:])
    by_size = {on: float(len(on) ** 2) for on in game}
    shares = [scored(weights, by_size) for weights in designs[-1]]
    assert shares[: len(names)] == pytest.approx([float(len(names))] * len(names))
    assert shares[len(names) :] == pytest.approx([2.0] * (len(shares) - len(names)))


# -- chance, memory, traces, bad input --------------------------------------------------------------------------------


def test_chance_comes_from_the_caller_alone(kit: Any) -> None:
    model, batches = grown(5), data(4)
    before = kit.chance()
    makers: list[Callable[[int], Any]] = [lambda seed: torch.Generator().manual_seed(seed), np.random.default_rng]
    for make in makers:
        results = [measure_shapley(model, batches, metric, generator=make(seed), num_permutations=20) for seed in (1, 1, 2)]
        assert results[0] == results[1] != results[2]
    unused = torch.Generator().manual_seed(0)
    measure_shapley(model, batches, metric, ["s1", "s2"], generator=unused)
    assert torch.equal(unused.get_state(), torch.Generator().manual_seed(0).get_state())
    assert kit.same(kit.chance(), before)


@pytest.mark.parametrize("num_slots", [3, 5])
def test_a_memory_budget_changes_no_value(num_slots: int) -> None:
    model, batches = grown(num_slots), data(5, 3)
    results = [
        measure_shapley(model, batches, metric, generator=np.random.default_rng(0), memory_budget_bytes=budget)
        for budget in (None, 4000, 40_000)
    ]
    for other in results[1:]:
        for name, found in results[0].slots.items():
            assert (other.slots[name].value, other.slots[name].error) == pytest.approx((found.value, found.error), abs=1e-6)


def test_measuring_leaves_no_trace_and_no_slot_has_no_value() -> None:
    model, batches = grown(2), data(4)
    before, topology = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.topology()
    result = measure_shapley(model, batches, metric, [])
    assert (result.slots, result.interactions) == ({}, {}) and result.metric == result.baseline
    measure_shapley(model, batches, metric)
    assert model.topology() == topology and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_sample_has_no_error_estimate() -> None:
    result = measure_shapley(grown(2), data(1), metric)
    assert [found.error for found in (*result.slots.values(), *result.interactions.values())] == [math.inf] * 3


def test_what_cannot_be_measured_is_refused() -> None:
    model, batches = grown(5), data(4)
    with pytest.raises(ValueError, match="`generator` must be given for more than 4 slots, got None"):
        measure_shapley(model, batches, metric)
    with pytest.raises(ValueError, match="`num_permutations` must be >= 1, got 0"):
        measure_shapley(model, batches, metric, generator=np.random.default_rng(0), num_permutations=0)
    with pytest.raises(ValueError, match="`slots` must name each slot once"):
        measure_shapley(model, batches, metric, ["s1", "s1"])
