"""Blueprints for sequences: who sees whom, positions, heads, and two ways to compute the same attention."""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.growth import GrowableModel, Stage, blueprints
from morphogen.testing import LENIENT, HostCase, lead_to

flex: Any = importlib.import_module("morphogen.growth.blueprints.flex_attention")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grown(name: str, width: int = 8, **options: Any) -> Any:
    body = blueprints.get(name).build(width, "NLC", **options).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return body


def seen(body: Any, length: int = 8) -> Tensor:
    """Which positions (columns) the output at each position (rows) depends on."""
    feature = noise(1, length, body.outer.out_features)
    columns: list[Tensor] = []
    with torch.no_grad():
        for place in range(length):
            other = feature.clone()
            other[:, place] = 3.0 - other[:, place]
            columns.append((body(other) - body(feature)).abs().amax((0, 2)) > 1e-12)
    return torch.stack(columns, dim=1)


def band(length: int, before: int, behind: int) -> Tensor:
    """The mask of positions up to ``before`` earlier and ``behind`` later."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance <= before) & (distance >= -behind)


@pytest.mark.parametrize(
    ("name", "options", "before", "behind"),
    [
        ("attention", {}, 8, 8),
        ("attention", {"causal": True}, 8, 0),
        ("attention", {"causal": True, "rope": True, "num_heads": 2}, 8, 0),
        ("flex_attention", {"window": 1}, 0, 0),
        ("flex_attention", {"window": 3}, 2, 2),
        ("flex_attention", {"window": 3, "causal": True, "rope": True}, 2, 0),
        ("flex_attention", {"window": 100}, 8, 8),
        ("conv1d", {}, 2, 2),
        ("conv1d", {"causal": True}, 4, 0),
        ("conv1d", {"causal": True, "kernel_size": 2}, 1, 0),
        ("mlp_small", {}, 0, 0),
        ("glu", {}, 0, 0),
        ("norm", {"statistics": "sample"}, 0, 0),
    ],
)
def test_each_position_sees_exactly_those_it_should(name: str, options: dict[str, Any], before: int, behind: int) -> None:
    body = grown(name, **options).eval()
    assert torch.equal(seen(body) if name != "norm" else seen_by_norm(body), band(8, before, behind))


def seen_by_norm(body: Any) -> Tensor:
    body.outer = nn.Linear(8, 8)
    return seen(body)


@pytest.mark.parametrize("name", ["attention", "flex_attention"])
def test_the_default_heads_fit_every_width(name: str) -> None:
    row = blueprints.get(name)
    heads = {width: row.build(width, "NLC").num_heads for width in range(1, 33)}
    assert all(width % count == 0 for width, count in heads.items())
    assert [heads[width] for width in (1, 5, 6, 7, 8, 9, 10, 32)] == [1, 1, 3, 1, 4, 3, 2, 4]
    for width in range(2, 33):
        body = row.build(width, "NLC", rope=True)
        assert width // body.num_heads >= 2
        assert body(torch.ones(2, 3, width)).shape == (2, 3, width)


def test_wrong_options_are_refused() -> None:
    build = blueprints.get("flex_attention").build
    for heads in (3, 0, -2):
        with pytest.raises(ValueError, match=f"`num_heads` must divide the width 8, got {heads}"):
            build(8, "NLC", num_heads=heads)
    with pytest.raises(ValueError, match="`num_heads` must leave each head 2 channels with rope, got 8 at width 8"):
        build(8, "NLC", num_heads=8, rope=True)
    with pytest.raises(ValueError, match="`num_heads` must leave each head 2 channels with rope, got 1 at width 1"):
        build(1, "NLC", rope=True)
    with pytest.raises(ValueError, match="`window` must be at least 1, got 0"):
        build(8, "NLC", window=0)
    with pytest.raises(ValueError, match="`kernel_size` must be odd, got 4"):
        blueprints.get("conv1d").build(8, "NLC", kernel_size=4)
    with pytest.raises(ValueError, match="`gate` must be one of silu, sigmoid, got 'relu'"):
        blueprints.get("glu").build(8, "NLC", gate="relu")


def test_attention_is_what_the_formula_says() -> None:
    body, feature = grown("attention", num_heads=2, causal=True), noise(3, 6, 8)
    normalised = nn.functional.layer_norm(feature, (8,))
    q, k, v = (normalised @ body.inner.weight.T).split(8, dim=2)
    mixed: list[Tensor] = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].mT / math.sqrt(4)
        scores = scores.masked_fill(~band(6, 6, 0), -math.inf)
        mixed.append(scores.softmax(-1) @ v[..., head])
    expected = torch.cat(mixed, dim=2) @ body.outer.weight.T + body.outer.bias
    assert torch.allclose(body(feature), expected)


@pytest.mark.parametrize("head_width", [2, 5, 8])
def test_rope_turns_by_the_difference_of_positions_and_keeps_lengths(head_width: int) -> None:
    body = grown("attention", width=head_width, num_heads=1, rope=True)
    turned = body._turned(noise(2, 1, 1, 1, head_width).expand(2, 1, 1, 9, head_width))
    q, k = turned[0, 0, 0], turned[1, 0, 0]
    assert torch.allclose(q.norm(dim=1), q.norm(dim=1)[:1].expand(9), atol=1e-6)
    scores = q @ k.T
    for difference in range(-8, 9):
        along = scores.diagonal(difference)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-5)
    assert float(scores[0].std()) > 0.01
    i = torch.arange(head_width // 2, dtype=torch.float64)
    angles = 8.0 * 10_000.0 ** (-2.0 * i / (2 * (head_width // 2)))
    pairs = turned[0, 0, 0, 0, : head_width // 2], turned[0, 0, 0, 0, head_width // 2 : 2 * (head_width // 2)]
    expected = pairs[0] * angles.cos() - pairs[1] * angles.sin()
    assert torch.allclose(turned[0, 0, 0, 8, : head_width // 2], expected, atol=1e-5)


def test_without_rope_order_is_not_felt_and_with_it_it_is() -> None:
    feature, order = noise(2, 7, 8), torch.randperm(7, generator=torch.Generator().manual_seed(3))
    for rope in (False, True):
        body = grown("attention", rope=rope)
        same = torch.allclose(body(feature[:, order]), body(feature)[:, order], atol=1e-9)
        assert same is not rope


def test_flex_attention_is_attention_with_the_same_weights() -> None:
    for causal, rope in itertools.product((False, True), repeat=2):
        ours, theirs = (grown(name, causal=causal, rope=rope) for name in ("flex_attention", "attention"))
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        feature = noise(2, 9, 8)
        assert torch.equal(ours.train()(feature), theirs(feature))
        assert torch.equal(ours.eval()(feature), theirs(feature))


@pytest.fixture
def kernels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way through FlexAttention on this CPU, where torch runs it without gradients, in its unfused form."""
    monkeypatch.setattr(flex, "_DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "_has_triton", lambda: True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("kernels_here")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_computes_what_the_fallback_does(causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    body = grown("flex_attention", width=32, num_heads=2, causal=causal, window=window, rope=True).float()
    calls: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Any:
        calls.append(q.shape[2])
        return flex.flex_attention(q, k, v, block_mask=block_mask)

    monkeypatch.setattr(flex, "_compiled", lambda: counted)
    with torch.no_grad():
        for length in (1, 5, 130):
            feature = noise(2, length, 32).float()
            found = body(feature)
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr(flex, "_DEVICES", ())
                expected = body(feature)
            assert torch.allclose(found, expected, atol=1e-5)
    assert calls == [1, 5, 130]


def test_masks_are_built_once_and_the_cache_is_bounded() -> None:
    flex.block_mask.cache_clear()
    device = torch.device("cpu")
    with torch.inference_mode():
        first = flex.block_mask(True, None, 6, device)
    assert flex.block_mask(True, None, 6, device) is first and not first.kv_indices.is_inference()
    assert flex.block_mask(True, 2, 6, device) is not first and flex.block_mask(True, None, 7, device) is not first
    assert flex.block_mask.cache_info().maxsize == 64


def test_what_has_no_kernel_is_told_by_device_dtype_and_width_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_has_triton", lambda: True)
    q = torch.zeros(1, 1, 4, 16)
    assert not flex.has_kernel(q)
    monkeypatch.setattr(flex, "_DEVICES", ("cpu",))
    assert flex.has_kernel(q) and flex.has_kernel(q.bfloat16()) and flex.has_kernel(q.clone().requires_grad_())
    assert not flex.has_kernel(q.double()) and not flex.has_kernel(q[..., :8])
    monkeypatch.setattr(flex, "_has_triton", lambda: False)
    assert not flex.has_kernel(q)


def test_the_fallback_says_so_once_per_process() -> None:
    flex._give_notice.cache_clear()
    case = HostCase("NLC")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            model = case.model(seed=seed)
            model.germinate("early", "flex_attention")
            lead_to(model, "early", Stage.FOSSILIZED, case.example())
    ours = [str(warning.message) for warning in caught if "flex_attention" in str(warning.message)]
    assert len(ours) == 1 and "runs as scaled_dot_product_attention" in ours[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {"causal": True, "rope": True}),
        ("flex_attention", {"window": 2}),
        ("conv1d", {"causal": True}),
    ],
)
def test_compiled_in_one_graph_it_computes_the_same(name: str, options: dict[str, Any]) -> None:
    body = grown(name, **options)
    run = torch.compile(body, backend="aot_eager", fullgraph=True)
    feature = noise(2, 6, 8)
    expected, found = (module(feature) for module in (body, run))
    gradients = [torch.autograd.grad(output.square().sum(), body.inner.parameters()) for output in (expected, found)]
    assert torch.allclose(found, expected)
    assert all(torch.allclose(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "options"), [("attention", {"rope": True}), ("flex_attention", {"window": 3, "causal": True})]
)
def test_an_exported_program_takes_any_length(name: str, options: dict[str, Any]) -> None:
    host = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    example = noise(2, 6, 8).float()
    model = GrowableModel(host, {"a": "0"}, example, config=LENIENT)
    model.germinate("a", name, options=options)
    lead_to(model, "a", Stage.FOSSILIZED, example)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    plain = model.eval().export()
    dims = {0: torch.export.Dim("samples", max=64), 1: torch.export.Dim("length", min=2, max=512)}
    program = torch.export.export(plain, (example,), dynamic_shapes=(dims,)).module()
    for length in (2, 6, 19):
        inputs = noise(3, length, 8, seed=5).float()
        assert torch.allclose(program(inputs), model(inputs), atol=1e-6)
