"""One list of actions with an exact mask. Needs no extra but where an agent of sb3-contrib is trained."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from morphogen.control import Op
from morphogen.envs import GrowthEnv, GrowthVectorEnv
from morphogen.envs.masks import action_masks
from morphogen.errors import SlotError
from morphogen.integrations.maskable import FlatActions, MaskableGrowthEnv
from morphogen.testing import LENIENT

SHORT: dict[str, Any] = {"task": "digits", "total_steps": 16, "tick_steps": 1, "growth": LENIENT.replace(embargo_ticks=0)}


def test_the_list_holds_every_op_everywhere_once() -> None:
    menu = GrowthVectorEnv("digits").menu
    actions = FlatActions(menu)
    assert len(actions) == len(set(actions.names)) == len({tuple(row) for row in actions.choices_KH}) == 1 + 2 * (4 + 3 + 3)
    meanings = [menu.action(actions.choices(place)) for place in range(len(actions))]
    assert actions.names[0] == "wait" and meanings[0].op is Op.WAIT
    for name, action in zip(actions.names[1:], meanings[1:], strict=True):
        assert action.slot is not None and action.slot in name.split()
        assert {Op.SET_ALPHA_TARGET: "set"}.get(action.op, action.op.name.lower()) == name.split()[0]
        assert action.sowing is None or (name.endswith(action.sowing.blueprint) and action.sowing.blend_ticks == 3)
        assert action.op is not Op.SET_ALPHA_TARGET or name.endswith(f" {action.alpha_target:g}")
    assert {action.op for action in meanings} == set(Op)


def test_the_mask_is_exact_through_a_run() -> None:
    """Each entry that is masked is refused, each that is not is executed: on the real environment, tick by tick."""
    env, generator, ops = MaskableGrowthEnv(**SHORT), np.random.default_rng(0), set()
    env.reset(seed=0)
    done = False
    while not done:
        mask = env.action_masks()
        assert mask[0] and mask.shape == (env.action_space.n,)
        for place in np.flatnonzero(~mask):
            with pytest.raises(SlotError):
                env.step(place)
        entries = np.flatnonzero(mask)
        weights = np.array([0.3 if env.actions.names[place].startswith(("wait", "prune", "set")) else 2.0 for place in entries])
        action = generator.choice(entries, p=weights / weights.sum())
        ops.add(int(env.actions.choices_KH[action, 0]))
        _, _, done, _, info = env.step(action)
        np.testing.assert_array_equal(info["action_mask"], env.action_masks())
    assert ops >= {int(Op.GERMINATE), int(Op.ADVANCE), int(Op.FOSSILIZE)}
    env.close()


def test_masks_of_several_environments_at_once() -> None:
    env = GrowthVectorEnv("digits", num_envs=3, total_steps=4, tick_steps=2)
    _, info = env.reset(seed=0)
    actions = FlatActions(env.menu)
    germinate = np.array([[int(Op.GERMINATE), 0, 0, 0, 0, 0, 0, 0], [0] * 8, [int(Op.GERMINATE), 1, 1, 0, 0, 0, 0, 0]])
    *_, info = env.step(germinate)
    masks_NK = actions.masks(info["action_mask"])
    for row in range(3):
        own = action_masks(env.frames.rows(slice(row, row + 1)), env.menu)
        np.testing.assert_array_equal(masks_NK[row], actions.masks(own)[0])
    assert masks_NK[0, actions.names.index("advance block1")] and not masks_NK[1, actions.names.index("advance block1")]
    assert masks_NK[2, actions.names.index("prune block2")] and not masks_NK[0, actions.names.index("prune block2")]
    env.close()


def test_it_plays_what_the_growth_environment_plays() -> None:
    settings = SHORT | {"total_steps": 4}
    flat, plain = MaskableGrowthEnv(**settings), GrowthEnv(**settings)
    np.testing.assert_array_equal(flat.reset(seed=2)[0], plain.reset(seed=2)[0])
    for action in (1, 0, 0, 0):
        found, expected = flat.step(np.int64(action)), plain.step(flat.actions.choices(action))
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:4] == expected[1:4]
    np.testing.assert_array_equal(flat.reset()[0], plain.reset()[0])


def test_gymnasiums_checker_finds_nothing_but_what_masks_forbid() -> None:
    """The checker draws without a mask; WAIT alone is drawn for it."""
    env = MaskableGrowthEnv(**SHORT)
    env.action_space.sample = lambda *args, **kwargs: np.int64(0)  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*not having a spec.*")
        check_env(env)


def test_misuse() -> None:
    env = MaskableGrowthEnv(**SHORT)
    with pytest.raises(ValueError, match="must be reset before it has a mask"):
        env.action_masks()
    env.reset(seed=0)
    for action in (-1, 21):
        with pytest.raises(ValueError, match=rf"`action` must be in \[0, 21\), got {action}"):
            env.step(np.int64(action))
    mask = env.action_masks()
    mask[:] = False
    assert env.action_masks().any()


def test_maskable_ppo_trains_on_it() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    envs = vec_env.DummyVecEnv([lambda: MaskableGrowthEnv(**SHORT | {"total_steps": 4})] * 2)
    envs.seed(0)
    agent = contrib.MaskablePPO("MlpPolicy", envs, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = agent.policy.action_net.weight.detach().clone()
    assert agent.learn(32).num_timesteps == 32  # a masked action would have been a SlotError
    assert (agent.policy.action_net.weight != before).any()
