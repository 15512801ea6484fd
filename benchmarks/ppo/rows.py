"""What is measured: tasks with the settings that all libraries share, and rows, each a task and who trains on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from checks import Check, NoInvalidActions, NotBelow, ReturnAtLeast, ReturnBelow, Speed, UpdateCost


@dataclass(frozen=True, kw_only=True)
class Task:
    """An environment and the settings of PPO; what is not here is the same everywhere.

    Two separate networks of two layers of 64, tanh; Adam with eps 1e-5; value coefficient 0.5, gradients clipped at norm 0.5,
    values not clipped. With memory: two separate LSTMs of 64 on the observation, a layer of 64 with ReLU after each.
    """

    env: str
    total_steps: int
    num_envs: int
    rollout_steps: int
    minibatch_size: int
    epochs: int
    gamma: float
    gae_lambda: float
    learning_rate: float
    learning_rate_to_zero: bool = False
    clip_range: float = 0.2
    clip_range_to_zero: bool = False
    entropy_coef: float = 0.0
    normalize: bool = False
    """Observations and rewards."""


@dataclass(frozen=True)
class Arm:
    """Who trains: "morphogen", or "ppo", "recurrent" or "maskable" of the peers; ``env`` if not that of the task."""

    library: str
    memory: bool = False
    critic: str = "scalar"
    env: str | None = None


@dataclass(frozen=True)
class Row:
    """A task, who trains on it by name, and what is asked of the results."""

    task: Task
    arms: dict[str, Arm]
    checks: tuple[Check, ...] = ()
    seeds: int = 3


CARTPOLE = Task(
    env="CartPole-v1",
    total_steps=100_000,
    num_envs=8,
    rollout_steps=32,
    minibatch_size=256,
    epochs=20,
    gamma=0.98,
    gae_lambda=0.8,
    learning_rate=1e-3,
    learning_rate_to_zero=True,
    clip_range_to_zero=True,
)
CARTPOLE_POSITION = dataclasses.replace(CARTPOLE, env="CartPole-position", normalize=True)
PENDULUM = Task(
    env="Pendulum-v1",
    total_steps=100_000,
    num_envs=4,
    rollout_steps=1024,
    minibatch_size=64,
    epochs=10,
    gamma=0.9,
    gae_lambda=0.95,
    learning_rate=1e-3,
)
HALFCHEETAH = Task(
    env="HalfCheetah-v5",
    total_steps=100_000,
    num_envs=1,
    rollout_steps=2048,
    minibatch_size=64,
    epochs=10,
    gamma=0.99,
    gae_lambda=0.95,
    learning_rate=3e-4,
    learning_rate_to_zero=True,
    normalize=True,
)
LUNARLANDER = Task(
    env="LunarLander-v3",
    total_steps=200_000,
    num_envs=16,
    rollout_steps=1024,
    minibatch_size=64,
    epochs=4,
    gamma=0.999,
    gae_lambda=0.98,
    learning_rate=3e-4,
    entropy_coef=0.01,
)
INVALID_ACTIONS = Task(
    env="InvalidActions",
    total_steps=2048,
    num_envs=1,
    rollout_steps=2048,
    minibatch_size=64,
    epochs=10,
    gamma=0.4,
    gae_lambda=0.95,
    learning_rate=3e-4,
)
GROW = Task(
    env="Grow",
    total_steps=50_000,
    num_envs=8,
    rollout_steps=128,
    minibatch_size=256,
    epochs=10,
    gamma=0.95,
    gae_lambda=0.95,
    learning_rate=1e-3,
    learning_rate_to_zero=True,
    entropy_coef=0.005,
)
OWN, PEER, NO_MEMORY, QUANTILE = "morphogen", "peer", "morphogen without memory", "morphogen, quantile critic"
PAIR = {OWN: Arm("morphogen"), PEER: Arm("ppo")}
GROW_ARMS = {OWN: Arm("morphogen"), PEER: Arm("maskable", env="Grow-flat")}
LONG = 1_000_000


def quantile(task: Task, memory: bool = False) -> Row:
    """Return the quantile critic beside the scalar one."""
    arms = {QUANTILE: Arm("morphogen", memory=memory, critic="quantile"), OWN: Arm("morphogen", memory=memory)}
    return Row(task, arms, (UpdateCost(QUANTILE, OWN, 1.6), NotBelow(QUANTILE, OWN)))


ROWS = {
    "cartpole": Row(CARTPOLE, PAIR, (Speed(OWN, PEER, 1.8), ReturnAtLeast(OWN, 475, of_five=4)), seeds=5),
    "cartpole-position": Row(
        CARTPOLE_POSITION,
        {OWN: Arm("morphogen", memory=True), PEER: Arm("recurrent"), NO_MEMORY: Arm("morphogen")},
        (Speed(OWN, PEER, 4.0), NotBelow(OWN, PEER), ReturnBelow(NO_MEMORY, 100)),
    ),
    "pendulum": Row(PENDULUM, PAIR, (Speed(OWN, PEER, 1.5), ReturnAtLeast(OWN, -180))),
    "halfcheetah": Row(HALFCHEETAH, PAIR, (Speed(OWN, PEER, 1.4), NotBelow(OWN, PEER))),
    "halfcheetah-long": Row(dataclasses.replace(HALFCHEETAH, total_steps=LONG), PAIR, (NotBelow(OWN, PEER),)),
    "lunarlander": Row(LUNARLANDER, PAIR, (Speed(OWN, PEER, 1.2),)),
    "lunarlander-long": Row(dataclasses.replace(LUNARLANDER, total_steps=LONG), PAIR, (ReturnAtLeast(OWN, 220),)),
    "invalid-actions": Row(INVALID_ACTIONS, {OWN: Arm("morphogen"), PEER: Arm("maskable")}, (ReturnAtLeast(OWN, 90),)),
    "grow": Row(
        GROW,
        GROW_ARMS | {"peer, a mask per dimension": Arm("maskable", env="Grow-per-dimension")},
        (Speed(OWN, PEER, 1.5), ReturnAtLeast(OWN, 14.2), NoInvalidActions(OWN)),
    ),
    "grow-hidden": Row(
        dataclasses.replace(GROW, env="Grow-hidden", total_steps=200_000),
        {OWN: Arm("morphogen", memory=True), NO_MEMORY: Arm("morphogen")},
        (ReturnAtLeast(OWN, 12),),
    ),
    "quantile-cartpole": quantile(CARTPOLE),
    "quantile-cartpole-position": quantile(CARTPOLE_POSITION, memory=True),
    "quantile-pendulum": quantile(PENDULUM),
    "quantile-halfcheetah": quantile(HALFCHEETAH),
}
