"""The blueprint "norm": affine in its input, statistics that follow the data and no accident."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from morphogen.growth import Stage, blueprints
from morphogen.growth.layouts import LAYOUTS, Layout
from morphogen.testing import HostCase, lead_to

SHAPES: dict[Layout, tuple[int, ...]] = {"NC": (12, 4), "NCL": (6, 4, 5), "NLC": (6, 5, 4), "NCHW": (4, 4, 3, 5)}


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grown(layout: Layout, **options: Any) -> Any:
    """A norm with weights, after one batch of mean 3 and standard deviation 2."""
    body = blueprints.get("norm").build(4, layout, **options).double()
    body(3.0 + 2.0 * noise(SHAPES[layout]))
    with torch.no_grad():
        body.weight.copy_(noise(tuple(body.weight.shape), 1))
        body.bias.copy_(noise(tuple(body.bias.shape), 2))
    return body


def channels(feature: Tensor, layout: Layout) -> Tensor:
    """One row for each channel."""
    return feature.movedim(layout.index("C"), 0).flatten(1)


def apart(body: Any, feature: Tensor) -> Tensor:
    """What a copy returns, so that statistics stay."""
    with torch.no_grad():
        return copy.deepcopy(body)(feature)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_make_it_affine_in_both_modes_and_those_of_a_sample_do_not(layout: Layout, training: bool) -> None:
    x, y = noise(SHAPES[layout], 3), 5.0 * noise(SHAPES[layout], 4)
    errors: dict[str, float] = {}
    for statistics in ("running", "sample"):
        body = grown(layout, statistics=statistics).train(training)
        mixed = 0.3 * apart(body, x) + 0.7 * apart(body, y)
        errors[statistics] = float((apart(body, 0.3 * x + 0.7 * y) - mixed).abs().max())
    assert errors["running"] < 1e-12 and errors["sample"] > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_batch_sets_the_statistics_and_later_ones_move_them_after_use(layout: Layout) -> None:
    body = grown(layout)
    first = channels(3.0 + 2.0 * noise(SHAPES[layout]), layout)
    norm, second = body.norm, noise(SHAPES[layout], 5)
    mean, var = norm.mean.flatten().clone(), norm.var.flatten().clone()
    assert torch.allclose(mean, first.mean(1)) and torch.allclose(var, first.var(1, correction=0))
    normalised = (channels(second, layout) - mean[:, None]) / (var[:, None] + 1e-3).sqrt()
    expected = body.weight.flatten()[:, None] * normalised + body.bias.flatten()[:, None]
    assert torch.allclose(channels(body(second), layout), expected)
    batch = channels(second, layout)
    assert torch.allclose(norm.mean.flatten(), 0.9 * mean + 0.1 * batch.mean(1))
    assert torch.allclose(norm.var.flatten(), 0.9 * var + 0.1 * batch.var(1, correction=0))
    assert int(norm.num_batches) == 2
    before = copy.deepcopy(body.state_dict())
    body.eval()(second)
    assert all(torch.equal(tensor, body.state_dict()[name]) for name, tensor in before.items())


def test_a_large_feature_far_from_zero_takes_a_first_step_of_ordinary_size() -> None:
    body = blueprints.get("norm").build(4, "NC").double()
    feature = 1e4 * (5.0 + noise((16, 4)))
    (body(feature) * noise((16, 4), 1)).sum().backward()
    assert 0.1 < float(body.weight.grad.norm()) < 20.0


def test_a_dead_channel_that_wakes_is_blown_up_32_fold_at_most() -> None:
    body = blueprints.get("norm").build(4, "NC").double()
    for step in range(200):
        feature = noise((16, 4), step)
        feature[:, 0] = 0.0
        assert bool(body(feature).isfinite().all())
    woken = torch.ones(1, 4, dtype=torch.float64)
    assert 10.0 < float(body.norm.eval()(woken)[0, 0]) < 32.0


def test_a_batch_that_is_not_finite_leaves_its_channels_alone() -> None:
    body = grown("NC")
    before, count = body.norm.mean.clone(), int(body.norm.num_batches)
    feature = noise((12, 4), 7)
    feature[3, 1], feature[4, 2] = torch.nan, torch.inf
    body(feature)
    assert torch.equal(body.norm.mean[1:3], before[1:3]) and not torch.equal(body.norm.mean[::3], before[::3])
    assert bool(body.norm.var.isfinite().all()) and int(body.norm.num_batches) == count


def test_buffers_travel_and_follow() -> None:
    body, fresh = grown("NCHW"), blueprints.get("norm").build(4, "NCHW").double()
    fresh.load_state_dict(body.state_dict())
    feature = noise(SHAPES["NCHW"], 8)
    assert torch.equal(fresh.eval()(feature), apart(body.eval(), feature))
    half = copy.deepcopy(body).to(torch.bfloat16).train()
    assert half(feature.bfloat16()).dtype is torch.bfloat16 and half.norm.mean.dtype is torch.bfloat16
    assert body.norm.mean.dtype is torch.float64


def test_compiled_in_one_graph_it_computes_and_counts_the_same() -> None:
    eager, compiled = grown("NCHW"), grown("NCHW")
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph

    run = torch.compile(compiled, backend=counting, fullgraph=True)
    for step in range(4):
        feature = noise(SHAPES["NCHW"], step)
        expected, found = eager(feature), run(feature)
        expected.square().sum().backward()
        found.square().sum().backward()
        assert torch.allclose(found, expected)
    for name, tensor in eager.state_dict().items():
        assert torch.allclose(compiled.state_dict()[name], tensor)
    assert torch.allclose(eager.weight.grad, compiled.weight.grad) and len(graphs) == 1


def test_gradient_checkpointing_works_and_counts_a_batch_twice() -> None:
    body, feature = grown("NC"), noise((12, 4), 9).requires_grad_()
    count = int(body.norm.num_batches)
    checkpoint(body, feature, use_reentrant=False).square().sum().backward()
    assert int(body.norm.num_batches) == count + 2
    assert feature.grad is not None and bool(feature.grad.isfinite().all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported_from_training_it_keeps_its_statistics_for_good(layout: Layout) -> None:
    case = HostCase(layout)
    model = case.model()
    model.germinate("early", "norm")
    lead_to(model, "early", Stage.FOSSILIZED, case.example())
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.fill_(0.7)
    model.train()
    before = copy.deepcopy(model.state_dict())
    plain = model.export()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert torch.equal(plain(case.example(9)), model.eval()(case.example(9)))
    statistics = {name: buffer.clone() for name, buffer in plain.named_buffers() if "seed" in name}
    assert statistics
    plain.train()(case.example(7))
    assert all(torch.equal(plain.get_buffer(name), buffer) for name, buffer in statistics.items())


def test_an_unknown_kind_of_statistics_is_an_error() -> None:
    with pytest.raises(ValueError, match="`statistics` must be one of running, sample, got 'batch'"):
        blueprints.get("norm").build(4, "NC", statistics="batch")
