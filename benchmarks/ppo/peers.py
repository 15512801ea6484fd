"""Stable-Baselines3 and sb3-contrib on the benchmark tasks, as their users have them: Monitor, DummyVecEnv, VecNormalize."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from environments import MakeEnv
from rows import Arm, Task
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

MLP = {"net_arch": [64, 64], "activation_fn": nn.Tanh}
LSTM = {
    "lstm_hidden_size": 64,
    "enable_critic_lstm": True,
    "net_arch": {"pi": [64], "vf": [64]},
    "activation_fn": nn.ReLU,
    "ortho_init": False,
}
KINDS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "maskable": MaskablePPO, "recurrent": RecurrentPPO}


class Agent:
    """An agent of a peer."""

    def __init__(self, arm: Arm, task: Task, make_env: MakeEnv, seed: int) -> None:
        self.rollout_cpu_seconds = 0.0
        self._masked, recurrent = arm.library == "maskable", arm.library == "recurrent"
        self._env = vector(make_env, task.num_envs)
        if task.normalize:
            self._env = VecNormalize(self._env, gamma=task.gamma)
        self._model = KINDS[arm.library](
            "MlpLstmPolicy" if recurrent else "MlpPolicy",
            self._env,
            learning_rate=scheduled(task.learning_rate, task.learning_rate_to_zero),
            n_steps=task.rollout_steps,
            batch_size=task.minibatch_size,
            n_epochs=task.epochs,
            gamma=task.gamma,
            gae_lambda=task.gae_lambda,
            clip_range=scheduled(task.clip_range, task.clip_range_to_zero),
            ent_coef=task.entropy_coef,
            policy_kwargs=LSTM if recurrent else MLP,
            seed=seed,
            device="cpu",
        )
        self._collect, self._model.collect_rollouts = self._model.collect_rollouts, self._timed_rollout

    def _timed_rollout(self, *given: Any, **named: Any) -> bool:
        start = time.process_time()
        goes_on = self._collect(*given, **named)
        self.rollout_cpu_seconds += time.process_time() - start
        return goes_on

    def learn(self, total_steps: int) -> int:
        """Train; return how many steps were taken."""
        self._model.learn(total_steps)
        return self._model.num_timesteps

    def training_return(self) -> float | None:
        """Return the mean return of the last 100 training episodes; None if there was none."""
        returns = [episode["r"] for episode in self._model.ep_info_buffer or ()]
        return sum(returns) / len(returns) if returns else None

    def evaluate(self, make_env: MakeEnv, episodes: int, seed: int) -> list[float]:
        """Return the returns of deterministic episodes, in ten environments with consecutive seeds."""
        env = vector(make_env, 10)
        if isinstance(self._env, VecNormalize):
            env = VecNormalize(env, training=False, norm_reward=False)
            env.obs_rms = self._env.obs_rms
        env.seed(seed)
        run = evaluate_masked if self._masked else evaluate_policy
        returns, _ = run(self._model, env, n_eval_episodes=episodes, return_episode_rewards=True)
        env.close()
        return [float(total) for total in returns]


def vector(make_env: MakeEnv, num_envs: int) -> VecEnv:
    """Return so many environments, one after the other in this process."""
    return DummyVecEnv([lambda: Monitor(make_env()) for _ in range(num_envs)])


def scheduled(value: float, to_zero: bool) -> float | Callable[[float], float]:
    """Return ``value``, or its schedule from there to zero."""
    return (lambda remaining: remaining * value) if to_zero else value
