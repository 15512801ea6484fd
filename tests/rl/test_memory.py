"""Memory: one call over a sequence is the same as step after step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphogen.rl.memory import Memory
from morphogen.state import draw_from

KINDS = [("lstm", False), ("lstm", True), ("gru", False), ("gru", True)]

CHANCE = torch.Generator()


@pytest.fixture(autouse=True)
def _own_chance():
    with draw_from(torch.Generator().manual_seed(0)):
        yield


@pytest.mark.parametrize(("kind", "layer_norm"), KINDS)
def test_a_sequence_is_its_steps(kind: Any, layer_norm: bool) -> None:
    memory = Memory(kind, 2, 3, 5, layer_norm=layer_norm, generator=CHANCE)
    x_CLBD, state = torch.randn(2, 6, 4, 3), torch.randn_like(memory.initial_state(4))
    whole, last = memory(x_CLBD, state)
    steps, carried = [], state
    with torch.no_grad():  # the cell alone, as rollouts use it
        for step in range(6):
            out, carried = memory(x_CLBD[:, step : step + 1], carried)
            steps.append(out)
    torch.testing.assert_close(whole, torch.cat(steps, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, carried, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layer_norm"), KINDS)
def test_a_gradient_through_a_sequence_is_that_through_its_steps(kind: Any, layer_norm: bool) -> None:
    memory = Memory(kind, 1, 3, 5, layer_norm=layer_norm, generator=CHANCE)
    x_CLBD, state = torch.randn(1, 6, 4, 3), memory.initial_state(4)
    memory(x_CLBD, state)[0].square().sum().backward()
    whole = [parameter.grad.clone() for parameter in memory.parameters()]
    memory.zero_grad()
    steps = []
    for step in range(6):
        out, state = memory(x_CLBD[:, step : step + 1], state)
        steps.append(out)
    torch.cat(steps, 1).square().sum().backward()
    for parameter, expected in zip(memory.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


def test_an_untrained_lstm_remembers() -> None:
    core = Memory("lstm", 1, 3, 4, generator=CHANCE).layers[0]
    assert core.bias_ih_l0.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8  # input, forget, cell, output
    assert (core.bias_hh_l0 == 0).all()


def test_the_first_state_is_an_ordinary_tensor_of_zeros() -> None:
    with torch.inference_mode(False):
        state = Memory("lstm", 2, 3, 4, generator=CHANCE).initial_state(5)
    assert state.shape == (2, 2, 5, 4)
    assert not state.is_inference()
    assert (state == 0).all()


def test_layer_norm_makes_the_scale_of_inputs_irrelevant() -> None:
    memory, x_CLBD = Memory("gru", 1, 3, 4, layer_norm=True, generator=CHANCE), torch.randn(1, 2, 3, 3)
    small, large = (memory(scale * x_CLBD, memory.initial_state(3))[0] for scale in (1.0, 1000.0))
    torch.testing.assert_close(small, large, atol=1e-3, rtol=1e-3)
