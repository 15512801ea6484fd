"""FLOPs are counted once for each structure and added up for every call."""

from __future__ import annotations

import torch

from morphogen.tasks.flops import FlopMeter


def test_a_matrix_product_costs_two_per_multiply_add() -> None:
    meter = FlopMeter()
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    for _ in range(3):
        assert meter.run("product", lambda: a @ b).shape == (3, 5)
    assert meter.total == 3 * 2 * 3 * 4 * 5


def test_keys_are_counted_apart_and_a_share_is_a_share() -> None:
    meter = FlopMeter()
    meter.run("small", lambda: torch.ones(1, 1) @ torch.ones(1, 1))
    meter.run("half", lambda: torch.ones(2, 2) @ torch.ones(2, 2), share=0.5)
    assert meter.total == 2 + 8


def test_backward_is_counted() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    meter = FlopMeter()
    meter.run("step", lambda: (torch.ones(2, 4) @ weight).sum().backward())
    assert meter.total == 2 * (2 * 2 * 4 * 4)  # forward, and the gradient of the weight
