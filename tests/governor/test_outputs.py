"""Signals of a model's outputs against readings written out by hand."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from morphogen.governor.outputs import output_signals


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, num_classes: int, seed: int = 1) -> Tensor:
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def spread(rows: list[list[float]]) -> float:
    variances = []
    for column in zip(*rows, strict=True):
        mean = math.fsum(column) / len(column)
        variances.append(math.fsum((value - mean) ** 2 for value in column) / len(column))
    return math.sqrt(math.fsum(variances) / len(variances))


def mean_prediction(rows: list[list[float]]) -> list[float]:
    softmaxes = []
    for row in rows:
        highest = max(row)
        powers = [math.exp(value - highest) for value in row]
        total = math.fsum(powers)
        softmaxes.append([power / total for power in powers])
    return [math.fsum(column) / len(column) for column in zip(*softmaxes, strict=True)]


def naive(logits: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """The documented signals of a batch of no more than 256 rows, with Python's floats."""
    rows = logits.double().reshape(-1, logits.shape[-1] if logits.ndim > 1 else 1).tolist()
    if len(rows) < 8:
        return {}
    signals = {"output_spread": spread(rows)}
    if len(rows[0]) >= 2:
        signals["prediction_entropy"] = entropy(mean_prediction(rows))
        if labels is not None and not labels.is_floating_point():
            known = [label for label in labels.flatten().tolist() if 0 <= label < len(rows[0])]
            counts = collections.Counter(known)
            signals["label_entropy"] = entropy([count / len(known) for count in counts.values()])
    return signals


def read(signals: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in signals.items()}


CASES: dict[str, tuple[Tensor, Tensor | None]] = {
    "rows": (normal(32, 5), classes(32, num_classes=5)),
    "eight rows": (normal(8, 3), classes(8, num_classes=3)),
    "seven rows": (normal(7, 3), classes(7, num_classes=3)),
    "one row": (normal(1, 3), classes(1, num_classes=3)),
    "no rows": (normal(0, 3), classes(0, num_classes=3)),
    "all 256 rows": (normal(256, 4), classes(256, num_classes=4)),
    "tokens": (normal(3, 7, 6), classes(3, 7, num_classes=6)),
    "three dimensions of rows": (normal(2, 3, 4, 5), classes(2, 3, 4, num_classes=5)),
    "regression": (normal(16), normal(16)),
    "regression with one output a row": (normal(16, 1), normal(16, 1)),
    "regression with several": (normal(16, 3), normal(16, 3)),
    "no labels": (normal(16, 3), None),
    "large logits": (1e3 * normal(16, 3), None),
    "huge outputs": (1e15 * normal(16), None),
    "one class alone": (torch.tensor([[0.0, 50.0]]).repeat(8, 1), torch.ones(8, dtype=torch.long)),
    "integer targets of a narrow type": (normal(16, 3), classes(16, num_classes=3).to(torch.uint8)),
    "not contiguous": (normal(5, 32).T, classes(64, num_classes=5)[::2]),
}


@pytest.mark.parametrize("case", CASES)
def test_signals_are_those_of_a_naive_reading(case: str) -> None:
    logits, labels = CASES[case]
    found = read(output_signals(logits, labels))
    assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in naive(logits, labels).items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_read_in_float32(dtype: torch.dtype) -> None:
    logits = normal(32, 5).to(dtype)
    assert read(output_signals(logits)) == pytest.approx(naive(logits), rel=1e-4)
    assert output_signals(300 * logits)["output_spread"].isfinite(), "float16 squares would overflow"


@pytest.mark.parametrize("padding", [-100, -1, 5, 10_000])
def test_padding_is_left_out_of_the_labels(padding: int) -> None:
    logits, labels = normal(4, 6, 5), classes(4, 6, num_classes=5)
    labels[:, 3:] = padding
    expected = naive(logits, labels)["label_entropy"]
    assert read(output_signals(logits, labels))["label_entropy"] == pytest.approx(expected, rel=1e-5)
    assert read(output_signals(logits, torch.full_like(labels, padding)))["label_entropy"] == 0.0


@pytest.mark.parametrize(("rows", "num_classes"), [(257, 3), (1000, 3), (20_000, 2), (300, 2000), (24, 1 << 16)])
def test_of_many_rows_evenly_spaced_ones_are_read(rows: int, num_classes: int) -> None:
    """Labels are taken of the same rows as outputs; at most 256, and fewer where rows are long, but eight at least."""
    labels = torch.arange(rows) % num_classes
    logits = torch.zeros(rows, num_classes).scatter_(1, labels[:, None], 40.0)
    found = read(output_signals(logits, labels))
    assert found["prediction_entropy"] == pytest.approx(found["label_entropy"], rel=1e-4)
    step = next(step for step in range(1, rows) if -(-rows // step) <= max(8, min(256, (1 << 18) // num_classes)))
    assert found == pytest.approx(naive(logits[::step], labels[::step]), rel=1e-4)


def test_constant_outputs_have_no_spread_and_a_collapse_has_no_entropy() -> None:
    found = read(output_signals(torch.tensor([[9.0, -30.0, 0.0]]).repeat(20, 1)))
    assert found["output_spread"] == 0.0 and found["prediction_entropy"] < 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_have_signals_that_are_not(value: float) -> None:
    logits = normal(8, 3)
    logits[2, 1] = value
    assert all(math.isnan(signal) for signal in read(output_signals(logits)).values())


def test_nothing_is_read_from_the_device_nothing_is_drawn_and_no_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = normal(16, 5).requires_grad_(), classes(16, num_classes=5)
    kept, chance = logits.detach().clone(), torch.get_rng_state()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a value was read")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    signals = output_signals(logits, labels)
    monkeypatch.undo()
    assert not any(signal.requires_grad for signal in signals.values())
    assert torch.equal(logits, kept) and logits.grad is None and torch.equal(torch.get_rng_state(), chance)


def test_labels_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`labels` must hold one class number for each of the 8 rows.*got shape \(7,\)"):
        output_signals(normal(8, 3), classes(7, num_classes=3))


def test_labels_that_are_no_class_numbers_are_left_alone() -> None:
    """Soft targets have the shape of the outputs."""
    assert "label_entropy" not in output_signals(normal(8, 3), normal(8, 3).softmax(1))


@pytest.mark.parametrize("kind", ["booleans", "a scalar output"])
def test_odd_outputs_are_no_trouble(kind: str) -> None:
    if kind == "booleans":
        signals = read(output_signals(normal(8, 2), classes(8, num_classes=2).bool()))
        assert 0.0 < signals["label_entropy"] <= math.log(2) + 1e-6
    else:
        assert output_signals(torch.tensor(3.0)) == {}
