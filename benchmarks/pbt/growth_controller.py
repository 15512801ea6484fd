"""Population-based training of agents that learn when to grow, against the default agent.

Both arms train as many agents for as many decisions each, in environments alike. "pbt" searches learning rate, entropy
coefficient and clip range; "default" has the settings of `morphogen train`, each agent alone. What counts is the mean return of
the training episodes that ended within the last interval. For each seed: the median over agents, and the best; over
seeds: the mean with a 95 % t-interval, and the difference, paired by seed.

    python benchmarks/pbt/growth_controller.py [--task digits] [--seeds 5] [--population 4] [--steps 2880] [--workers 2]

Each finished population is appended to a cache beside the results, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from morphogen.pbt import PopulationTrainer
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_members import AgentFactory
from morphogen.state import RandomStreams
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "pbt_growth_controller.json"
SEARCHED = {
    "learning_rate": {"kind": "log_float", "low": 1e-4, "high": 2e-3},
    "entropy_coef": {"kind": "log_float", "low": 1e-3, "high": 3e-2},
    "clip_range": {"kind": "float", "low": 0.1, "high": 0.3},
}


@dataclass(frozen=True)
class Plan:
    task: str
    population: int
    steps: int
    interval: int
    run_steps: int
    tick_steps: int

    def job(self, seed: int) -> PBTJobConfig:
        """Return the job of a population."""
        return PBTJobConfig(
            member="growth",
            task=self.task,
            growth_env={"total_steps": self.run_steps, "tick_steps": self.tick_steps},
            pbt={
                "population_size": self.population,
                "total_steps": self.steps,
                "perturbation_interval": self.interval,
                "truncation_ratio": 0.25,
                "hyperparameters": SEARCHED,
                "seed": seed,
            },
        )


def run(plan: Plan, arm: str, seed: int) -> dict[str, Any]:
    """Train agents, and return the mean return of each in its last interval."""
    torch.set_num_threads(1)
    started, job = time.process_time(), plan.job(seed)
    found: dict[str, Any] = {"arm": arm, "seed": seed}
    factory = AgentFactory(job.model_dump(mode="json"))
    if arm == "pbt":
        result = PopulationTrainer(factory, job.pbt).run()
        last = [report for report in result.reports if report.interval == job.pbt.num_intervals]
        found |= {"final": [report.score for report in last], "exploits": len(result.exploits)}
        found["hyperparameters"] = [dict(report.hyperparameters) for report in last]
    else:
        found["final"] = [_alone(plan, factory, place, seed) for place in range(plan.population)]
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def _alone(plan: Plan, factory: AgentFactory, place: int, seed: int) -> float:
    """Train one agent with the default settings, interval by interval, and return its last score."""
    member = factory(place, {}, RandomStreams(seed).integer("member", place))
    score = math.nan
    for until in range(plan.interval, plan.steps + 1, plan.interval):
        score = member.train(until).score
    member.close()
    return score


def interval_of(values: Sequence[float]) -> list[float]:
    """Return the mean with a 95 % t-interval."""
    mean = statistics.fmean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def table(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and interval of the median and of the best agent, for each arm and as difference."""
    rows: dict[str, Any] = {}
    for name, of in (("median", statistics.median), ("best", max)):
        by_arm = {
            arm: [of(entry["final"]) for entry in sorted(found, key=lambda entry: entry["seed"]) if entry["arm"] == arm]
            for arm in ("default", "pbt")
        }
        row = {arm: interval_of(values) for arm, values in by_arm.items()}
        differences = [ours - other for ours, other in zip(by_arm["pbt"], by_arm["default"], strict=True)]
        rows[name] = {**row, "pbt - default": interval_of(differences)}
    return rows


def main() -> None:
    """Train what is not in the cache, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Population-based training of growth controllers against the default agent.")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--population", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2880, help="decisions of each agent (default %(default)s)")
    parser.add_argument("--interval", type=int, default=480, help="decisions between exploits (default %(default)s)")
    parser.add_argument("--run-steps", type=int, default=300, help="training steps of a network (default %(default)s)")
    parser.add_argument("--tick-steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    given = parser.parse_args()
    plan = Plan(given.task, given.population, given.steps, given.interval, given.run_steps, given.tick_steps)
    cache = given.json.with_suffix(".cache.jsonl")
    found = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {(entry["arm"], entry["seed"]) for entry in found}
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, plan, arm, seed)
            for seed in range(given.seeds)
            for arm in ("default", "pbt")
            if (arm, seed) not in done
        ]
        for job in as_completed(jobs):
            found.append(job.result())
            with cache.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
            print({name: value for name, value in found[-1].items() if name != "hyperparameters"}, flush=True)
    rows = table(found)
    for name, row in rows.items():
        print(name, {what: [round(value, 3) for value in numbers] for what, numbers in row.items()})
    content = {
        "command": "python benchmarks/pbt/growth_controller.py",
        "settings": {**vars(given), "json": given.json.name},
        "hyperparameters": SEARCHED,
        "morphogen": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "table": rows,
        "runs": found,
    }
    given.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    cache.unlink()
    print(f"written to {given.json}")


if __name__ == "__main__":
    main()
