"""What becomes of optimizer state when one member takes over another: what each strategy does at once, and in the end.

Populations of 8 small networks (16-48-1, tanh) learn a random function from batches of 32 by Adam, whose learning rate is
searched (log scale, 1e-4 to 3e-2); after every 25 steps the two worst take over one of the two best. Per seed all strategies
get the same weights, data and draws. Strategies:

    stale     weights are copied, and the member's own moments stay: wrong, the control that a test has to find
    reset     moments and steps are forgotten
    copy      moments and steps of the source
    rescale   the same, first moments scaled so that the velocity does not jump when the rate does
    adaptive  rescaled where the rates are within a factor of ten, else reset
    partial   second moments and steps of the source, first moments zero

and printed of them

    alignment   cosine between the first moments and the gradient over 1024 samples, all parameters, right after the exploit
    5 steps     loss five steps after the exploit over that of the source five steps on, minus 1: median, 90th percentile
    final       loss of the best member at the end, as geometric mean of the ratio to "copy" by seed, with a 95 % t-interval of
                its logarithm, and the seeds in which it was lower than with copy (p of a sign test)

Medians are over exploits, with a 95 % interval from resampling seeds.

    python benchmarks/pbt/strategies.py [--seeds 24] [--intervals 30] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, t as student
from torch import Tensor, nn

from morphogen.pbt import LearningRate, PBTConfig, PopulationResult, PopulationTrainer, StateMember
from morphogen.state import RandomStreams, TrainingState, draw_from
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "pbt_strategies.json"
STEPS, EARLY = 25, 5
STRATEGIES: Mapping[str, Any] = {
    "stale": "reset",
    "reset": "reset",
    "copy": "copy",
    "rescale": "rescale",
    "adaptive": "adaptive",
    "partial": ("exp_avg_sq", "step"),
}


class Learner(StateMember):
    """A member that also says how it stood after the first steps of an interval, and how its moments lay before them."""

    def __init__(self, task: int, rate: float, seed: int, *, is_stale: bool) -> None:
        streams = RandomStreams(seed)
        with draw_from(streams.torch("weights")):
            self.model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 1))
        with draw_from(RandomStreams(task).torch("teacher")):
            self.teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)
        self.teacher[0].weight.mul_(4.0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)
        self.data = streams.torch("data")
        self.test_N16 = torch.randn(1024, 16, generator=RandomStreams(task).torch("test"))
        state = TrainingState(self.model, self.optimizer, extras={"data": self.data})
        super().__init__(state, step=self._learn, score=lambda: 0.0, knobs={"rate": LearningRate(state)})
        self._is_stale = is_stale

    def train(self, until: int) -> dict[str, float]:
        alignment = self._alignment()
        super().train(min(until, self.num_steps + EARLY))
        early = self._test_loss()
        super().train(until)
        return {"score": -self._test_loss(), "early": early, "alignment": alignment}

    def adopt(self, values: Mapping[str, Any], optimizer: Any, seed: int) -> None:
        own = copy.deepcopy(self.optimizer.state_dict()["state"])
        super().adopt(values, optimizer, seed)
        if self._is_stale:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": own})

    def _loss(self, input_B16: Tensor) -> Tensor:
        return (self.model(input_B16) - self.teacher(input_B16)).square().mean()

    def _learn(self) -> None:
        loss = self._loss(torch.randn(32, 16, generator=self.data))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _test_loss(self) -> float:
        with torch.no_grad():
            return float(self._loss(self.test_N16))

    def _alignment(self) -> float:
        """Return the cosine of first moments and gradient; NaN without moments."""
        moments = [self.optimizer.state[p]["exp_avg"] for p in self.model.parameters() if self.optimizer.state[p]]
        if not moments or not any(moment.any() for moment in moments):
            return math.nan
        gradients = torch.autograd.grad(self._loss(self.test_N16), [*self.model.parameters()])
        flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (moments, gradients)]
        return float(torch.cosine_similarity(*flat, dim=0))


def run(strategy: str, seed: int, intervals: int) -> PopulationResult:
    """Train a population."""

    def make(place: int, hyperparameters: Mapping[str, Any], member_seed: int) -> Learner:
        return Learner(seed, hyperparameters["rate"], member_seed, is_stale=strategy == "stale")

    config = PBTConfig(
        population_size=8,
        total_steps=STEPS * intervals,
        perturbation_interval=STEPS,
        hyperparameters={"rate": {"kind": "log_float", "low": 1e-4, "high": 3e-2}},
        truncation_ratio=0.25,
        explore_method="perturb",
        optimizer_exploit_strategy=STRATEGIES[strategy],
        synchronous=True,
        seed=seed,
    )
    return PopulationTrainer(make, config).run()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a population came to."""

    final: float
    early: tuple[float, ...]
    alignment: tuple[float, ...]

    @classmethod
    def of(cls, result: PopulationResult) -> Outcome:
        """Read it off reports and exploits."""
        metrics = {(report.member, report.interval): report.metrics for report in result.reports}
        pairs = [(metrics[each.member, each.interval + 1], metrics[each.source, each.interval + 1]) for each in result.exploits]
        early = tuple(child["early"] / source["early"] - 1.0 for child, source in pairs)
        return cls(-result.score, early, tuple(child["alignment"] for child, _ in pairs))


