"""The codec of nested state: exact round trips through JSON text, no aliasing, clear refusals."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from morphogen.state import trees

KEYS = st.one_of(st.text(max_size=3), st.integers(), st.sampled_from(["$", "a.b", "a", "b", "0", "key0"]))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.integers(0, 9).map(lambda n: torch.arange(n, dtype=torch.float32) / 3),
    st.integers(0, 9).map(lambda n: torch.tensor(n, dtype=torch.bfloat16)),
    st.integers(0, 9).map(lambda n: np.arange(n).reshape(1, n)),
    st.sampled_from([np.float32(0.1), np.float64("nan"), np.int8(3), np.bool_(True), np.complex64(1 + 2j)]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(lambda items: collections.deque(items, maxlen=5)),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


def round_trip(tree: object) -> Any:
    tensors: trees.TensorTable = {}
    text = json.dumps(trees.encode(tree, tensors, "x"), allow_nan=False)
    return trees.decode(json.loads(text), tensors)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_round_trip_is_exact(kit: Any, tree: Any) -> None:
    assert kit.same(round_trip(tree), tree)


@pytest.mark.parametrize(
    "tree",
    [
        collections.Counter({2: 3, 5: 1}),
        collections.deque([1, 2], maxlen=None),
        (1, (2, [3, ()])),
        {(1, 2): {"$": {"$": "tensor", "name": "x"}}},
        {"$": "tensor", "name": "elsewhere"},
        float("-inf"),
        2**200,
        np.array(3.5),
        np.zeros((0, 3), np.int16),
        np.array([True, False]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "c"]),
        np.array([1, 2], dtype=">i4"),
        np.longdouble(0.1),
        np.datetime64("2026-01-02"),
        torch.zeros(0, 3),
        torch.tensor(True),
        torch.tensor([1 + 2j]),
        torch.arange(6).reshape(2, 3).t(),
    ],
    ids=repr,
)
def test_unusual_values_round_trip(kit: Any, tree: Any) -> None:
    assert kit.same(round_trip(tree), tree)


def test_keys_that_spell_the_same_path_keep_their_own_tensors() -> None:
    tree = {"a.b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0), "b.0": torch.tensor(3.0)}, "c": [torch.tensor(4.0)]}
    back = round_trip({**tree, "c.0": torch.tensor(5.0)})
    assert [float(back["a.b"]), float(back["a"]["b"]), float(back["a"]["b.0"])] == [1.0, 2.0, 3.0]
    assert [float(back["c"][0]), float(back["c.0"])] == [4.0, 5.0]


def test_nothing_is_shared_on_the_way_in_or_out() -> None:
    source, array, table = torch.ones(2), np.ones(2), {}
    data = trees.encode({"t": source, "a": array}, table, "x")
    first, second = trees.decode(data, table), trees.decode(data, table)
    source.zero_()
    array[:] = 0
    first["t"].add_(5)
    first["a"] += 5
    assert second["t"].tolist() == [1, 1]
    assert second["a"].tolist() == [1, 1]
    assert trees.decode(data, table)["t"].tolist() == [1, 1]


def test_a_gradient_is_not_carried_along() -> None:
    assert not round_trip(torch.nn.Parameter(torch.ones(2))).requires_grad


@pytest.mark.parametrize("bad", [object(), lambda: 0, {1, 2}, np.array([object()]), torch.device("cpu"), 1j])
def test_what_is_not_data_is_refused_where_it_is(bad: object) -> None:
    with pytest.raises(TypeError, match=r"`x\.a\.1` must be"):
        trees.encode({"a": [0, bad]}, {}, "x")


def test_arrays_with_named_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="`x` must be an array of numbers"):
        trees.encode(np.zeros(2, dtype=[("a", "i4"), ("b", "f4")]), {}, "x")


def test_damaged_data_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tag 'code'"):
        trees.decode({"$": "code", "items": []}, {})
    with pytest.raises(ValueError, match="names the tensor `x`"):
        trees.decode({"$": "tensor", "name": "x"}, {})
