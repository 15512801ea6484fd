"""Trains one arm of a row with one seed, in this process, and prints the run as one line of JSON; started by run.py."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import time
from typing import Any, Protocol

import environments
import gymnasium as gym
import torch
from checks import Run
from environments import MakeEnv
from rows import ROWS, Arm, Task


class Agent(Protocol):
    """What is asked of an adapter."""

    rollout_cpu_seconds: float

    def learn(self, total_steps: int) -> int:
        """Train; return how many steps were taken."""
        ...

    def training_return(self) -> float | None:
        """Return the mean return of the last 100 training episodes; None if there was none."""
        ...

    def evaluate(self, make_env: MakeEnv, episodes: int, seed: int) -> list[float]:
        """Return the returns of deterministic episodes."""
        ...


def make_agent(arm: Arm, task: Task, make_env: MakeEnv, seed: int) -> Agent:
    """Return a new agent of the arm's library; only that library is imported."""
    module = importlib.import_module("own" if arm.library == "morphogen" else "peers")
    return module.Agent(arm, task, make_env, seed)


def warm_up(arm: Arm, task: Task, make_env: MakeEnv) -> None:
    """Train an agent that is thrown away for one minibatch: what happens at the first use alone is no part of training."""
    rollout_steps = -(-task.minibatch_size // task.num_envs)
    brief = dataclasses.replace(task, rollout_steps=rollout_steps, epochs=1)
    make_agent(arm, brief, make_env, seed=0).learn(rollout_steps * task.num_envs)


def train(name: str, arm: Arm, task: Task, seed: int, episodes: int) -> Run:
    """Return the run: training, whose CPU time is taken, then evaluation on seeds that training has not seen."""
    make_env = functools.partial(environments.make, arm.env or task.env)
    made: list[gym.Env[Any, Any]] = []

    def make_counted() -> gym.Env[Any, Any]:
        made.append(make_env())
        return made[-1]

    warm_up(arm, task, make_env)
    agent = make_agent(arm, task, make_counted, seed)
    start = time.process_time()
    steps = agent.learn(task.total_steps)
    cpu_seconds = time.process_time() - start
    counts = [env.unwrapped.invalid_actions for env in made if isinstance(env.unwrapped, environments.Grow)]
    return Run(
        arm=name,
        seed=seed,
        steps=steps,
        cpu_seconds=cpu_seconds,
        update_cpu_seconds=cpu_seconds - agent.rollout_cpu_seconds,
        returns=agent.evaluate(make_env, episodes, seed=10_000 * (seed + 1)),
        training_return=agent.training_return(),
        invalid_actions=sum(counts) if counts else None,
    )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description="Train one arm of a row of the PPO benchmarks.")
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("arm")
    parser.add_argument("seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--episodes", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = ROWS[options.row]
    task = dataclasses.replace(row.task, total_steps=options.steps or row.task.total_steps)
    print(json.dumps(dataclasses.asdict(train(options.arm, row.arms[options.arm], task, options.seed, options.episodes))))


if __name__ == "__main__":
    main()
