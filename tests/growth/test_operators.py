"""Operators: the formulas, against a naive oracle; one gate value per sample, in a sequence one per position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth.layouts import LAYOUTS, Layout, pooled
from morphogen.growth.lifecycle import OPERATORS, Operator
from morphogen.growth.operators import Seed
from morphogen.testing import BlueprintCase

CASES = [(operator, layout) for operator in OPERATORS for layout in LAYOUTS]


def naive_gate(seed: Seed, channels: Tensor) -> float:
    """g of what ``channels`` (C) holds, by loops over channels and hidden units."""
    assert seed.gate is not None
    inner, outer = seed.gate.inner, seed.gate.outer
    z = float(outer.bias[0])
    for unit in range(inner.out_features):
        u = float(inner.bias[unit]) + sum(float(w * c) for w, c in zip(inner.weight[unit], channels, strict=True))
        z += float(outer.weight[0, unit]) * u * 0.5 * (1.0 + math.erf(u / math.sqrt(2.0)))
    return 1.0 / (1.0 + math.exp(-z))


def gates(seed: Seed, sample: Tensor, layout: Layout) -> Tensor:
    """g of one sample: a number, or (L, 1) in a sequence."""
    if layout == "NLC":
        return torch.tensor([[naive_gate(seed, position)] for position in sample], dtype=sample.dtype)
    return torch.tensor(naive_gate(seed, sample if layout == "NC" else sample.flatten(1).mean(1)), dtype=sample.dtype)


@pytest.mark.parametrize(("operator", "layout"), CASES)
def test_the_residual_is_what_the_table_says(operator: Operator, layout: Layout) -> None:
    case = BlueprintCase("low_rank", operator, layout)
    seed, feature = case.grown_seed(torch.float64), case.feature(dtype=torch.float64)
    with torch.no_grad():
        s, r = seed.body(feature), seed(feature)
        for sample in range(len(feature)):
            expected = {
                "add": lambda i: s[i],
                "scale": lambda i: feature[i] * torch.tanh(s[i]),
                "gate": lambda i: gates(seed, feature[i], layout) * s[i],
            }[operator](sample)
            torch.testing.assert_close(r[sample], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gate_is_one_half_at_birth_and_differs_between_samples_later(layout: Layout) -> None:
    case = BlueprintCase("low_rank", "gate", layout)
    newborn, grown = case.seed().gate, case.grown_seed().gate
    assert newborn is not None and grown is not None
    feature = case.feature()
    shape = (*feature.shape[:2], 1) if layout == "NLC" else (len(feature), *(1 for _ in feature.shape[1:]))
    assert newborn(feature).shape == shape and bool((newborn(feature) == 0.5).all())
    assert len(set(grown(feature).flatten().tolist())) == math.prod(shape)


@pytest.mark.parametrize("operator", ["add", "scale"])
def test_only_the_gate_operator_has_a_gate(operator: Operator) -> None:
    assert BlueprintCase("norm", operator, "NCHW").seed().gate is None


def test_scale_never_turns_the_feature_round() -> None:
    class Huge(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return torch.full_like(h, -1e6)

    feature = torch.ones(2, 3)
    assert torch.equal(feature + Seed(Huge(), "scale", 3, "NC")(feature), torch.zeros(2, 3))


@pytest.mark.parametrize(("layout", "shape"), [("NC", (2, 3)), ("NCL", (2, 3, 4)), ("NLC", (2, 4, 3)), ("NCHW", (2, 3, 4, 5))])
def test_pooling_keeps_samples_and_channels(layout: Layout, shape: tuple[int, ...]) -> None:
    feature = torch.arange(float(math.prod(shape))).reshape(shape)
    result = pooled(feature, layout)
    assert result.shape == (2, 3)
    channel = feature[1, ..., 2] if layout == "NLC" else feature[1, 2]
    assert float(result[1, 2]) == pytest.approx(float(channel.mean()))
