from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space

from morphogen.rl.actions import (
    ActionConfig,
    FactoredDistribution,
    GaussianDistribution,
    HeadConfig,
    SquashedGaussianDistribution,
    make,
)
from morphogen.rl.policy import ActorCritic, PolicyConfig

BOX = Box(-1.0, 1.0, (2, 3))


@pytest.mark.parametrize(
    ("space", "config", "kind", "shapes"),
    [
        (Discrete(5), ActionConfig(), FactoredDistribution, (5, 1, 5, ())),
        (MultiDiscrete([3]), ActionConfig(), FactoredDistribution, (3, 1, 3, (1,))),
        (MultiDiscrete([[3, 2], [4, 2]]), ActionConfig(), FactoredDistribution, (11, 4, 11, (4,))),
        (BOX, ActionConfig(), GaussianDistribution, (6, 1, 0, (6,))),
        (BOX, ActionConfig(squash=True), SquashedGaussianDistribution, (6, 1, 0, (6,))),
        (Box(-1.0, 1.0, ()), ActionConfig(), GaussianDistribution, (1, 1, 0, (1,))),
    ],
)
def test_the_space_chooses_the_distribution(
    space: Space[Any], config: ActionConfig, kind: type, shapes: tuple[Any, ...]
) -> None:
    actions = make(space, config)
    assert type(actions) is kind
    assert (actions.num_outputs, actions.num_heads, actions.mask_width, actions.action_shape) == shapes
    outputs = torch.zeros(7, actions.num_outputs)
    drawn, log_prob_BH = actions.sample(outputs, actions.noise((7,), torch.Generator()))
    assert drawn.shape == (7, *actions.action_shape) and drawn.dtype == actions.action_dtype
    assert log_prob_BH.shape == actions.evaluate(outputs, drawn).entropy_BH.shape == (7, actions.num_heads)
    assert actions.evaluate(outputs, drawn).entropy_B.shape == actions.kl(outputs, outputs).shape == (7,)
    values = actions.to_env(drawn.detach())
    assert values.shape == (7, *(space.shape or ()))
    assert values.dtype == space.dtype
    assert all(space.contains(values[index, ...]) for index in range(7))


@pytest.mark.parametrize("space", [Discrete(3, start=-2), MultiDiscrete([2, 3], start=[5, -1])])
def test_choices_start_where_the_space_does(space: Any) -> None:
    actions = make(space)
    zeros = torch.zeros(2, *actions.action_shape, dtype=torch.int64)
    assert (actions.to_env(zeros) == space.start).all()
    assert (zeros == 0).all()


def test_what_the_environment_gets_shares_no_memory_with_what_is_stored() -> None:
    for space, dtype in ((Discrete(3), torch.int64), (BOX, torch.float32)):
        actions = make(space)
        stored = torch.zeros(2, *actions.action_shape, dtype=dtype)
        actions.to_env(stored)[:] = 1
        assert (stored == 0).all()


@pytest.mark.parametrize(
    ("space", "config", "message"),
    [
        (BOX, {"heads": (HeadConfig(name="a"),)}, "`heads` must be None for Box"),
        (BOX, {"exploration": 0.1}, "`exploration` must be 0.0 for Box"),
        (Discrete(3), {"squash": True}, "`squash` must be False for Discrete"),
        (Discrete(3), {"log_std_init": -1.0}, "`log_std_init` must be 0.0 for Discrete"),
        (Box(-np.inf, np.inf, (2,)), {"squash": True}, "`squash` must be False for an unbounded box"),
        (Box(np.array([0.0, -np.inf]), np.ones(2), dtype=np.float64), {"squash": True}, "unbounded box"),
        (MultiDiscrete([2, 2]), {"heads": (HeadConfig(name="a"),)}, "one entry for each of the 2 choices .* got 1: a"),
        (MultiDiscrete([2, 2]), {"heads": (HeadConfig(name="a"), HeadConfig(name="a"))}, "different names, got a, a"),
    ],
)
def test_a_setting_that_does_not_fit_the_space_is_refused(space: Space[Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(space, ActionConfig(**config))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"given": ("b",)}, "`given` of head `b` must name heads before it, each once, got b. Heads before it: a;"),
        ({"given": ("a", "a")}, "each once, got a, a"),
        ({"relevant_when": {"c": (0,)}}, "`relevant_when` of head `b` must name heads before it, each once, got c"),
        ({"relevant_when": {"a": (3,)}}, r"must list some, not all, of the choices 0 to 2 of `a`, got \(3,\)"),
        ({"relevant_when": {"a": ()}}, "must list some"),
        ({"relevant_when": {"a": (0, 1, 2)}}, "must list some, not all"),
    ],
)
def test_a_wrong_link_is_refused(second: dict[str, Any], message: str) -> None:
    heads = (HeadConfig(name="a"), HeadConfig(name="b", **second), HeadConfig(name="c"))
    with pytest.raises(ValueError, match=message):
        make(MultiDiscrete([3, 2, 2]), ActionConfig(heads=heads))


def test_a_head_that_nothing_makes_relevant_is_refused() -> None:
    heads = (
        HeadConfig(name="a"),
        HeadConfig(name="b", relevant_when={"a": (0,)}),
        HeadConfig(name="c", relevant_when={"a": (1,), "b": (0,)}),
    )
    with pytest.raises(ValueError, match="`relevant_when` of head `c` must be possible together"):
        make(MultiDiscrete([2, 2, 2]), ActionConfig(heads=heads))


def test_a_table_that_is_too_large_is_refused() -> None:
    heads = tuple(HeadConfig(name=f"h{place}", given=tuple(f"h{before}" for before in range(place))) for place in range(5))
    with pytest.raises(
        ValueError, match=r"head `h4` must have at most 65,536 combinations .* got 100,000. Let it be given fewer"
    ):
        make(MultiDiscrete([10] * 5), ActionConfig(heads=heads))


@pytest.mark.parametrize("space", [MultiBinary(3), Box(0, 255, (2,), np.uint8)])
def test_an_unsupported_space_is_named(space: Space[Any]) -> None:
    with pytest.raises(TypeError, match="must be Discrete, MultiDiscrete or a Box of floats, got (MultiBinary|Box)"):
        make(space)


def test_exploration_is_a_share() -> None:
    with pytest.raises(ValueError, match="`exploration` must be less than 1"):
        ActionConfig(exploration=1.0)


def test_an_untrained_policy_starts_from_the_initial_logits_whatever_the_heads_before() -> None:
    heads = (
        HeadConfig(name="op", initial_logits=(0.0, 2.0)),
        HeadConfig(name="slot", given=("op",), initial_logits=(1.0, 0.0, -1.0)),
    )
    distribution = make(MultiDiscrete([2, 3]), ActionConfig(heads=heads))
    assert distribution.initial_outputs().tolist() == [0.0, 2.0, 1.0, 0.0, -1.0, 1.0, 0.0, -1.0]
    policy = ActorCritic(
        PolicyConfig(hidden=(4,)),
        observation_width=3,
        image_shape=None,
        distribution=distribution,
        num_critics=1,
        num_critic_outputs=1,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(policy.actor.bias, distribution.initial_outputs())


def test_initial_logits_of_another_number_than_the_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="`initial_logits` of head `op` must have one number for each of its 3 choices, got 2"):
        make(
            MultiDiscrete([3, 3]), ActionConfig(heads=(HeadConfig(name="op", initial_logits=(0.0, 1.0)), HeadConfig(name="b")))
        )
