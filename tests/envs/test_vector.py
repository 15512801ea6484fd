"""An environment's trajectory depends on task, seed and actions alone; bad settings are refused before anything is built."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from morphogen import tasks
from morphogen.envs import GrowthVectorEnv
from morphogen.envs.choices import action_config
from morphogen.errors import SlotError
from morphogen.rl import PPO, PPOConfig
from morphogen.tasks.objectives import Classification


def test_an_environment_does_not_depend_on_how_many_there_are_nor_on_its_place(begin: Any, assert_same: Any) -> None:
    alone = begin(1, seeds=[5]).play(5)
    among = begin(3, seeds=[9, 7, 5]).play(5)
    assert_same(alone, among, 0, 2)
    assert not np.array_equal(among["observation"][:, 0], among["observation"][:, 2])
    assert alone["terminated"].tolist() == [[False], [False], [True], [False], [False]]


def test_networks_are_trained_by_one_thread_as_in_workers() -> None:
    seen: set[int] = set()

    class Objective(Classification):
        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return super().loss(outputs, targets)

    env = GrowthVectorEnv(dataclasses.replace(tasks.get("digits"), objective=Objective()), 1, total_steps=2, tick_steps=1)
    torch.set_num_threads(2)
    try:
        env.reset(seed=0)
        env.step(np.zeros((1, 8), int))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == {1}
    env.close()


def test_nothing_is_drawn_from_global_generators(begin: Any) -> None:
    before, of_python, of_numpy = torch.get_rng_state(), random.getstate(), str(np.random.get_state(legacy=False))
    begin(2).play(4)
    assert torch.equal(before, torch.get_rng_state())
    assert (of_python, of_numpy) == (random.getstate(), str(np.random.get_state(legacy=False)))


def test_reset_without_a_seed_begins_the_first_episodes_again(begin: Any) -> None:
    game = begin(2)
    first = game.env.frames.copy()
    game.play(4)
    game.env.reset()
    np.testing.assert_array_equal(game.env.frames.runs_NG, first.runs_NG)


def test_a_state_goes_on_in_every_bit(begin: Any, assert_same: Any) -> None:
    game = begin(2)
    game.play(4)  # in the second episode
    state = game.state_dict()
    expected = game.play(4)
    other = begin(2, seeds=[80, 81])
    other.play(1)
    other.load_state_dict(state)
    assert_same(expected, other.play(4))


def test_a_state_of_another_number_of_environments_is_refused(begin: Any) -> None:
    state = begin(1).env.state_dict()
    with pytest.raises(ValueError, match="`num_envs` must be 1"):
        begin(2).env.load_state_dict(state)


def test_a_masked_action_is_refused_with_its_place_and_nothing_happens(begin: Any) -> None:
    game = begin(2)
    before = game.env.frames.copy()
    with pytest.raises(SlotError, match="environment 1"):
        game.env.step(np.array([[0] * 8, [5] + [0] * 7]))
    np.testing.assert_array_equal(game.env.frames.runs_NG, before.runs_NG)
    game.play(1)


@pytest.mark.parametrize("actions", [np.zeros((1, 8), int), np.full((2, 8), 9), np.full((2, 8), -1)])
def test_actions_of_another_form_are_refused(begin: Any, actions: Any) -> None:
    with pytest.raises(ValueError, match="`actions` must be of shape"):
        begin(2).env.step(actions)


def test_nothing_can_be_done_before_a_reset() -> None:
    env = GrowthVectorEnv("digits", 1)
    for call in (lambda: env.step(np.zeros((1, 8), int)), env.state_dict):
        with pytest.raises(ValueError, match="nothing was reset yet"):
            call()
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "`num_envs` must be at least 1"),
        ({"task": "digit"}, "Did you mean 'digits'"),
        ({"executor": "proceses"}, "Did you mean 'processes'"),
        ({"reward": "shapd"}, "Did you mean '?shaped"),
        ({"tick_step": 3}, "Did you mean `tick_steps`"),
        ({"num_workers": 2}, '`num_workers` must be left out with the executor "inline"'),
        ({"worker_deadline_seconds": 2.0}, '`worker_deadline_seconds` must be left out with the executor "inline"'),
        ({"num_workers": 3, "executor": "processes"}, "`num_workers` must be at most num_envs, 2, got 3"),
        ({"slots": ("block1", "block2", "block3")}, "got 'block3'. Did you mean 'block"),
        ({"slots": ("block1", "block1")}, "each growth point once"),
        ({"num_slots": 1}, "`layout.num_slots` must be at least 2"),
        ({"device": "tpu"}, "`device` must be one of"),
        ({"device": "cuda:99"}, "`device` must"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_built(settings: dict[str, Any], message: str) -> None:
    built: list[str] = []
    task = dataclasses.replace(tasks.get("digits"), load=lambda: built.append("data"))
    given: dict[str, Any] = {"task": task, "num_envs": 2} | settings
    if settings.get("executor"):
        given["task"] = "digits"
    with pytest.raises(ValueError, match=message):
        GrowthVectorEnv(**given)
    assert not built


def test_an_own_task_is_for_the_inline_executor_alone() -> None:
    task = dataclasses.replace(tasks.get("digits"), batch_size=32)
    GrowthVectorEnv(task, 1).close()
    with pytest.raises(ValueError, match="an own one named 'digits'"):
        GrowthVectorEnv(task, 1, executor="processes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"injekt": {}}, "no key but `inject`"),
        ({"inject": {2: ["nan_input@0"]}}, r"in \[0, 2\), got 2"),
        ({"inject": {0: ["nan_inptu@0"]}}, "nan_input"),
        ({"inject": {0: ["nan_input"]}}, "KIND@STEP"),
        ({"inject": {0: ["nan_input@6"]}}, r"in \[0, 6\), got 'nan_input@6'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_built(options: dict[str, Any], message: str) -> None:
    task = dataclasses.replace(tasks.get("digits"), load=lambda: pytest.fail("data was loaded"))
    env = GrowthVectorEnv(task, 2, total_steps=6, tick_steps=2)
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options=options)
    with pytest.raises(ValueError, match="`seed` must hold 2"):
        env.reset(seed=[1, 2, 3])
    env.close()


def test_data_is_loaded_once() -> None:
    original, loads = tasks.get("digits"), []

    def load() -> Any:
        loads.append(1)
        return original.load()

    env = GrowthVectorEnv(dataclasses.replace(original, load=load), 2, total_steps=2, tick_steps=2)
    for _ in range(2):
        env.reset(seed=0)
        env.step(np.zeros((2, 8), int))
    assert len(loads) == 1
    env.close()


# -- under PPO -------------------------------------------------------------------------------------------------------


def _agent(env: GrowthVectorEnv) -> PPO:
    policy = {"hidden": (16,), "memory": "lstm", "memory_width": 8, "action_gain": 1.0}
    once = {"epochs": 1, "minibatch_size": 64}  # one minibatch of everything: its KL is that of rollout and update
    return PPO(env, PPOConfig(rollout_steps=4, policy=policy, action=action_config(), gamma=0.995, **once))


def test_a_recurrent_agent_saved_within_episodes_goes_on_in_every_bit(begin: Any, tmp_path: Path) -> None:
    agent = _agent(begin(2).env)
    agent.learn(8)  # four steps each: one into the second episode
    agent.save(tmp_path / "agent")
    agent.learn(8)
    again = PPO.load(tmp_path / "agent", begin(2, seeds=[50, 51]).env)
    again.learn(8)
    assert agent.env.frames.run("tick").tolist() != [0.0, 0.0]
    for name, parameter in agent.policy.state_dict().items():
        assert torch.equal(parameter, again.policy.state_dict()[name]), name
    np.testing.assert_array_equal(agent.env.frames.runs_NG, again.env.frames.runs_NG)
    np.testing.assert_array_equal(agent.env.frames.slots_NSR, again.env.frames.slots_NSR)


class _Faulty(GrowthVectorEnv):
    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return super().reset(seed=seed, options={"inject": {0: ["nan_output@2"]}})


def test_a_recurrent_agent_begins_anew_after_a_fault_in_rollout_and_update_and_goes_on() -> None:
    env = _Faulty("digits", 2, total_steps=12, tick_steps=2)
    agent, events = _agent(env), []
    agent.learn(8, lambda _, event: events.append(event))
    assert env.frames.run("episode").tolist() == [1.0, 0.0]
    assert events[0].episodes == 1 and events[0].mean_length == 2
    assert abs(events[0].kl) < 1e-9  # the update saw the same memory as the rollout, start of the new episode included
    agent.learn(16)
    assert all(bool(parameter.isfinite().all()) for parameter in agent.policy.parameters())
    agent.close()
