"""Hosts: plain torch.nn modules with the sizes, names and behaviour that growing from them relies on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel
from morphogen.state import draw_from
from morphogen.tasks import ConvHost, MLPHost, Task, TransformerHost
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
def test_a_host_is_made_of_torch_layers(make: Make, example: Tensor) -> None:
    kinds = {type(module) for module in make().modules()}
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
def test_the_first_loss_is_that_of_guessing(name: str, task_named: Callable[[str], Task]) -> None:
    task = task_named(name)
    data = task.load()
    ratios: list[float] = []
    for seed in range(20):
        with draw_from(torch.Generator().manual_seed(seed)), torch.no_grad():
            outputs = task.make_host(data)(data.train.inputs)
        ratios.append(task.loss(outputs, data.train.targets).item() / math.log(data.num_classes))
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.05)
    assert max(ratios) < 1.12


@pytest.mark.parametrize(
    ("name", "loss", "digest"),
    [("digits", 2.1405625343322754, "bd968c410b80d54e"), ("mnist1d", 2.187631845474243, "857aa1181f241152")],
)
def test_hosts_that_results_were_published_with_stay_as_they_are(
    name: str, loss: float, digest: str, task_named: Callable[[str], Task]
) -> None:
    """Names, order and initial values of all parameters; and, to rounding, what they compute after a few steps."""
    built = task_named(name).build(seed=3)
    found = hashlib.sha256()
    for key, value in built.model.state_dict().items():
        found.update(key.encode() + value.numpy().tobytes())
    assert found.hexdigest()[:16] == digest
    for start in range(0, 14 * 64, 64):
        inputs, targets = built.data.train.rows(slice(start, start + 64))
        built.optimizer.zero_grad()
        last = built.task.loss(built.model(inputs), targets)
        last.backward()
        built.optimizer.step()
    assert last.item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("make", [conv1d_host, conv2d_host])
@pytest.mark.parametrize(("widths", "kernels"), [((), ()), ((3, 3), (3,)), ((3,), (3, 3))])
def test_each_width_needs_its_kernel(
    make: Callable[..., nn.Sequential], widths: tuple[int, ...], kernels: tuple[int, ...]
) -> None:
    words = f"`kernels` must hold one size for each of {len(widths)} widths, got {len(kernels)}"
    with pytest.raises(ValueError, match=words):
        make(widths, 10, kernels=kernels)


# ------------------------------------------------------------------------------------------------------- the reference sizes


@pytest.mark.parametrize(
    ("widths", "kernel", "num_pools", "parameters"),
    [
        ((8, 16, 32), 3, 3, 6418),
        ((8, 16, 32, 64, 128), 3, 5, 99922),
        ((16, 32, 64), 3, 3, 24346),
        ((1, 2, 4), 1, 3, 77),
        ((2, 4, 8), 1, 0, 164),
        ((2, 4, 8, 16, 32), 1, 5, 1140),
    ],
)
def test_reference_hosts_have_their_sizes(widths: tuple[int, ...], kernel: int, num_pools: int, parameters: int) -> None:
    host = ConvHost(widths, 10, in_channels=3, kernels=kernel, num_pools=num_pools)
    assert sum(parameter.numel() for parameter in host.parameters()) == parameters
    assert host(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    features = host[: len(widths)](torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, widths[-1], 32 >> num_pools, 32 >> num_pools)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernels": 4}, "`kernels` must be odd, got 4"),
        ({"dimensions": 3}, "`dimensions` must be 1 for signals or 2 for images, got 3"),
        ({"num_pools": 3}, r"`num_pools` must lie in \[0, 2\]"),
        ({"num_pools": -1}, "`num_pools` must lie in"),
    ],
)
def test_a_conv_host_that_makes_no_sense_is_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ConvHost((3, 3), 10, **arguments)


# ------------------------------------------------------------------------------------------------------- MLP and transformer


def transformer(vocab_size: int = 98, width: int = 32, **arguments: int) -> TransformerHost:
    arguments = {"num_layers": 2, "num_heads": 4, "context_length": 16, **arguments}
    return TransformerHost(vocab_size, width, **arguments)


def test_an_mlp_computes_what_it_says() -> None:
    host = MLPHost(12, (5, 4), 3)
    assert [name for name, _ in host.named_children()] == ["flatten", "block1", "block2", "head"]
    x = torch.randn(6, 3, 4)
    h = x.flatten(1)
    for block in (host[1], host[2]):
        h = (h @ block[0].weight.T + block[0].bias).clamp(min=0)
    torch.testing.assert_close(host(x), host[3](h))
    with pytest.raises(ValueError, match="`widths` must hold the units of at least one block"):
        MLPHost(12, (), 3)


@pytest.mark.parametrize("vocab_size", [2, 98, 5000])
@pytest.mark.parametrize(("width", "layers"), [(16, 1), (32, 2), (256, 6)])
def test_the_first_loss_of_a_transformer_is_ln_v(vocab_size: int, width: int, layers: int) -> None:
    tokens = torch.randint(vocab_size, (16, 17), generator=torch.Generator().manual_seed(1))
    ratios: list[float] = []
    for seed in range(5):
        with draw_from(torch.Generator().manual_seed(seed)), torch.no_grad():
            logits = transformer(vocab_size, width, num_layers=layers)(tokens[:, :-1])
        ratios.append(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item() / math.log(vocab_size))
    assert sum(ratios) / 5 == pytest.approx(1.0, abs=0.02 if vocab_size > 2 else 0.04)


def test_a_transformer_sees_no_future_token() -> None:
    host = transformer().eval()
    tokens = torch.randint(98, (3, 16))
    changed = tokens.clone()
    changed[:, 9:] = (tokens[:, 9:] + 1) % 98
    first, second = host(tokens), host(changed)
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert (first[:, 9:] - second[:, 9:]).abs().amax((0, 2)).min() > 1e-4


def test_a_transformer_sees_order_and_every_earlier_token() -> None:
    host = transformer().double()
    embedded = host.tokens(torch.randint(98, (1, 8))).detach().requires_grad_()
    x = host.norm(host.blocks(embedded + host.positions(torch.arange(8))))
    (gradient,) = torch.autograd.grad(x[0, -1].square().sum(), embedded)
    assert gradient.abs().amax(-1).min() > 0
    tokens = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(host(tokens)[:, -1], host(tokens[:, [1, 0, 2]])[:, -1])


def test_any_length_up_to_the_context_will_do() -> None:
    host = transformer().eval()
    tokens = torch.randint(98, (2, 16))
    whole = host(tokens)
    for length in (1, 7, 16):
        torch.testing.assert_close(host(tokens[:, :length]), whole[:, :length])
    with pytest.raises(IndexError):
        host(torch.zeros(1, 17, dtype=torch.int64))
    torch.testing.assert_close(host(tokens.int()), whole)


def test_the_head_is_the_embedding() -> None:
    host = transformer()
    assert {name.split(".")[0] for name, _ in host.named_parameters()} == {"tokens", "positions", "blocks", "norm"}
    host(torch.randint(98, (2, 16))).square().mean().backward()
    assert host.tokens.weight.grad is not None and host.tokens.weight.grad.abs().amax(1).min() > 0


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="`width` must be a multiple of `num_heads`, got 32 and 5"):
        transformer(num_heads=5)


ANY_HOST = pytest.mark.parametrize(
    ("make", "example", "point"),
    [
        (image_host, torch.randn(3, 1, 8, 8), "block2"),
        (signal_host, torch.randn(3, 1, 40), "block2"),
        (lambda: ConvHost((4, 8), 5, in_channels=3, num_pools=1), torch.randn(3, 3, 12, 12), "block1"),
        (lambda: MLPHost(12, (8, 8), 5), torch.randn(3, 12), "block1"),
        (transformer, torch.randint(98, (3, 16)), "blocks.0"),
    ],
    ids=["conv2d", "conv1d", "pooled", "mlp", "transformer"],
)


def longer(example: Tensor) -> Tensor:
    return torch.cat([example, example])


@ANY_HOST
def test_a_host_is_traced_and_exported(make: Make, example: Tensor, point: str) -> None:
    host = make().eval()
    traced = torch.fx.symbolic_trace(host)
    torch.testing.assert_close(traced(longer(example)), host(longer(example)))
    program = torch.export.export(host, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(longer(example)), host(longer(example)))


@ANY_HOST
def test_a_grown_host_is_exported(make: Make, example: Tensor, point: str) -> None:
    model = GrowableModel(make(), {"slot": point}, example)
    model.germinate("slot", "mlp")
    plain = model.export()
    torch.testing.assert_close(plain(example), model.eval()(example))


def test_a_transformer_is_exported_with_any_length() -> None:
    host = transformer().eval()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=16)},)
    program = torch.export.export(host, (torch.randint(98, (3, 12)),), dynamic_shapes=shapes)
    tokens = torch.randint(98, (2, 7))
    torch.testing.assert_close(program.module()(tokens), host(tokens))
