"""Hosts: plain torch.nn modules with the sizes, names and behaviour that growing from them relies on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from morphogen import tasks
from morphogen.state import draw_from
from morphogen.tasks.hosts import conv1d_host, conv2d_host


def image_host() -> nn.Sequential:
    return conv2d_host((3, 5), 10, kernels=(3, 3))


def signal_host() -> nn.Sequential:
    return conv1d_host((4, 6, 8), 10, kernels=(5, 3, 3))


HOSTS = pytest.mark.parametrize(
    ("make", "example"), [(image_host, torch.zeros(2, 1, 8, 8)), (signal_host, torch.zeros(2, 1, 40))], ids=["2d", "1d"]
)
Make = Callable[[], nn.Sequential]


@HOSTS
def test_a_host_needs_torch_alone(make: Make, example: Tensor) -> None:
    kinds = {type(module) for module in make().modules()}
    assert all(getattr(nn, kind.__name__, None) is kind for kind in kinds), kinds


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_so_does_the_host_of_every_task(name: str) -> None:
    kinds = {type(module) for module in tasks.get(name).make_host().modules()}
    assert all(getattr(nn, kind.__name__, None) is kind for kind in kinds), kinds


def test_layers_have_readable_names() -> None:
    named = [name for name, _ in image_host().named_modules()]
    blocks = [f"block{number}{part}" for number in (1, 2) for part in ("", ".conv", ".norm", ".relu")]
    assert named == ["", *blocks, "pool", "flatten", "head"]
    assert [name for name, _ in signal_host().named_children()] == ["block1", "block2", "block3", "pool", "flatten", "head"]


@pytest.mark.parametrize(
    ("host", "parameters"),
    [
        (conv2d_host((3, 3), 10, kernels=(3, 3)), 160),  # 27 + 6 + 81 + 6 + 40
        (conv2d_host((3, 4), 7, kernels=(3, 5), in_channels=2), 54 + 6 + 300 + 8 + 35),
        (conv1d_host((4, 4, 4), 10, kernels=(5, 3, 3)), 190),  # 20 + 8 + 48 + 8 + 48 + 8 + 50
        (conv1d_host((4,), 3, kernels=(7,), in_channels=2), 56 + 8 + 15),
    ],
)
def test_size_is_what_the_widths_say(host: nn.Sequential, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in host.parameters()) == parameters


def test_every_block_halves_the_resolution() -> None:
    images, signals = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 40)
    for block, expected in zip(image_host()[:2], [(2, 3, 4, 4), (2, 5, 2, 2)], strict=True):
        images = block(images)
        assert images.shape == expected
    for block, expected in zip(signal_host()[:3], [(2, 4, 20), (2, 6, 10), (2, 8, 5)], strict=True):
        signals = block(signals)
        assert signals.shape == expected


@HOSTS
def test_a_host_computes_what_it_says(make: Make, example: Tensor) -> None:
    """Against the same written out by hand, with the statistics that training leaves."""
    host = make()
    x = torch.randn(16, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    host(x)
    host.eval()
    h, parts = x.double(), {name: value.double() for name, value in host.state_dict().items()}
    convolve = nn.functional.conv2d if example.ndim == 4 else nn.functional.conv1d
    per_channel = (1, -1, *[1] * (example.ndim - 2))
    for number in range(1, len(host) - 2):
        weight = parts[f"block{number}.conv.weight"]
        h = convolve(h, weight, stride=2, padding=weight.shape[-1] // 2)
        norm = {key: parts[f"block{number}.norm.{key}"].reshape(per_channel) for key in ("weight", "bias")}
        mean, var = (parts[f"block{number}.norm.running_{key}"].reshape(per_channel) for key in ("mean", "var"))
        h = ((h - mean) / torch.sqrt(var + 1e-5) * norm["weight"] + norm["bias"]).clamp(min=0)
    expected = h.flatten(2).mean(2) @ parts["head.weight"].T + parts["head.bias"]
    assert host(x).shape == (16, 10)
    torch.testing.assert_close(host(x).double(), expected, atol=1e-5, rtol=1e-5)


@HOSTS
def test_any_size_of_input_will_do(make: Make, example: Tensor) -> None:
    host = make().eval()
    for size in (1, 5, 13):
        assert host(torch.zeros(3, 1, *[size] * (example.ndim - 2))).shape == (3, 10)


@HOSTS
def test_parameters_come_from_the_callers_stream(make: Make, example: Tensor) -> None:
    def build(seed: int) -> dict[str, Tensor]:
        with draw_from(torch.Generator().manual_seed(seed)):
            return make().state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_the_first_loss_is_that_of_guessing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path))
    train = tasks.get(name).load().train
    ratios: list[float] = []
    for seed in range(20):
        with draw_from(torch.Generator().manual_seed(seed)), torch.no_grad():
            outputs = tasks.get(name).make_host()(train.inputs)
        ratios.append(nn.functional.cross_entropy(outputs, train.targets).item() / math.log(10))
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.05)
    assert max(ratios) < 1.12


@pytest.mark.parametrize("make", [conv1d_host, conv2d_host])
@pytest.mark.parametrize(("widths", "kernels"), [((), ()), ((3, 3), (3,)), ((3,), (3, 3))])
def test_each_width_needs_its_kernel(
    make: Callable[..., nn.Sequential], widths: tuple[int, ...], kernels: tuple[int, ...]
) -> None:
    words = f"`kernels` must hold one size for each of {len(widths)} widths, got {len(kernels)}"
    with pytest.raises(ValueError, match=words):
        make(widths, 10, kernels=kernels)
