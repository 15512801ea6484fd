"""Objectives: what is trained, what is reported, and that padding is no part of either."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from morphogen.tasks import Classification, LanguageModelling

PADDING = 7


@pytest.fixture
def padded(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits (4, 6, 9) and tokens whose rows end in 0, 1, 3 and 5 places of padding."""
    logits = torch.randn(4, 6, 9, generator=generator)
    targets = torch.randint(7, (4, 6), generator=generator)
    for row, missing in enumerate((0, 1, 3, 5)):
        targets[row, 6 - missing :] = PADDING
    return logits, targets


def test_accuracy_is_one_for_each_hit() -> None:
    outputs = torch.eye(5)[[3, 1, 4]]
    assert Classification().per_sample(outputs, torch.tensor([3, 0, 4])).tolist() == [1.0, 0.0, 1.0]


def test_the_loss_of_classes_is_their_cross_entropy(generator: torch.Generator) -> None:
    outputs, targets = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 2, 1, 0])
    expected = -outputs.log_softmax(1)[torch.arange(5), targets].mean()
    torch.testing.assert_close(Classification().loss(outputs, targets), expected)


def test_a_text_is_worth_its_log_likelihood_per_token(padded: tuple[Tensor, Tensor]) -> None:
    logits, targets = padded
    rows: list[float] = []
    every: list[float] = []
    for row in range(4):
        kept = [
            float(logits[row, place].log_softmax(0)[token])
            for place, token in enumerate(targets[row].tolist())
            if token != PADDING
        ]
        rows.append(sum(kept) / len(kept))
        every += kept
    objective = LanguageModelling(ignore_index=PADDING)
    assert objective.per_sample(logits, targets).tolist() == pytest.approx(rows, rel=1e-5)
    assert float(objective.loss(logits, targets)) == pytest.approx(-sum(every) / len(every), rel=1e-5)


def test_padding_changes_nothing(padded: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
    logits, targets = padded
    objective = LanguageModelling(ignore_index=PADDING)
    others = torch.where((targets == PADDING)[..., None], torch.randn(4, 6, 9, generator=generator) * 50, logits)
    assert not torch.equal(others, logits)
    assert torch.equal(objective.loss(others, targets), objective.loss(logits, targets))
    assert torch.equal(objective.per_sample(others, targets), objective.per_sample(logits, targets))
    longer = torch.cat([logits, torch.randn(4, 3, 9, generator=generator)], dim=1)
    more = torch.cat([targets, torch.full((4, 3), PADDING)], dim=1)
    torch.testing.assert_close(objective.loss(longer, more), objective.loss(logits, targets))
    torch.testing.assert_close(objective.per_sample(longer, more), objective.per_sample(logits, targets))


def test_padding_gets_no_gradient(padded: tuple[Tensor, Tensor]) -> None:
    logits, targets = padded
    logits.requires_grad_()
    LanguageModelling(ignore_index=PADDING).loss(logits, targets).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().amax(-1) > 0
    assert torch.equal(moved, targets != PADDING)


def test_nothing_but_padding_is_not_a_number() -> None:
    objective = LanguageModelling()
    logits, targets = torch.zeros(1, 2, 3), torch.full((1, 2), -100)
    assert math.isnan(float(objective.loss(logits, targets)))
    assert math.isnan(float(objective.per_sample(logits, targets)))


def test_guessing_has_the_perplexity_of_the_vocabulary() -> None:
    value = LanguageModelling().per_sample(torch.zeros(2, 3, 11), torch.zeros(2, 3, dtype=torch.int64)).mean()
    assert math.exp(-float(value)) == pytest.approx(11.0)


def test_objectives_are_plain_values() -> None:
    assert LanguageModelling(ignore_index=3) == LanguageModelling(ignore_index=3) != LanguageModelling()
    assert (Classification().metric_name, LanguageModelling().metric_name) == ("accuracy", "perplexity")
