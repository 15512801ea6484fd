"""Collecting: the same trajectories in every autoreset mode, true final observations, carried memory, no influence across."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from morphogen.rl import PPO, PolicyConfig, PPOConfig

MEMORIES = ["none", "lstm", "gru"]


def small(memory: Any = "none", **settings: Any) -> PPOConfig:
    policy = PolicyConfig(hidden=(8,), memory=memory, memory_width=6)
    return PPOConfig(policy=policy, **{"rollout_steps": 16, "minibatch_size": 20, "epochs": 2, **settings})


class Clock(VectorEnv[Any, Any, Any]):
    """Each environment counts its steps; episodes of different lengths are cut off, or terminate where the length is odd."""

    def __init__(self, mode: AutoresetMode, lengths: tuple[int, ...] = (3, 4, 5), poison: float = 0.0) -> None:
        self.metadata = {"autoreset_mode": mode}
        self.num_envs, self._lengths, self._poison = len(lengths), np.array(lengths), poison
        self.single_observation_space, self.single_action_space = spaces.Box(-np.inf, np.inf, (1,)), spaces.Discrete(2)
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.num_envs, 1))
        self.action_space = spaces.MultiDiscrete([2] * self.num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        mask = np.ones(self.num_envs, bool) if options is None else options["reset_mask"]
        self._count = np.where(mask, 0, getattr(self, "_count", 0))
        self._ended = np.zeros(self.num_envs, bool)
        return self._seen(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        mode, filler = self.metadata["autoreset_mode"], self._ended.copy()
        self._count = np.where(filler, 0, self._count + 1)
        ended = (self._count == self._lengths) & ~filler
        reward = np.where(filler, self._poison, self._count + 10.0 * actions)
        odd = self._lengths % 2 == 1
        infos: dict[str, Any] = {}
        if mode == AutoresetMode.SAME_STEP and ended.any():
            final = np.empty(self.num_envs, dtype=object)
            final[:] = list(self._seen())
            infos = {"final_obs": final, "_final_obs": ended}
            self._count = np.where(ended, 0, self._count)
        self._ended = ended if mode == AutoresetMode.NEXT_STEP else np.zeros(self.num_envs, bool)
        return self._seen(), reward, ended & odd, ended & ~odd, infos

    def _seen(self) -> Any:
        return self._count[:, None].astype(np.float32)


@pytest.mark.parametrize("memory", MEMORIES)
def test_gymnasiums_modes_give_bit_identical_updates(kit: SimpleNamespace, memory: Any) -> None:
    settings = {"normalize_observations": True, "normalize_rewards": True}
    agents = [PPO(kit.worlds(mode=mode), small(memory, **settings)).learn(3 * 16 * 2) for mode in AutoresetMode]
    assert kit.same_weights(agents[0], agents[1])
    assert kit.same_weights(agents[0], agents[2])
    assert agents[0].num_steps == agents[1].num_steps == agents[2].num_steps == 3 * 16 * 2


@pytest.mark.parametrize("memory", MEMORIES)
def test_own_vector_environments_give_bit_identical_updates_where_episodes_end_together(
    kit: SimpleNamespace, memory: Any
) -> None:
    settings = {"normalize_observations": True, "normalize_rewards": True, "normalize_values": True}
    agents = [PPO(Clock(mode, lengths=(4, 4, 4)), small(memory, **settings)).learn(3 * 16 * 2) for mode in AutoresetMode]
    assert kit.same_weights(agents[0], agents[1])
    assert kit.same_weights(agents[0], agents[2])


@pytest.mark.parametrize("memory", MEMORIES)
def test_filler_rows_reach_nothing(kit: SimpleNamespace, memory: Any) -> None:
    settings = {"normalize_observations": True, "normalize_rewards": True, "normalize_values": True}
    agents = [
        PPO(Clock(AutoresetMode.NEXT_STEP, poison=poison), small(memory, **settings)).learn(3 * 16 * 2) for poison in (0.0, 1e6)
    ]
    assert kit.same_weights(*agents)
    for mine, theirs in zip(*(agent._parts.travelling().values() for agent in agents), strict=True):
        assert str(mine.state_dict()) == str(theirs.state_dict())


def test_statistics_are_of_observations_that_were_acted_on() -> None:
    agent = PPO(Clock(AutoresetMode.NEXT_STEP), small(normalize_observations=True))
    agent._collector.collect(50, 0.99)
    seen = []
    for length in (3, 4, 5):
        count = 0
        for _ in range(51):
            if count < length:  # the last count of an episode is looked at in the filler row alone
                seen.append(count)
            count = (count + 1) % (length + 1)
    moments = agent._parts.observation_normalizer.moments
    assert (moments.count, float(moments.mean_D[0])) == (len(seen), pytest.approx(np.mean(seen)))


@pytest.mark.parametrize("memory", MEMORIES)
def test_what_follows_a_row_is_the_true_final_observation_with_the_memory_carried_there(memory: Any) -> None:
    agent = PPO(Clock(AutoresetMode.SAME_STEP), small(memory))
    collector = agent._collector
    collector.collect(7, 0.99)  # so that the rollout below begins within episodes, with memories of them
    state = None if collector.memory_state is None else collector.memory_state.clone()
    first = collector._now.observation_ND[:, 0].copy()
    rollout = collector.collect(16, 0.99)
    for env, length in enumerate((3, 4, 5)):
        count, carried = int(first[env]), None if state is None else state[:, :, env : env + 1]
        for step in range(16):
            if count in (0, length):
                count, carried = 0, agent.policy.initial_state(1)
            _, carried = act(agent, count, carried)
            terminated = count + 1 == length and length % 2 == 1
            assert rollout.terminated_TN[step, env] == terminated
            if not terminated:
                truth = act(agent, count + 1, carried)[0].critic.flatten()
                torch.testing.assert_close(rollout.next_critic_QTNK[:, step, env].flatten(), truth, atol=1e-5, rtol=1e-5)
            assert rollout.continues_TN[step, env] == (count + 1 != length)
            count += 1


def act(agent: PPO, count: int, carried: Any) -> Any:
    """Return the network's outputs at one count, and the memory's state after it."""
    observation = torch.tensor([[float(count)]])
    with torch.no_grad():
        return agent.policy(observation) if carried is None else agent.policy(observation[None], carried)


class Nudged(gym.Wrapper[Any, Any, Any, Any]):
    """Observations that are a little off."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, *rest = self.env.step(action)
        return (observation + np.float32(0.125), *rest)


