"""Random streams: independent of order, reproducible, and no global generator is ever touched."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from morphogen.state import RandomStreams, draw_from

NAMES = st.lists(st.one_of(st.text(max_size=4), st.integers(-3, 99)), min_size=1, max_size=3).map(tuple)


@pytest.fixture(autouse=True)
def global_generators_stay(kit: Any) -> Iterator[None]:
    def read() -> Any:
        return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)

    before = read()
    yield
    assert kit.same(read(), before)


def test_golden_values() -> None:
    """Frozen: another value here means that no older run can be repeated."""
    streams = RandomStreams(7)
    assert streams.integer("data") == 5657735367858953986
    assert streams.numpy("data", 0).integers(1000, size=4).tolist() == [904, 818, 113, 910]
    assert torch.rand(2, generator=streams.torch("data", 0)).tolist() == [0.8465235829353333, 0.04828912019729614]


@settings(max_examples=50, deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=6, unique_by=repr), st.integers(0, 2**70), st.randoms(use_true_random=False))
def test_streams_depend_on_root_and_name_alone(names: list[Any], seed: int, order: random.Random) -> None:
    streams = RandomStreams(seed)
    first = {name: streams.integer(*name) for name in names}
    shuffled = list(names)
    order.shuffle(shuffled)
    for name in shuffled:
        streams.numpy(*name).random(3)
        assert RandomStreams(seed).integer(*name) == first[name]
    assert len(set(first.values())) == len(names)
    assert all(0 <= value < 2**63 for value in first.values())
    assert RandomStreams(seed + 1).integer(*names[0]) != first[names[0]]


def test_children_are_longer_names() -> None:
    streams = RandomStreams(3)
    assert streams.child("a").child("b", 1).integer("c") == streams.integer("a", "b", 1, "c")
    assert streams.integer("a", "b") != streams.integer("ab")
    assert streams.integer("1") != streams.integer(1)
    assert streams.integer("a", "b") != streams.integer('a", "b')


@pytest.mark.parametrize("seed", [-1, 1.5, True, None, "7"])
def test_a_root_seed_is_an_integer_from_zero(seed: Any) -> None:
    with pytest.raises(ValueError, match="`root_seed` must be an integer >= 0, got"):
        RandomStreams(seed)


def _trained(module: nn.Module, *shape: int) -> torch.Tensor:
    return module.train()(torch.ones(shape))


BUILDERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(3, 4),
    "conv": lambda: nn.Conv2d(2, 3, 3),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "gru": lambda: nn.GRU(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "embedding": lambda: nn.Embedding(5, 3),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "trunc_normal": lambda: nn.init.trunc_normal_(torch.empty(4, 4)),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "kaiming": lambda: nn.init.kaiming_normal_(torch.empty(4, 4)),
    "sparse": lambda: nn.init.sparse_(torch.empty(6, 4), 0.5),
    "rand": lambda: torch.rand(3) + torch.randn(3) + torch.randint(9, (3,)) + torch.randperm(3),
    "like": lambda: torch.rand_like(torch.ones(3)) + torch.randn_like(torch.ones(3)) + torch.randint_like(torch.ones(3), 9),
    "normal": lambda: torch.normal(torch.zeros(3), 1.0) + torch.normal(0.0, 1.0, (3,)),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 3),
    "bernoulli": lambda: torch.bernoulli(torch.full((32,), 0.5)),
    "poisson": lambda: torch.poisson(torch.full((9,), 4.0)),
    "binomial": lambda: torch.binomial(torch.full((9,), 10.0), torch.full((9,), 0.5)),
    "in place": lambda: torch.empty(3).uniform_() + torch.empty(3).exponential_() + torch.empty(3).log_normal_(),
    "dropout": lambda: _trained(nn.Dropout(0.5), 64),
    "dropout2d": lambda: _trained(nn.Dropout2d(0.5), 1, 64, 2, 2),
    "alpha dropout": lambda: _trained(nn.AlphaDropout(0.5), 64),
    "rrelu": lambda: F.rrelu(-torch.ones(8), training=True),
    "lstm dropout": lambda: _trained(nn.LSTM(3, 4, num_layers=2, dropout=0.5), 2, 1, 3)[0],
    "attention dropout": lambda: F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 8, 4), dropout_p=0.5),
    "gumbel": lambda: F.gumbel_softmax(torch.zeros(8)),
    "distribution": lambda: torch.distributions.Normal(torch.zeros(3), 1.0).sample(),
}


def drawn(result: Any) -> list[torch.Tensor]:
    return list(result.parameters()) if isinstance(result, nn.Module) else [result]


@pytest.mark.parametrize("name", BUILDERS)
def test_draw_from_decides_every_draw(kit: Any, name: str) -> None:
    def build(seed: int) -> list[torch.Tensor]:
        with draw_from(torch.Generator().manual_seed(seed)):
            return [tensor.detach().clone() for tensor in drawn(BUILDERS[name]())]

    assert kit.same(build(1), build(1))
    assert not kit.same(build(1), build(2))


def test_consecutive_draws_go_on_in_the_stream(generator: torch.Generator) -> None:
    with draw_from(generator):
        first = torch.rand(3)
    with draw_from(generator):
        second = torch.rand(3)
    assert torch.equal(torch.cat([first, second]), torch.rand(6, generator=torch.Generator().manual_seed(0)))


def test_a_generator_that_is_given_is_used(generator: torch.Generator) -> None:
    own = torch.Generator().manual_seed(5)
    before = generator.get_state()
    with draw_from(generator):
        drawn_normal = torch.empty(3).normal_(generator=own)
        drawn_poisson = torch.poisson(torch.full((3,), 9.0), own)
        drawn_positional = torch.binomial(torch.full((3,), 9.0), torch.full((3,), 0.5), own)
    again = torch.Generator().manual_seed(5)
    assert torch.equal(drawn_normal, torch.empty(3).normal_(generator=again))
    assert torch.equal(drawn_poisson, torch.poisson(torch.full((3,), 9.0), again))
    assert torch.equal(drawn_positional, torch.binomial(torch.full((3,), 9.0), torch.full((3,), 0.5), again))
    assert torch.equal(generator.get_state(), before)


def test_draws_after_the_block_are_global_again(generator: torch.Generator) -> None:
    state = torch.get_rng_state()
    with draw_from(generator):
        torch.rand(3)
    drawn_outside = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(drawn_outside, torch.rand(3))
    torch.set_rng_state(state)


def test_an_operation_that_takes_no_generator_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="native_dropout.* is random and takes no generator"), draw_from(generator):
        torch.native_dropout(torch.ones(3), 0.5, True)


def test_operations_without_chance_are_left_alone(generator: torch.Generator) -> None:
    before = generator.get_state()
    with draw_from(generator):
        assert F.dropout(torch.ones(3), 0.5, training=False).tolist() == [1, 1, 1]
        assert nn.init.ones_(torch.empty(2, 2)).sum() == 4
    assert torch.equal(generator.get_state(), before)
