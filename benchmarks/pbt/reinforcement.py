"""Populations of PPO agents on Gymnasium tasks: does taking over others help, and does exploring help beyond that?

Eight agents train equally many environment steps each, with learning rate, entropy coefficient, clip range, discount and
lambda of GAE drawn anew for each seed, the same ones in all arms:

    random      every agent keeps what it drew: random search
    selection   the two worst take over one of the two best, with its hyperparameters as they are
    pbt         the same, and what was taken over moves a step, or is drawn anew

Agents are compared by ten episodes with the most probable actions, the same for all, after each interval. What counts is the
agent with the highest score at the end, by its mean return over 40 held-out episodes. Over seeds: the interquartile mean (IQM),
with a 95 % interval from resampling seeds; differences are paired by seed. Over tasks, returns are scaled to 0 for an agent
that chooses uniformly and 1 for a solved task, and seeds are resampled within each task (Agarwal et al. 2021, arXiv
2108.13264).

    python benchmarks/pbt/reinforcement.py [--seeds 5] [--tasks CartPole-v1 ...] [--workers 2] [--steps-factor 1.0]

Each finished run is appended to a cache beside the results, so that an interrupted comparison goes on where it was.
LunarLander needs gymnasium[box2d].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean

from morphogen.pbt import PBTConfig, PopulationTrainer, PPOMember
from morphogen.rl import PPO, PPOConfig
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "pbt_reinforcement.json"
HELD_OUT_SEED, EPISODES = 1_000_000, 40
ARMS: Mapping[str, Mapping[str, Any]] = {
    "random": {"exploit_method": "none", "explore_method": "none"},
    "selection": {"exploit_method": "truncation", "truncation_ratio": 0.25, "explore_method": "none"},
    "pbt": {"exploit_method": "truncation", "truncation_ratio": 0.25, "explore_method": "both"},
}
SEARCHED = {
    "learning_rate": {"kind": "log_float", "low": 1e-5, "high": 1e-2},
    "entropy_coef": {"kind": "log_float", "low": 1e-4, "high": 0.1},
    "clip_range": {"kind": "float", "low": 0.05, "high": 0.4},
    "gamma": {"kind": "logit", "low": 0.9, "high": 0.999},
    "gae_lambda": {"kind": "logit", "low": 0.8, "high": 0.99},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """An environment, the steps of each agent, and the returns of a uniform agent and of a solved task."""

    total_steps: int
    interval: int
    rollout_steps: int
    uniform: float
    solved: float


TASKS = {
    "CartPole-v1": Task(24_576, 4_096, 64, 22.0, 500.0),
    "Acrobot-v1": Task(49_152, 4_096, 128, -499.0, -100.0),
    "LunarLander-v3": Task(98_304, 8_192, 256, -180.0, 200.0),
}


def agent_of(env: str, task: Task, seed: int) -> PPO:
    """Return an agent that has not trained."""
    config = PPOConfig(
        num_envs=8,
        rollout_steps=task.rollout_steps,
        minibatch_size=256,
        epochs=6,
        schedule_steps=task.total_steps,
        num_threads=1,
        seed=seed,
    )
    return PPO(env, config)


def run(env: str, task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Train a population, and return what it came to."""
    torch.set_num_threads(1)
    started = time.process_time()
    config = PBTConfig(
        population_size=8,
        total_steps=task.total_steps,
        perturbation_interval=task.interval,
        hyperparameters=SEARCHED,
        synchronous=True,
        seed=seed,
        **ARMS[arm],
    )

    def member(place: int, hyperparameters: Mapping[str, Any], chance: int) -> PPOMember:
        return PPOMember(agent_of(env, task, chance), score="evaluation", evaluation_seed=seed)

    result = PopulationTrainer(member, config).run()
    agent = agent_of(env, task, seed)
    agent.adopt(result.parameters["snapshot"], "copy")
    held_out = agent.evaluate(EPISODES, seed=HELD_OUT_SEED).returns
    agent.close()
    last = config.num_intervals
    return {
        "task": env,
        "arm": arm,
        "seed": seed,
        "held_out": float(np.mean(held_out)),
        "best_score": result.score,
        "median_score": float(np.median([report.score for report in result.reports if report.interval == last])),
        "exploits": len(result.exploits),
        "hyperparameters": dict(result.hyperparameters),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


Values = NDArray[np.float64]


def iqm(values: Values) -> float:
    """Return the mean of the middle half."""
    return float(trim_mean(values.reshape(-1), 0.25))


def resampled(by_task: Sequence[Values], statistic: Callable[[Values], float]) -> list[float]:
    """Return a statistic of all values with its 95 % interval, seeds resampled within each task."""
    chance = np.random.default_rng(0)
    draws = [statistic(np.concatenate([own[chance.integers(len(own), size=len(own))] for own in by_task])) for _ in range(2000)]
    return [statistic(np.concatenate(by_task)), *(float(bound) for bound in np.percentile(draws, [2.5, 97.5]))]


def table(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return for each task, and for all of them scaled, the IQM of each arm and of what it is above another one."""
    values: dict[str, dict[str, Values]] = {}
    for task in dict.fromkeys(entry["task"] for entry in found):
        own = sorted((entry for entry in found if entry["task"] == task), key=lambda entry: entry["seed"])
        values[task] = {arm: np.array([entry["held_out"] for entry in own if entry["arm"] == arm]) for arm in ARMS}
    rows: dict[str, Any] = {task: _row([arms]) for task, arms in values.items()}
    scaled = [
        {arm: (own - TASKS[task].uniform) / (TASKS[task].solved - TASKS[task].uniform) for arm, own in arms.items()}
        for task, arms in values.items()
    ]
    rows["all, scaled"] = _row(scaled)
    return rows


def _row(by_task: Sequence[Mapping[str, Values]]) -> dict[str, Any]:
    row: dict[str, Any] = {arm: resampled([arms[arm] for arms in by_task], iqm) for arm in ARMS}
    for other in ("selection", "random"):
        differences = [arms["pbt"] - arms[other] for arms in by_task]
        row[f"pbt - {other}"] = resampled(differences, lambda values: float(values.mean()))
    row["selection - random"] = resampled([a["selection"] - a["random"] for a in by_task], lambda values: float(values.mean()))
    return row


def main() -> None:
    """Train what is not in the cache, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Populations of PPO agents against random search and selection alone.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps-factor", type=float, default=1.0, help="times the steps and intervals of each task")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    given = parser.parse_args()
    cache = given.json.with_suffix(".cache.jsonl")
    found = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {(entry["task"], entry["arm"], entry["seed"]) for entry in found}
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, env, _scaled(TASKS[env], given.steps_factor), arm, seed)
            for seed in range(given.seeds)
            for env in given.tasks
            for arm in ARMS
            if (env, arm, seed) not in done
        ]
        for job in as_completed(jobs):
            found.append(job.result())
            with cache.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
            print({name: value for name, value in found[-1].items() if name != "hyperparameters"}, flush=True)
    rows = table(found)
    for name, row in rows.items():
        print(name, {what: [round(value, 2) for value in numbers] for what, numbers in row.items()})
    command = f"python benchmarks/pbt/reinforcement.py --seeds {given.seeds} --tasks {' '.join(given.tasks)}"
    versions = {"morphogen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    settings = {"tasks": {env: dataclasses.asdict(TASKS[env]) for env in given.tasks}, "hyperparameters": SEARCHED}
    content = {"command": command, **versions, "steps_factor": given.steps_factor, **settings, "table": rows, "runs": found}
    given.json.write_text(json.dumps(content, indent=1) + "\n")
    cache.unlink()
    print(f"written to {given.json}")


def _scaled(task: Task, factor: float) -> Task:
    return dataclasses.replace(task, total_steps=int(task.total_steps * factor), interval=int(task.interval * factor))


if __name__ == "__main__":
    main()
