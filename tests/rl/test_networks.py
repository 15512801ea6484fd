"""Stacked towers against one layer each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from morphogen.rl.networks import CNN, MLP, StackedLinear
from morphogen.state import draw_from

CHANCE = torch.Generator()


@pytest.fixture(autouse=True)
def _own_chance():
    with draw_from(torch.Generator().manual_seed(0)):
        yield


def test_stacked_layers_are_separate_linear_layers() -> None:
    layer = StackedLinear(3, 4, 5, 1.0, CHANCE)
    nn.init.normal_(layer.bias)
    x_CBD = torch.randn(3, 7, 4)
    for tower in range(3):
        expected = nn.functional.linear(x_CBD[tower], layer.weight[tower].T, layer.bias[tower, 0])
        torch.testing.assert_close(layer(x_CBD)[tower], expected)


def test_weights_start_orthogonal_and_towers_differ() -> None:
    layer = StackedLinear(2, 8, 8, 2.0, CHANCE)
    for weight in layer.weight:
        torch.testing.assert_close(weight @ weight.T, 4.0 * torch.eye(8), atol=1e-5, rtol=0)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert (layer.bias == 0).all()


def test_a_gradient_stays_in_its_tower() -> None:
    network = MLP(2, 4, (8, 8), "tanh", CHANCE)
    network(torch.randn(1, 5, 4).expand(2, -1, -1))[0].sum().backward()
    for layer in network.layers:
        assert layer.weight.grad[0].abs().sum() > 0
        assert (layer.weight.grad[1] == 0).all()


def test_no_layers_are_the_identity() -> None:
    x_CBD = torch.randn(1, 5, 4)
    assert torch.equal(MLP(1, 4, (), "tanh", CHANCE)(x_CBD), x_CBD)


@pytest.mark.parametrize("shape", [(3, 84, 84), (1, 36, 40), (3, 12, 12)])
def test_images_of_any_size_become_features(shape: tuple[int, int, int]) -> None:
    network = CNN(2, shape, (4, 4, 4), (16,), "relu", generator=CHANCE)
    pixels = torch.randint(0, 256, (5, *shape)).float()
    features_CBF = network(pixels.flatten(1).expand(2, -1, -1))
    assert features_CBF.shape == (2, 5, 16)
    tower = network.towers[1](pixels / 255.0)
    torch.testing.assert_close(features_CBF[1], network.mlp(torch.stack([tower, tower]))[1])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_the_fast_tanh_is_tanh(scale: float) -> None:
    network = MLP(1, 4, (8,), "tanh", CHANCE)
    x_CBD = scale * torch.randn(1, 50, 4)
    expected = torch.tanh(network.layers[0](x_CBD))
    torch.testing.assert_close(network(x_CBD), expected, atol=2e-7, rtol=0)
    found, wanted = (torch.autograd.grad(y.sum(), network.layers[0].weight)[0] for y in (network(x_CBD), expected))
    torch.testing.assert_close(found, wanted, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_tower_alone_is_the_same_tower(activation: str) -> None:
    network, x_BD = MLP(3, 4, (8, 8), activation, CHANCE), torch.randn(5, 4)
    images, pixels_BD = CNN(2, (1, 8, 8), (2,), (4,), activation, generator=CHANCE), 255 * torch.rand(5, 64)
    for index in range(3):
        torch.testing.assert_close(network.tower(index, x_BD), network(x_BD.expand(3, -1, -1))[index])
    torch.testing.assert_close(images.tower(1, pixels_BD), images(pixels_BD.expand(2, -1, -1))[1])
