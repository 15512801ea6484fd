"""The toy of the paper on population-based training (Jaderberg et al. 2017, arXiv 1711.09846, figure 2): what each half does.

Two members climb an estimate of what counts, each blind on one side:

    Q(theta) = 1.2 - theta_0^2 - theta_1^2                  what counts, and what members are compared by
    E(theta | h) = 1.2 - h_0 theta_0^2 - h_1 theta_1^2      what they climb, by gradient steps

from theta = (0.9, 0.9) with h = (1, 0) and (0, 1). Arms:

    fixed           nobody takes over anybody, nothing explores
    explore only    every member's h moves after each interval
    copy only       the worse member takes over the better one's theta, and keeps its own h
    full            the worse member takes over theta and h, and h moves

What is decided, and how h moves, is :class:`morphogen.pbt.PBTScheduler`'s; members are two lines of arithmetic. Set here, and
not by the paper: learning rate 0.02, 200 steps, a decision every 4, h within [0, 1], reflected at the bounds, moving by a draw
from N(0, 0.1). Members are compared by Q plus a draw from N(0, 1e-9), in every arm: the two are mirror images, would be equal
to the last bit every other interval, and equal members never take each other over. Reported is Q of the better member at the
end, without that draw: median and range over seeds.

    python benchmarks/pbt/figure2.py [--seeds 400] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from morphogen.pbt import MemberRecord, PBTConfig, PBTScheduler
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "pbt_figure2.json"
START = (0.9, 0.9)
BLIND = ((1.0, 0.0), (0.0, 1.0))
LEARNING_RATE, STEPS, INTERVAL, NOISE, TIE = 0.02, 200, 4, 0.1, 1e-9
SPACE = {"kind": "float", "low": 0.0, "high": 1.0, "step": NOISE, "noise": "normal"}
SEARCH = {"hyperparameters": {"h0": SPACE, "h1": SPACE}, "total_steps": STEPS, "perturbation_interval": INTERVAL}
EXPLOIT = {"truncation_ratio": 0.5}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {"exploit_method": "none", "explore_method": "none"},
    "explore only": {"exploit_method": "none", "explore_method": "perturb", "explore_all": True},
    "copy only": {**EXPLOIT, "explore_method": "none"},
    "full": {**EXPLOIT, "explore_method": "perturb"},
}
CHECKS = {
    "full: median >= 1.1999": lambda median: median["full"] >= 1.1999,
    "full above copy only": lambda median: median["full"] > median["copy only"],
    "fixed: 0.39": lambda median: abs(median["fixed"] - 0.39) < 0.005,
}


@dataclasses.dataclass
class Climber:
    """A member."""

    theta: tuple[float, float]
    h: dict[str, float]

    def train(self) -> float:
        """Climb for an interval; returns Q."""
        factors = (1.0 - 2.0 * LEARNING_RATE * self.h["h0"], 1.0 - 2.0 * LEARNING_RATE * self.h["h1"])
        self.theta = (self.theta[0] * factors[0] ** INTERVAL, self.theta[1] * factors[1] ** INTERVAL)
        return 1.2 - self.theta[0] ** 2 - self.theta[1] ** 2


def run(arm: str, seed: int) -> float:
    """Return Q of the better of two members at the end."""
    scheduler = PBTScheduler(PBTConfig(population_size=2, seed=seed, **SEARCH, **ARMS[arm]))
    noise = np.random.default_rng(seed).normal(0.0, TIE, (STEPS // INTERVAL, 2)).tolist()
    members = [Climber(START, {"h0": h[0], "h1": h[1]}) for h in BLIND]
    scores = [member.train() for member in members]
    for interval in range(1, STEPS // INTERVAL):
        records = [
            MemberRecord(place, scores[place] + noise[interval][place], dict(member.h), step=interval * INTERVAL)
            for place, member in enumerate(members)
        ]
        for decision in scheduler.decide(records):
            source, member = decision.sources[0], members[decision.member]
            member.theta = members[source.member].theta
            if arm != "copy only":
                member.h = dict(source.hyperparameters)
        scores = [member.train() for member in members]
    return max(scores)


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Figure 2 of the paper on population-based training.")
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="20 seeds, and nothing is written unless --json says where")
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    seeds = 20 if options.quick else options.seeds
    started = time.process_time()
    ends = {arm: [run(arm, seed) for seed in range(seeds)] for arm in ARMS}
    cpu_seconds = time.process_time() - started
    median = {arm: statistics.median(values) for arm, values in ends.items()}
    print(f"{'arm':14} {'median':>8} {'least':>8} {'most':>8}   {seeds} seeds, {cpu_seconds:.1f} CPU s")
    for arm, values in ends.items():
        print(f"{arm:14} {median[arm]:8.4f} {min(values):8.4f} {max(values):8.4f}")
    checks = {name: bool(check(median)) for name, check in CHECKS.items()}
    checks["400 seeds in < 5 s"] = cpu_seconds * 400 / seeds < 5.0
    for name, is_met in checks.items():
        print(f"{'met' if is_met else 'NOT met'}: {name}")
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        summary = {arm: {"median": median[arm], "min": min(values), "max": max(values)} for arm, values in ends.items()}
        versions = {"morphogen": __version__, "python": platform.python_version()}
        content = {"command": "python benchmarks/pbt/figure2.py", **versions, "seeds": seeds, "cpu_seconds": cpu_seconds}
        path.write_text(json.dumps({**content, "q": summary, "checks": checks}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
