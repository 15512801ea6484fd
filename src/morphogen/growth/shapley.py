"""Shapley values of slots: what each contributes on average over the orders in which slots may be switched on.

Legend: K slots measured, N samples; R coalitions, sets of slots that are on (the other ones of the K are off); T targets, the K
slots and then their pairs; B blocks of permutations. v_RN is the metric of each sample under each coalition. Every estimate is
linear in v: weights_BTR @ v_RN, one estimate for each block and sample.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from morphogen.growth.ablation import Batch, Contribution, PerSampleMetric, ablated_values, measured_slots
from morphogen.growth.model import GrowableModel

EXACT_UP_TO = 4
"""Slots up to which all 2^K coalitions are measured."""

Coalition = frozenset[str]
Weights = dict[Coalition, float]
"""Coalition -> its weight in an estimate."""
Targets = tuple[tuple[str, ...], ...]
"""Slots as 1-tuples, then pairs as 2-tuples."""


@dataclasses.dataclass(frozen=True)
class ShapleyResult:
    """How the metric is shared among slots.

    Attributes:
        metric: v(all): mean metric with every slot as it is.
        baseline: v(none): mean metric with the measured slots switched off.
        slots: Shapley value of each; they sum to ``metric - baseline``.
        interactions: Shapley interaction index of each pair, in the order of the slots: positive where two slots are worth more
            together than the sum of both, negative where one does the work of the other.
        num_permutations: How many permutations were drawn; None where the values are exact.
    """

    metric: float
    baseline: float
    slots: dict[str, Contribution]
    interactions: dict[tuple[str, str], Contribution]
    num_permutations: int | None


def measure_shapley(
    model: GrowableModel,
    batches: Iterable[Batch],
    metric: PerSampleMetric,
    slots: Sequence[str] | None = None,
    *,
    generator: torch.Generator | np.random.Generator | None = None,
    num_permutations: int = 64,
    memory_budget_bytes: int | None = None,
) -> ShapleyResult:
    """Return the Shapley value of each slot and the interaction of each pair, on the same samples.

    With v(S) the metric with the slots of S at their alpha and the other ones of the K measured at 0::

        slots[i] = sum over S without i of
            |S|! (K - |S| - 1)! / K! * (v(S + i) - v(S))
        interactions[i, j] = sum over S without i and j of
            |S|! (K - |S| - 2)! / (K - 1)! * (v(S + ij) - v(S + i) - v(S + j) + v(S))

    Up to 4 slots both are exact for these samples, from all 2^K coalitions, and the error is that of the paired mean over
    samples. Above, permutations are drawn in blocks: a Latin square in which every slot stands in every place once, every pair
    is adjacent equally often, and every permutation comes with its reverse (antithetic). The squared error is then the variance
    over samples (of the mean over blocks) / N plus the variance over blocks (of the mean over samples) / B, which counts their
    interplay twice and so errs on the safe side; with few blocks it is itself rough. Slot values sum to ``metric - baseline``
    either way, as they do in each permutation.

    Args:
        model: Its acting slots (blending, holding, fossilised) are measured; left as it was, as by ``measure_contributions``.
        batches: (inputs, targets), as for ``measure_contributions``.
        metric: (outputs, targets) -> one value per sample, shape (N,); larger is better.
        slots: Which slots; by default every acting one. Others stay as they are.
        generator: Source of the permutations; needed above 4 slots, not drawn from up to 4.
        num_permutations: At least so many are drawn above 4 slots, in whole blocks (of K, or 2K where K is odd), two or more.
        memory_budget_bytes: What one pass may allocate, as for ``measure_contributions``.

    Raises:
        SlotError: One of ``slots`` is unknown or not acting.
        ValueError: ``generator`` is missing, ``num_permutations`` is below 1, or what ``measure_contributions`` refuses.

    References:
        Shapley, A value for n-person games (1953). Grabisch and Roubens, An axiomatic approach to the concept of interaction
        among players in cooperative games (1999), section 4. Castro, Gomez and Tejada, Polynomial calculation of the Shapley
        value based on sampling (2009). Mitchell et al., Sampling permutations for Shapley value estimation (2022), section 3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = GrowableModel(host, points={"early": "1"}, example_input=torch.zeros(2, 4))
        >>> batches = [(torch.ones(6, 4), torch.zeros(6, dtype=torch.long))]
        >>> result = measure_shapley(model, batches, lambda outputs, targets: outputs[:, 0])
        >>> result.slots, result.metric == result.baseline
        ({}, True)
    """
    if num_permutations < 1:
        raise ValueError(f"`num_permutations` must be >= 1, got {num_permutations}. More give smaller errors.")
    players = measured_slots(model, slots)
    exact = len(players) <= EXACT_UP_TO
    targets = (*((name,) for name in players), *itertools.combinations(players, 2))
    if exact:
        blocks = [exact_weights(players, targets)]
    else:
        squares = _latin_squares(players, generator, num_permutations)
        blocks = [square_weights(square, targets) for square in squares]
        num_permutations = sum(map(len, squares))
    everything, nothing = frozenset(players), Coalition()
    coalitions = list(dict.fromkeys([everything, nothing, *(s for block in blocks for one in block for s in one)]))
    v_RN = ablated_values(model, batches, metric, [everything - on for on in coalitions], memory_budget_bytes)
    estimates = dict(zip(targets, _estimates(_matrix(blocks, coalitions, v_RN), v_RN), strict=True))
    return ShapleyResult(
        metric=float(v_RN[0].mean()),
        baseline=float(v_RN[coalitions.index(nothing)].mean()),
        slots={name: estimates[(name,)] for name in players},
        interactions={pair: estimates[pair] for pair in itertools.combinations(players, 2)},
        num_permutations=None if exact else num_permutations,
    )


def exact_weights(players: Sequence[str], targets: Targets) -> list[Weights]:
    """Return the weight of every coalition in each target, by the formulas above."""
    found: list[Weights] = []
    for target in targets:
        others = [name for name in players if name not in target]
        weights: Weights = {}
        for size in range(len(others) + 1):
            share = 1.0 / (len(others) + 1) / math.comb(len(others), size)
            for chosen in itertools.combinations(others, size):
                _add_difference(weights, frozenset(chosen), target, share)
        found.append(weights)
    return found


def square_weights(square: Sequence[Sequence[str]], targets: Targets) -> list[Weights]:
    """Return the weights that estimate each target from the permutations of one block.

    A slot's change is taken where it joins those before it, a pair's where both are neighbours: given that they are, those
    before them are a random coalition as the index wants it.
    """
    index = {frozenset(target): number for number, target in enumerate(targets)}
    found: list[Weights] = [{} for _ in targets]
    per_pair = len(square) * 2 / len(square[0])
    for order in square:
        for place in range(len(order)):
            before = frozenset(order[:place])
            _add_difference(
                found[index[frozenset(order[place : place + 1])]], before, order[place : place + 1], 1 / len(square)
            )
            if place + 1 < len(order):
                pair = order[place : place + 2]
                _add_difference(found[index[frozenset(pair)]], before, pair, 1 / per_pair)
    return found


def _add_difference(weights: Weights, before: Coalition, joining: Sequence[str], share: float) -> None:
    """Add ``share`` times the change that ``joining`` makes to ``before``: v(S + i) - v(S), or the mixed one of a pair."""
    for count in range(len(joining) + 1):
        for some in itertools.combinations(joining, count):
            coalition = before.union(some)
            weights[coalition] = weights.get(coalition, 0.0) + share * (-1) ** (len(joining) - count)


def _latin_squares(
    players: Sequence[str], generator: torch.Generator | np.random.Generator | None, num_permutations: int
) -> list[list[list[str]]]:
    """Return two or more blocks under random namings of the slots."""
    if generator is None:
        raise ValueError(f"`generator` must be given for more than {EXACT_UP_TO} slots, got None. Pass one with a seed.")
    per_block = len(players) * (1 + len(players) % 2)
    num_blocks = max(2, math.ceil(num_permutations / per_block))
    return [latin_square([players[number] for number in _permutation(len(players), generator)]) for _ in range(num_blocks)]


def latin_square(names: Sequence[str]) -> list[list[str]]:
    """Return one block of permutations: the zigzag square of Williams (1949), and for an odd number its reverse."""
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    rows = [[names[(step + shift) % count] for step in zigzag] for shift in range(count)]
    return [*rows, *(row[::-1] for row in rows)] if count % 2 else rows  # an even square holds its reverses


def _permutation(count: int, generator: torch.Generator | np.random.Generator) -> list[int]:
    if isinstance(generator, torch.Generator):
        return torch.randperm(count, generator=generator, device=generator.device).tolist()
    return generator.permutation(count).tolist()


def _matrix(blocks: Sequence[Sequence[Weights]], coalitions: Sequence[Coalition], like: Tensor) -> Tensor:
    """Return weights_BTR."""
    rows = [[[one.get(coalition, 0.0) for coalition in coalitions] for one in block] for block in blocks]
    shape = (len(blocks), len(blocks[0]), len(coalitions))
    return torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(shape)


def _estimates(weights_BTR: Tensor, v_RN: Tensor) -> list[Contribution]:
    """Return mean and standard error of each target."""
    num_blocks, num_samples = weights_BTR.shape[0], v_RN.shape[1]
    over_samples_TN = weights_BTR.mean(0) @ v_RN
    values_T = over_samples_TN.mean(1)
    if num_samples < 2 or not len(values_T):
        return [Contribution(value, math.inf) for value in values_T.tolist()]
    variances_T = over_samples_TN.var(1) / num_samples
    if num_blocks > 1:
        variances_T = variances_T + (weights_BTR @ v_RN.mean(1)).var(0) / num_blocks
    pairs = zip(values_T.tolist(), variances_T.sqrt().tolist(), strict=True)
    return [Contribution(value, error) for value, error in pairs]
