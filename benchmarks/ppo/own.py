"""morphogen's PPO on the benchmark tasks."""

from __future__ import annotations

import math
import time

from environments import MakeEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rows import Arm, Task

from morphogen.rl import PPO, ActionConfig, CriticConfig, HeadConfig, Linear, PolicyConfig, PPOConfig, Updated
from morphogen.rl.rollout import Rollout
from morphogen.telemetry.events import Event

MLP = PolicyConfig(hidden=(64, 64), activation="tanh")
LSTM = PolicyConfig(hidden=(), activation="relu", memory="lstm", memory_width=64, head_hidden=(64,))
GROW_HEADS = (
    HeadConfig(name="op"),
    HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2, 3)}),
    HeadConfig(name="blueprint", given=("slot",), relevant_when={"op": (1,)}),
)


class Agent:
    """An agent of morphogen."""

    def __init__(self, arm: Arm, task: Task, make_env: MakeEnv, seed: int) -> None:
        self.rollout_cpu_seconds = 0.0
        self._training_return = math.nan
        env = vector(make_env, task.num_envs)
        heads = GROW_HEADS if task.env.startswith("Grow") else None
        config = PPOConfig(
            rollout_steps=task.rollout_steps,
            minibatch_size=task.minibatch_size,
            epochs=task.epochs,
            gamma=task.gamma,
            gae_lambda=task.gae_lambda,
            learning_rate=scheduled(task.learning_rate, task.learning_rate_to_zero),
            clip_range=scheduled(task.clip_range, task.clip_range_to_zero),
            entropy_coef=task.entropy_coef,
            normalize_observations=task.normalize,
            normalize_rewards=task.normalize,
            policy=LSTM if arm.memory else MLP,
            action=ActionConfig(heads=heads),
            critic=CriticConfig(kind=arm.critic),
            normalize_values=arm.critic != "scalar",  # what that critic's defaults are for
            seed=seed,
        )
        self._agent = PPO(env, config, emit=self._read)
        self._collector = self._agent._collector  # to tell the time of rollouts from that of updates
        self._collect, self._collector.collect = self._collector.collect, self._timed_rollout

    def _timed_rollout(self, steps: int, gamma: float) -> Rollout:
        start = time.process_time()
        rollout = self._collect(steps, gamma)
        self.rollout_cpu_seconds += time.process_time() - start
        return rollout

    def _read(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._training_return = event.mean_return

    def learn(self, total_steps: int) -> int:
        """Train; return how many steps were taken."""
        return self._agent.learn(total_steps).num_steps

    def training_return(self) -> float | None:
        """Return the mean return of the last 100 training episodes; None if there was none."""
        return None if math.isnan(self._training_return) else self._training_return

    def evaluate(self, make_env: MakeEnv, episodes: int, seed: int) -> list[float]:
        """Return the returns of deterministic episodes, in ten environments with consecutive seeds."""
        env = vector(make_env, 10)
        found = self._agent.evaluate(episodes, env, seed=seed)
        env.close()
        return list(found.returns)


def vector(make_env: MakeEnv, num_envs: int) -> SyncVectorEnv:
    """Return so many environments, one after the other in this process, as PPO makes them from an id."""
    return SyncVectorEnv([make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP, copy=False)


def scheduled(value: float, to_zero: bool) -> float | Linear:
    """Return ``value``, or its schedule from there to zero."""
    return Linear(start=value, end=0.0) if to_zero else value
