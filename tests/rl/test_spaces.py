"""Observations become rows of float32: the layout, what is refused, and who is named for a bad one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import Space, spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector.utils import concatenate, create_empty_array
from hypothesis import given, settings, strategies as st

from morphogen.errors import EnvironmentFault
from morphogen.rl.spaces import ObservationEncoder

SIMPLE: list[Space[Any]] = [
    spaces.Box(-2, 2, (3,)),
    spaces.Box(-2, 2, (2, 3), dtype=np.float64),
    spaces.Box(0, 255, (2, 2), dtype=np.int16),
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [-2, 5]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
]
NESTED = st.recursive(
    st.sampled_from(SIMPLE),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1).map(spaces.Dict),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: spaces.Tuple(parts)),
    ),
    max_leaves=5,
)


def batch_of(space: Space[Any], items: list[Any]) -> Any:
    return concatenate(space, items, create_empty_array(space, n=len(items)))


@settings(max_examples=60, deadline=None)
@given(space=NESTED, seed=st.integers(0, 1000), num_envs=st.integers(1, 4))
def test_a_row_is_gymnasiums_flattened_observation(space: Space[Any], seed: int, num_envs: int) -> None:
    space.seed(seed)
    items = [space.sample() for _ in range(num_envs)]
    encoder = ObservationEncoder(space)
    rows = encoder.encode(batch_of(space, items))
    expected = np.stack([np.asarray(flatten(space, item), dtype=np.float32) for item in items])
    assert rows.dtype == np.float32 and rows.flags.c_contiguous and encoder.width == rows.shape[1] == len(encoder.normalizable)
    assert np.array_equal(rows, expected)
    assert np.array_equal(encoder.encode_rows(items, range(num_envs)), expected)


def test_only_numbers_on_a_scale_of_their_own_are_to_be_normalised() -> None:
    space = spaces.Dict(
        a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3), c=spaces.MultiBinary(2), d=spaces.MultiDiscrete([2, 2])
    )
    assert ObservationEncoder(space).normalizable.tolist() == [True] * 2 + [False] * 9


def test_the_action_mask_is_no_observation() -> None:
    plain, masked = (
        spaces.Dict(x=spaces.Box(-1, 1, (2,))),
        spaces.Dict(x=spaces.Box(-1, 1, (2,)), action_mask=spaces.MultiBinary(5)),
    )
    assert not ObservationEncoder(plain).has_mask
    encoder = ObservationEncoder(masked)
    assert encoder.has_mask and encoder.width == 2
    nested = spaces.Dict(inner=masked)
    assert not ObservationEncoder(nested).has_mask and ObservationEncoder(nested).width == 7
    with pytest.raises(ValueError, match="must hold at least one number"):
        ObservationEncoder(spaces.Dict(action_mask=spaces.MultiBinary(5)))


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (3,), dtype=np.float64), spaces.Box(0, 9, (3, 1))]
)
def test_rows_are_copies(space: spaces.Box) -> None:
    batch = np.ones((2, *space.shape), dtype=space.dtype)
    rows = ObservationEncoder(space).encode(batch)
    batch[:] = 7
    assert (rows == 1).all()


@pytest.mark.parametrize(
    ("shape", "image_shape"), [((6, 5, 3), (3, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((4, 4, 4), (4, 4, 4)), ((6, 2, 5), None)]
)
def test_a_row_of_an_image_has_its_channels_first(shape: tuple[int, ...], image_shape: tuple[int, ...] | None) -> None:
    space = spaces.Box(0, 255, shape, dtype=np.uint8)
    for whole, wrap in ((space, lambda x: x), (spaces.Dict(image=space), lambda x: {"image": x})):
        encoder = ObservationEncoder(whole)
        assert encoder.image_shape == image_shape
        batch = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
        rows = encoder.encode(wrap(batch))
        expected = batch if image_shape is None or shape == image_shape != (4, 4, 4) else batch.transpose(0, 3, 1, 2)
        assert np.array_equal(rows, expected.reshape(2, -1))
        assert np.array_equal(encoder.encode_rows([wrap(image) for image in batch], [0, 1]), rows)
    assert ObservationEncoder(spaces.Tuple([space, space])).image_shape is None
    assert ObservationEncoder(spaces.Box(0, 1, shape)).image_shape is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_that_is_not_finite_names_environment_and_entry(bad: float, dtype: type) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (4,), dtype=dtype))
    batch = np.full((3, 4), 1e30, dtype=dtype)
    encoder.encode(batch)  # large is not infinite
    batch[1, 2] = bad
    with pytest.raises(EnvironmentFault, match=r"environment 1: entry 2 of its observation must be finite") as caught:
        encoder.encode(batch)
    assert caught.value.env_index == 1
    with pytest.raises(EnvironmentFault, match="environment 6: entry 2"):
        encoder.encode_rows([batch[1]], [6])


def test_what_overflows_float32_is_not_finite_and_nested_entries_are_named() -> None:
    encoder = ObservationEncoder(spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple([spaces.Box(-1, 1, (2,), dtype=np.float64)])))
    with pytest.raises(EnvironmentFault, match=r"environment 1: entry 0 of its observation\['b'\]\[0\] .* got inf"):
        encoder.encode({"a": np.array([0, 1]), "b": (np.array([[0, 0], [1e300, 0]]),)})


@pytest.mark.parametrize(
    ("space", "batch", "match"),
    [
        (spaces.Discrete(3, start=1), [1, 0], r"environment 1: `observation` must be in 1 \.\. 3 at entry 0, got 0"),
        (spaces.MultiDiscrete([2, 3]), [[0, 3], [0, 0]], r"environment 0: .* in 0 \.\. 2 at entry 1, got 3"),
        (spaces.MultiBinary(2), [[0, 1], [0, 2]], r"environment 1: .* must be 0 or 1, got 2 at entry 1"),
        (spaces.Box(-1, 1, (2,)), [[0.0], [0.0]], r"must have the shape \(2,\) for each environment, got \(2, 1\)"),
        (spaces.Box(-1, 1, (2, 2)), [[0.0, 0.0]], r"must have the shape \(2, 2\)"),
        (spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2)), {"a": [0]}, r"`observation\['b'\]` must be in each"),
        (spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2)), {"a": [0], "b": [0, 1]}, r"observation\['b'\]` must have"),
    ],
)
def test_what_the_space_does_not_hold_is_refused(space: Space[Any], batch: Any, match: str) -> None:
    with pytest.raises(EnvironmentFault, match=match):
        ObservationEncoder(space).encode(batch if isinstance(batch, dict) else np.array(batch))


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Dict(a=spaces.Text(3))])
def test_other_spaces_are_refused_by_name(space: Space[Any]) -> None:
    with pytest.raises(TypeError, match=r"made of Box, Discrete.*got (Text|Sequence)"):
        ObservationEncoder(space)