@pytest.mark.parametrize("memory", MEMORIES)
def test_an_environment_does_not_notice_another(kit: SimpleNamespace, memory: Any) -> None:
    rollouts = []
    for nudged in (False, True):
        env = kit.worlds()
        if nudged:
            env.envs[0] = Nudged(env.envs[0])
        agent = PPO(env, small(memory))
        agent.set_parameters(agent.get_parameters())  # a memory reset for one environment alone would mix them from here on
        agent._collector.collect(5, 0.99)
        agent._collector.forget()
        rollouts.append(agent._collector.collect(16, 0.99))
    for field in ("observation_TND", "action_TN", "log_prob_TNH", "actor_TNA"):
        plain, other = (getattr(rollout, field) for rollout in rollouts)
        assert torch.equal(plain[:, 1:], other[:, 1:]), field
        assert not torch.equal(plain[:, 0], other[:, 0]) or field == "action_TN"


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_a_horizon_carries_the_memory_and_a_start_clears_it(memory: Any) -> None:
    agent = PPO(Clock(AutoresetMode.SAME_STEP, lengths=(5, 50)), small(memory))
    agent._collector.collect(7, 0.99)
    carried = agent._collector.memory_state.clone()
    rollout = agent._collector.collect(8, 0.99)
    assert torch.equal(rollout.state_TSCNW[0], carried)
    assert rollout.start_TN[:, 0].tolist() == [False, False, False, True, False, False, False, False]
    assert (rollout.state_TSCNW[3, :, :, 0] == 0).all()
    assert (rollout.state_TSCNW[3, :, :, 1] != 0).any()


def test_evaluation_and_prediction_leave_training_alone(kit: SimpleNamespace) -> None:
    agents = []
    for watched in (False, True):
        agent = PPO("CartPole-v1", small("lstm", num_envs=2, normalize_observations=True))
        agent.learn(32)
        if watched:
            agent.evaluate(3, deterministic=False)
            agent.predict(np.ones((2, 4), np.float32))
        agents.append(agent.learn(32))
    assert kit.same_weights(*agents)
