"""Every reward preset on one task: what policies trained on it come to, measured by one yardstick.

A policy is trained on each preset with each seed, by ``morphogen train`` with its defaults, then plays held-out episodes,
drawing its choices as in training. The yardstick is the objective of the default preset (``shaped``, without its shaping),
paid beside the preset's own reward; accuracy is that on the test split at the end of an episode. Policies that only wait and
the heuristic play the same episodes.

    python benchmarks/growth/presets.py [--task mnist1d] [--steps 1920] [--seeds 3] [--episodes 12] [--workers 2]
        [--run-steps 600 --tick-steps 25]

Each finished policy is appended to the cache beside the results, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.players import LearnedPlayer, Player, PolicyPlayer
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import PRESETS, RewardConfig, Rewards, objective
from morphogen.recipes.evaluate_config import FIRST_HELD_OUT_SEED
from morphogen.recipes.policy_file import FILE_NAME, load_policy
from morphogen.recipes.train import train
from morphogen.recipes.train_config import TrainConfig

RESULTS = Path(__file__).parents[1] / "results"
OTHERS = ("wait", "heuristic")
FACTS = ("yardstick", "test_metric", "parameters", "relative_flops")


class Judged(Rewards):
    """A reward, and beside it what the yardstick would have paid."""

    def __init__(self, config: RewardConfig, num_envs: int, num_slots: int) -> None:
        super().__init__(config, num_envs, num_slots)
        self.yardstick, self.total_N = Rewards(RewardConfig(), num_envs, num_slots), np.zeros(num_envs)

    def forget(self, rows_N: np.ndarray) -> None:
        super().forget(rows_N)
        self.yardstick.forget(rows_N)

    def pay(self, record: StepRecord) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        self.total_N = self.total_N + objective(self.yardstick.pay(record)[1])
        return super().pay(record)


@dataclass(frozen=True)
class Plan:
    task: str
    steps: int
    run_steps: int
    tick_steps: int
    episodes: int

    def env(self, preset: str) -> GrowthEnvConfig:
        return GrowthEnvConfig(
            total_steps=self.run_steps, tick_steps=self.tick_steps, reward=RewardConfig(preset=preset), measure_test=False
        )


def play(plan: Plan, config: GrowthEnvConfig, player: Any) -> dict[str, list[float]]:
    """Return what each held-out episode came to."""
    env = GrowthVectorEnv(plan.task, plan.episodes, config=config.replace(measure_test=True))
    judged = Judged(config.reward, plan.episodes, config.num_slots)
    env._rewards = judged
    whoever: Player = player(env)
    seeds = list(range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.episodes))
    observation, info = env.reset(seed=seeds)
    judged.total_N[:] = 0.0
    whoever.begin(seeds)
    ended, found = np.zeros(plan.episodes, dtype=bool), {name: np.full(plan.episodes, np.nan) for name in FACTS}
    while not ended.all():
        observation, _, now, _, info = env.step(whoever.choose(env, observation, info))
        if now.any():
            final = {**info["final_info"], "yardstick": judged.total_N}
            for name in FACTS:
                found[name][now & ~ended] = final[name][now & ~ended]
            ended |= now
    env.close()
    return {name: values.tolist() for name, values in found.items()}


def trained(plan: Plan, preset: str, seed: int) -> dict[str, Any]:
    """Train a policy on ``preset``, and return what it came to."""
    torch.set_num_threads(1)
    config = plan.env(preset)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = TrainConfig(task=plan.task, total_steps=plan.steps, env=config, ppo={"seed": seed, "num_envs": 8})
        train(job, Path(folder) / "run")
        policy = load_policy(Path(folder) / "run" / FILE_NAME)
    seconds = time.process_time() - started
    return {"preset": preset, "seed": seed, "cpu_seconds": seconds, **play(plan, config, lambda env: LearnedPlayer(policy))}


def other(plan: Plan, name: str) -> dict[str, Any]:
    """Return what a built-in policy comes to."""
    torch.set_num_threads(1)
    found = play(plan, plan.env("shaped"), lambda env: PolicyPlayer(name, env.menu))
    return {"preset": name, "seed": 0, "cpu_seconds": 0.0, **found}


def rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each preset: means over episodes, then over seeds, and the spread over seeds."""
    table: list[dict[str, Any]] = []
    for preset in dict.fromkeys(entry["preset"] for entry in found):
        own = [entry for entry in found if entry["preset"] == preset]
        row: dict[str, Any] = {"preset": preset, "seeds": len(own)}
        for name in FACTS:
            means = [statistics.fmean(entry[name]) for entry in own]
            row[name] = statistics.fmean(means)
            row[f"{name}_by_seed"] = means
        row["cpu_minutes"] = sum(entry["cpu_seconds"] for entry in own) / 60
        table.append(row)
    return sorted(table, key=lambda row: -row["yardstick"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward presets, compared by one yardstick.")
    parser.add_argument("--task", default="mnist1d")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=1920, help="decisions of each training (default %(default)s)")
    parser.add_argument("--run-steps", type=int, default=600, help="training steps of a network (default %(default)s)")
    parser.add_argument("--tick-steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "growth_presets.json")
    given = parser.parse_args()
    plan = Plan(given.task, given.steps, given.run_steps, given.tick_steps, given.episodes)
    cache = given.json.with_suffix(".cache.jsonl")
    found = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {(entry["preset"], entry["seed"]) for entry in found}
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(other, plan, name) for name in OTHERS if (name, 0) not in done]
        jobs += [
            pool.submit(trained, plan, preset, seed)
            for seed in range(given.seeds)
            for preset in given.presets
            if (preset, seed) not in done
        ]
        for job in as_completed(jobs):
            entry = job.result()
            found.append(entry)
            with cache.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(
                f"{entry['preset']:12} seed {entry['seed']}  yardstick {statistics.fmean(entry['yardstick']):.3f}", flush=True
            )
    table = rows(found)
    for row in table:
        print(
            f"{row['preset']:12} {row['seeds']} seeds  yardstick {row['yardstick']:.3f}  "
            f"test {100 * row['test_metric']:.1f} %  "
            f"{row['parameters']:.0f} parameters  {row['relative_flops']:.2f} x FLOPs of the host"
        )
    facts = {"command": "python benchmarks/growth/presets.py", "settings": {**vars(given), "json": given.json.name}}
    facts |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": table}
    given.json.write_text(json.dumps(facts, indent=1, default=str) + "\n")
    cache.unlink()


if __name__ == "__main__":
    main()
