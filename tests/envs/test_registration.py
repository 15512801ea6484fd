"""The single environment, and the name under which Gymnasium makes both."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

from morphogen.control import Op
from morphogen.envs import GrowthEnv, GrowthVectorEnv
from morphogen.envs.masks import sample_choices
from morphogen.envs.registration import ENV_ID, register
from morphogen.errors import SlotError

SHORT: dict[str, Any] = {"task": "digits", "total_steps": 6, "tick_steps": 2}
PRUNE = np.array([int(Op.PRUNE), 0, 0, 0, 0, 0, 0, 0])
WAIT = np.zeros(8, dtype=np.int64)


def drawn(info: dict[str, Any], generator: np.random.Generator) -> Any:
    return sample_choices({head: mask[None] for head, mask in info["action_mask"].items()}, generator)[0]


def test_the_single_environment_passes_gymnasiums_checker_without_a_warning() -> None:
    env = gym.make(ENV_ID, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()


def test_gymnasium_makes_both() -> None:
    register()  # once more
    single, vector = gym.make(ENV_ID, **SHORT), gym.make_vec(ENV_ID, num_envs=2, **SHORT)
    assert isinstance(single.unwrapped, GrowthEnv) and isinstance(vector, GrowthVectorEnv)
    assert vector.num_envs == 2 and vector.config.total_steps == 6 and vector.task.name == "digits"
    assert vector.spec is not None and vector.spec.id == ENV_ID
    single.close()
    vector.close()


def test_the_name_alone_is_enough_for_gymnasium() -> None:
    """In a process that has imported nothing of morphogen."""
    code = f"import gymnasium; print(gymnasium.make_vec('morphogen.envs:{ENV_ID}', num_envs=2, task='digits'))"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == f"GrowthVectorEnv({ENV_ID}, num_envs=2)", found.stderr


def test_a_setting_that_is_not_one() -> None:
    with pytest.raises(ValueError, match="total_step"):
        gym.make_vec(ENV_ID, num_envs=2, task="digits", total_step=6)


def test_the_single_environment_plays_what_the_vector_environment_plays() -> None:
    """Through two episodes and into a third: observations, rewards, masks and results, bit for bit."""
    single, vector = GrowthEnv(**SHORT), GrowthVectorEnv(num_envs=1, **SHORT)
    observation, info = single.reset(seed=7)
    expected_1D, expected = vector.reset(seed=7)
    generator, episodes = np.random.default_rng(0), 0
    for _ in range(7):
        np.testing.assert_array_equal(observation, expected_1D[0])
        for head, mask in expected["action_mask"].items():
            np.testing.assert_array_equal(info["action_mask"][head], mask[0])
        action = drawn(info, generator)
        observation, reward, terminated, truncated, info = single.step(action)
        expected_1D, reward_1, terminated_1, _, expected = vector.step(action[None])
        assert (reward, terminated, truncated) == (reward_1[0], terminated_1[0], False)
        assert info["reward_terms"] == {name: paid[0] for name, paid in expected["reward_terms"].items()}
        if terminated:
            np.testing.assert_array_equal(observation, expected["final_obs"][0])
            assert info["final_info"]["return"] == expected["final_info"]["return"][0]
            assert info["final_info"].keys() == {name for name in expected["final_info"] if not name.startswith("_")}
            observation, info = single.reset()
            episodes += 1
    assert episodes == 2
    single.close()
    vector.close()


def test_gymnasiums_own_vector_environments_can_hold_it() -> None:
    """Next-step autoreset asks for an action after the end: there WAIT is possible, and nothing else."""
    env = gym.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync", **SHORT)
    plain = GrowthVectorEnv(num_envs=2, **SHORT)
    _, info = env.reset(seed=3)
    plain.reset(seed=3)
    generator = np.random.default_rng(0)
    for step in range(5):
        assert info["action_mask"]["op"][:, 0].all()
        assert (info["action_mask"]["op"].sum(1) == 1).all() == (step == 3)
        actions = sample_choices(info["action_mask"], generator)
        observation, *_, info = env.step(actions)
        if step == 2:
            np.testing.assert_array_equal(observation, np.stack(plain.step(actions)[4]["final_obs"]))
        elif step != 3:
            np.testing.assert_array_equal(observation, plain.step(actions)[0])
    env.close()
    plain.close()


def test_a_masked_action_waits_and_says_so() -> None:
    env, waits = GrowthEnv(**SHORT), GrowthEnv(**SHORT)
    env.reset(seed=1), waits.reset(seed=1)
    found, expected = env.step(PRUNE), waits.step(WAIT)
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1:4] == expected[1:4] and found[4]["was_masked"] and not expected[4]["was_masked"]
    found[4]["was_masked"] = False
    assert data_equivalence(found[4], expected[4], exact=True)


def test_a_masked_action_raises_where_that_is_asked_for() -> None:
    env = GrowthEnv(invalid_actions="error", **SHORT)
    env.reset(seed=1)
    with pytest.raises(SlotError, match="`action_mask`"):
        env.step(PRUNE)
    assert not env.step(WAIT)[4]["was_masked"]


def test_resets() -> None:
    env = GrowthEnv(**SHORT)
    first, _ = env.reset(seed=1)
    second, _ = env.reset()
    assert (first != second).any()
    np.testing.assert_array_equal(env.reset(seed=1)[0], first)
    np.testing.assert_array_equal(env.reset()[0], second)
    np.testing.assert_array_equal(env.reset(seed=1, options={})[0], first)
    env.close()
    env.close()


def test_a_fault_ends_the_episode_it_was_put_into_and_no_other() -> None:
    env = GrowthEnv(**SHORT | {"total_steps": 20})
    env.reset(seed=1, options={"inject": ["nan_weight@3"]})
    ticks, terminated, info = 0, False, dict[str, Any]()
    while not terminated:
        observation, reward, terminated, _, info = env.step(WAIT)
        assert env.observation_space.contains(observation) and np.isfinite(reward)
        ticks += 1
    assert ticks < 10 and info["final_info"]["rolled_back"] == 1.0 and info["reward_terms"]["fault"] < 0
    env.reset()
    assert [env.step(WAIT)[2] for _ in range(10)] == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("action", "words"),
    [(WAIT[:7], "`actions` must be of shape"), (WAIT + 100, "`actions` must be of shape"), (WAIT - 1, "`actions` must be")],
)
def test_what_is_no_action(action: Any, words: str) -> None:
    env = GrowthEnv(**SHORT)
    with pytest.raises(ValueError, match="must be reset before `step`"):
        env.step(WAIT)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        env.step(action)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`invalid_actions` must be 'wait' or 'error', got 'eror'. Did you mean 'error'?"):
        GrowthEnv(invalid_actions="eror", **SHORT)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`render_mode` must be None, got 'human'"):
        GrowthEnv(render_mode="human", **SHORT)  # pyright: ignore[reportArgumentType]
    env = GrowthEnv(**SHORT)
    with pytest.raises(ValueError, match="`options` must have no key but `inject`, got 'injct'"):
        env.reset(options={"injct": ["nan_loss@2"]})


def test_no_step_follows_on_the_end_of_an_episode() -> None:
    env = GrowthEnv(**SHORT)
    env.reset(seed=0)
    assert [env.step(WAIT)[2] for _ in range(3)] == [False, False, True]
    with pytest.raises(ValueError, match="Call reset first, and after each episode"):
        env.step(WAIT)
