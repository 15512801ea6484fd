from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete, MultiDiscrete

from morphogen.rl.actions import ActionConfig, ActionDistribution, HeadConfig, make

SIZES = (3, 2, 4)


@pytest.fixture
def growth(growth_heads: Any) -> ActionDistribution:
    return make(MultiDiscrete(SIZES), ActionConfig(heads=growth_heads))


def test_a_dict_is_laid_out_as_the_tables_are(growth: ActionDistribution) -> None:
    rng = np.random.default_rng(0)
    value = {"op": rng.random((5, 3)) < 0.5, "blueprint": rng.random((5, 3, 2, 4)) < 0.5}
    flat = growth.flatten_mask(value, 5)
    assert flat.dtype == bool and flat.shape == (5, growth.mask_width) == (5, 3 + 6 + 24)
    assert (flat[:, :3] == value["op"]).all()
    assert flat[:, 3:9].all(), "a head that is missing has everything allowed"
    assert (flat[:, 9:].reshape(5, 3, 2, 4) == value["blueprint"]).all()
    assert (growth.flatten_mask(flat, 5) == flat).all()


def test_integers_and_lists_are_taken() -> None:
    actions = make(Discrete(3))
    assert actions.flatten_mask(np.array([[0, 1, 1]], np.int8), 1).tolist() == [[False, True, True]]
    assert actions.flatten_mask([[True, False, True]], 1).tolist() == [[True, False, True]]
    assert actions.flatten_mask({"action": np.array([[1, 0, 0]])}, 1).tolist() == [[True, False, False]]


def test_independent_heads_take_the_concatenation() -> None:
    actions = make(MultiDiscrete([2, 3]))
    flat = actions.flatten_mask(np.array([[1, 0, 0, 1, 1]]), 1)
    drawn, _ = actions.sample(torch.zeros(1, 5), actions.noise((1,), torch.Generator()), torch.from_numpy(flat))
    assert drawn[0, 0] == 0 and drawn[0, 1] > 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"op": np.ones((5, 4), bool)}, r"head `op` must have shape \[5, 3\] \(environments, op\), got \[5, 4\]"),
        ({"slot": np.ones((5, 2), bool)}, r"head `slot` must have shape \[5, 3, 2\] \(environments, op, slot\), got \[5, 2\]"),
        ({"tempo": np.ones((5, 2), bool)}, "must name heads among op, slot, blueprint, got tempo"),
        (np.ones((4, 33), bool), r"must have shape \[5, 33\] \(environments, 3 \+ 3x2 \+ 3x2x4\), got \[4, 33\]"),
        (np.ones((5, 9), bool), r"must have shape \[5, 33\]"),
        ({"op": np.ones((5, 3))}, "head `op` must hold bools, or integers 0 and 1, got float64"),
        (np.full((5, 33), 2), "must hold bools, or integers 0 and 1, got int64"),
        (np.full((5, 33), None), "must hold bools, or integers 0 and 1, got object"),
    ],
)
def test_a_wrong_mask_is_refused_naming_head_and_shapes(growth: ActionDistribution, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growth.flatten_mask(value, 5)


def test_an_all_false_mask_names_the_environment() -> None:
    actions = make(Discrete(3))
    mask = np.ones((4, 3), bool)
    actions.check_mask(mask)
    mask[2] = False
    with pytest.raises(ValueError, match="action mask of environment 2 must allow at least one choice of head `action`, got"):
        actions.check_mask(mask)


def test_the_head_and_the_choices_before_it_are_named(growth: ActionDistribution) -> None:
    value = {"blueprint": np.ones((5, 3, 2, 4), bool)}
    value["blueprint"][3, 1, 0] = False
    with pytest.raises(ValueError, match="environment 3 must allow at least one choice of head `blueprint` after op 1, slot 0"):
        growth.check_mask(growth.flatten_mask(value, 5))


def test_rows_that_cannot_be_reached_may_be_empty(growth: ActionDistribution) -> None:
    value = {"slot": np.ones((5, 3, 2), bool), "blueprint": np.ones((5, 3, 2, 4), bool)}
    value["slot"][3, 1, 0] = False
    value["blueprint"][3, 1, 0] = False  # slot 0 is forbidden after op 1
    value["blueprint"][:, 0] = value["blueprint"][:, 2] = value["slot"][:, 0] = False  # irrelevant there
    growth.check_mask(growth.flatten_mask(value, 5))
    value["slot"][3, 2] = False
    with pytest.raises(ValueError, match="environment 3 must allow at least one choice of head `slot` after op 2, got"):
        growth.check_mask(growth.flatten_mask(value, 5))
    without_op_2 = value | {"op": np.tile([True, True, False], (5, 1))}
    growth.check_mask(growth.flatten_mask(without_op_2, 5))


def test_a_row_reached_through_an_irrelevant_heads_filler_is_needed() -> None:
    heads = (
        HeadConfig(name="a"),
        HeadConfig(name="b", relevant_when={"a": (1,)}),
        HeadConfig(name="c", given=("b",)),
    )
    actions = make(MultiDiscrete([2, 3, 2]), ActionConfig(heads=heads))
    value = {
        "a": np.array([[True, False]]),
        "b": np.array([[False, True, True]]),
        "c": np.array([[[False, False], [True, True], [False, False]]]),
    }
    actions.check_mask(actions.flatten_mask(value, 1))
    value["c"] = np.array([[[True, True], [False, False], [True, True]]])
    with pytest.raises(ValueError, match="head `c` after b 1, got all False"):
        actions.check_mask(actions.flatten_mask(value, 1))