def resampled(by_seed: Sequence[Sequence[float]], statistic: Any) -> tuple[float, float, float]:
    """Return a statistic of all values, and a 95 % interval of it from resampling seeds; NaN where there are none."""
    values = [[value for value in own if math.isfinite(value)] for own in by_seed]
    if not any(values):
        return math.nan, math.nan, math.nan
    chance = np.random.default_rng(0)
    draws = [chance.integers(len(values), size=len(values)) for _ in range(500)]
    found = [statistic(np.concatenate([values[place] for place in drawn])) for drawn in draws]
    return float(statistic(np.concatenate(values))), *(float(bound) for bound in np.percentile(found, [2.5, 97.5]))


def row_of(outcomes: Sequence[Outcome], copied: Sequence[Outcome]) -> dict[str, Any]:
    """Return the numbers of a strategy, finals paired by seed with those of "copy"."""
    logs = [math.log(own.final / other.final) for own, other in zip(outcomes, copied, strict=True)]
    mean, half = statistics.fmean(logs), 0.0
    if len(logs) > 1:
        half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    lower, unequal = sum(value < 0 for value in logs), sum(value != 0 for value in logs)
    return {
        "alignment": resampled([outcome.alignment for outcome in outcomes], np.median),
        "early_median": resampled([outcome.early for outcome in outcomes], np.median),
        "early_p90": resampled([outcome.early for outcome in outcomes], functools.partial(np.percentile, q=90)),
        "final_ratio": (math.exp(mean), math.exp(mean - half), math.exp(mean + half)),
        "lower_than_copy": (lower, unequal, float(binomtest(lower, unequal).pvalue) if unequal else 1.0),
        "exploits": sum(len(outcome.early) for outcome in outcomes),
        "final_by_seed": [outcome.final for outcome in outcomes],
    }


def report(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    print(f"{'strategy':9} {'alignment':>22} {'5 steps, median %':>24} {'90 %':>7} {'final to copy':>22}  lower")
    for name, row in rows.items():
        middle, low, high = row["alignment"]
        aligned = "-" if math.isnan(middle) else f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        middle, low, high = (100 * value for value in row["early_median"])
        early = f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        ratio, low, high = row["final_ratio"]
        lower, unequal, p_value = row["lower_than_copy"]
        final = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
        last = f"{100 * row['early_p90'][0]:+7.1f} {final:>22}  {lower} of {unequal} (p {p_value:.2g})"
        print(f"{name:9} {aligned:>22} {early:>24} {last}")


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Strategies for optimizer state at an exploit: an ablation.")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--intervals", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="2 seeds, 4 intervals, and nothing is written without --json")
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    seeds, intervals = (2, 4) if options.quick else (options.seeds, options.intervals)
    torch.set_num_threads(1)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in STRATEGIES}
    for seed in range(seeds):
        for name, own in outcomes.items():
            own.append(Outcome.of(run(name, seed, intervals)))
        print(f"seed {seed}: {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
    rows = {name: row_of(own, outcomes["copy"]) for name, own in outcomes.items()}
    report(rows)
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        command = f"python benchmarks/pbt/strategies.py --seeds {seeds} --intervals {intervals}"
        versions = {"morphogen": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {"command": command, **versions, "cpu_seconds": round(time.process_time()), "strategies": rows}
        path.write_text(json.dumps(_without_nan(content), indent=1) + "\n")
        print(f"written to {path}")


def _without_nan(value: Any) -> Any:
    """Return ``value`` with None in place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
