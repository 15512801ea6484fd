"""Suggested growth points: those of the residual stream first, heads and outputs never, and nothing is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.errors import SlotError
from morphogen.growth import GrowableModel, blueprints, suggest_points
from morphogen.tasks.hosts import ConvHost, MLPHost, TransformerHost


def names(host: nn.Module, example: Any) -> list[str]:
    return [each.path for each in suggest_points(host, example)]


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


def test_built_in_hosts_are_grown_at_their_blocks() -> None:
    conv = suggest_points(ConvHost((8, 16), 10, num_pools=1), torch.zeros(2, 1, 8, 8))
    assert [each.path for each in conv[:2]] == ["block1", "block2"]
    assert [each.shape for each in conv[:2]] == [(2, 8, 4, 4), (2, 16, 4, 4)]
    assert {each.layout for each in conv} == {"NCHW"} and "head" not in {each.path for each in conv}
    mlp = suggest_points(MLPHost(12, (8, 6), 3), torch.zeros(2, 3, 4))
    assert [(each.path, each.width) for each in mlp[:2]] == [("block1", 8), ("block2", 6)]
    assert not {"flatten", "head"} & {each.path for each in mlp}
    transformer = TransformerHost(11, 16, num_layers=2, num_heads=2, context_length=8)
    found = suggest_points(transformer, tokens(2, 5))
    assert [each.path for each in found[:2]] == ["blocks.0", "blocks.1"] and found[0].shape == (2, 5, 16)
    assert not {"positions", "norm"} & {each.path for each in found}  # of no sample; with nothing but the head behind it


def test_each_feature_is_named_once() -> None:
    """A block whose last layer returns it, what is passed on as it is, and a view of it."""
    block = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    found = names(nn.Sequential(block, nn.Identity(), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), torch.ones(3, 4))
    assert found == ["0"]
    inplace = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    assert names(inplace, torch.ones(3, 4)) == ["0", "1"]


def test_only_what_can_grow_is_suggested() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.twice = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.choice = Choice()
            self.merged = Merged()
            self.head = nn.Linear(4, 2)
            self.extra = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.twice(self.twice(self.used(x)))
            self.merged(x)
            return self.head(x + self.choice(x)), self.extra(x).log_softmax(-1)

    class Choice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1, keepdim=True)

    class Merged(nn.Module):
        """Another number of rows than samples."""

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(x.reshape(-1, 2))

    assert names(Host(), torch.ones(3, 4)) == ["used"]


def test_blueprints_are_those_that_fit() -> None:
    found = suggest_points(nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 3)), torch.zeros(2, 2, 9))
    assert {each.layout for each in found} == {"NCL"}
    for each in found:
        assert each.blueprints and set(each.blueprints) <= set(blueprints.names("NCL"))
        for name in each.blueprints:
            blueprints.get(name).build(each.width, each.layout)


def test_names_are_those_a_slot_may_have() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = nn.Linear(4, 4)
            self.train_ = nn.Linear(4, 4)
            self.a_b = nn.Linear(4, 4)
            self.a = nn.Sequential()
            self.a.b = nn.Linear(4, 4)
            self.end = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.a.b(self.a_b(self.train_(self.host(x)))))

    host, example = Host(), torch.ones(2, 4)
    found = {each.name: each.path for each in suggest_points(host, example)}
    assert found == {"a_b": "a.b", "point_host": "host", "train_": "train_", "a_b_": "a_b"}
    GrowableModel(host, {each.name: each.point for each in suggest_points(host, example)}, example)


def test_nothing_is_touched(kit: Any) -> None:
    host = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2))
    host[1].eval()
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    chance, modes = kit.chance(), [part.training for part in host.modules()]
    assert suggest_points(host, torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert kit.same(chance, kit.chance()) and modes == [part.training for part in host.modules()]
    assert kit.same(before, dict(host.state_dict()))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in host.modules())


def test_a_host_in_use_is_refused() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    GrowableModel(host, {"a": "0"}, torch.ones(2, 4))
    with pytest.raises(SlotError, match="belongs to another GrowableModel"):
        suggest_points(host, torch.ones(2, 4))
