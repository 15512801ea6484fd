"""Growth against honest controls: the same task, paired seeds, the learning rate of every arm tuned over the same grid.

Arms: ``heuristic``, ``random`` and ``periodic`` grow, by the policy of that name; ``static`` is the host as it is, ``full`` the
host with all growth built in from the start, ``full_equal_flops`` that for as many steps as the FLOPs of the heuristic's run of
the same seed pay for, ``static_final`` the network that run discovered, trained from scratch for those FLOPs, and ``wide`` (and
``wide_equal_flops``), where the literature names one, a plain network of the usual size.

Learning rates are chosen by the mean metric on the decision split over seeds that are used for nothing else; the test split is
read once, at the end of the runs that are reported. FLOPs are those of all training steps, of failed seeds too, and of scoring
seeds. Differences are paired by seed, heuristic minus the other, with 95 % Student intervals.

    python benchmarks/growth/controls.py --task mnist1d [--seeds 10] [--tuning-seeds 3] [--workers 2] [--json PATH]

Each finished run is appended to the cache, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, WIDE, Outcome, Spec, run

from morphogen import tasks
from morphogen.recipes.results import Interval, interval

RESULTS = Path(__file__).parents[1] / "results"
GRID = (0.25, 0.5, 1.0, 2.0)
"""Learning rates tried, in units of the task's own."""
FIRST_TUNING_SEED = 1000
FINAL_ARMS = ("full_equal_flops", "static_final", "wide_equal_flops")
"""Arms whose length or structure depends on the heuristic's run of the same seed."""


class Runner:
    """Runs specs in worker processes and remembers what came of them.

    Args:
        cache: A JSON line for each finished run.
        workers: Processes.
    """

    def __init__(self, cache: Path, workers: int) -> None:
        self._cache, self._workers = cache, workers
        lines = cache.read_text().splitlines() if cache.exists() else []
        self._known = {entry["key"]: _outcome(entry["outcome"]) for entry in map(json.loads, lines)}

    def run(self, specs: Iterable[Spec]) -> dict[Spec, Outcome]:
        """Return the outcome of each spec."""
        wanted = list(dict.fromkeys(specs))
        missing = [spec for spec in wanted if spec.key not in self._known]
        with ProcessPoolExecutor(self._workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run, spec): spec for spec in missing}
            for done, future in enumerate(as_completed(futures), start=1):
                spec, outcome = futures[future], future.result()
                self._known[spec.key] = outcome
                with self._cache.open("a") as file:
                    file.write(json.dumps({"key": spec.key, "outcome": dataclasses.asdict(outcome)}) + "\n")
                numbers = f"{outcome.test:.4f} with {outcome.parameters:,} parameters, {outcome.flops / 1e9:.2f} GFLOP"
                print(f"{done}/{len(missing)} {spec.arm} lr {spec.learning_rate:.4g} seed {spec.seed}: {numbers}", flush=True)
        return {spec: self._known[spec.key] for spec in wanted}


def _outcome(data: dict[str, Any]) -> Outcome:
    return Outcome(**{**data, "fossils": tuple((slot, blueprint) for slot, blueprint in data["fossils"])})


class Comparison:
    """All arms of one task.

    Args:
        task: Name of the task.
        rates: Learning rates to choose from.
        seeds: Of the runs that are reported.
        tuning_seeds: Of the runs that choose learning rates.
        runner: Runs them.
        total_steps: Length of a run; None for the task's.
    """

    def __init__(
        self,
        task: str,
        rates: Sequence[float],
        seeds: Sequence[int],
        tuning_seeds: Sequence[int],
        *,
        runner: Runner,
        total_steps: int | None = None,
    ) -> None:
        self.task, self.rates, self.seeds, self.tuning_seeds, self._runner = task, rates, seeds, tuning_seeds, runner
        self.total_steps = total_steps or tasks.get(task).total_steps
        self.arms = [*ARMS, *(["wide", "wide_equal_flops"] if task in WIDE else [])]

    def tune(self) -> dict[str, dict[float, float]]:
        """Return arm -> learning rate -> mean metric on the decision split."""
        first = [arm for arm in self.arms if arm not in FINAL_ARMS]
        tried = [(rate, seed) for rate in self.rates for seed in self.tuning_seeds]
        found = self._runner.run(self._spec(arm, rate, seed) for arm in first for rate, seed in tried)
        scores = self._scores(found)
        guides = {seed: found[self._spec("heuristic", best(scores["heuristic"]), seed)] for seed in self.tuning_seeds}
        steps = {spec: self._flops_per_step(spec, outcome) for spec, outcome in found.items()}
        later = [
            self._later(arm, rate, seed, guides[seed], self._per_step(arm, seed, steps, guides))
            for arm in self.arms
            if arm in FINAL_ARMS
            for rate, seed in tried
        ]
        return scores | self._scores(self._runner.run(later))

    def compare(self, chosen: dict[str, float]) -> dict[str, dict[int, Outcome]]:
        """Return arm -> seed -> outcome at each arm's own learning rate."""
        arms = [arm for arm in self.arms if arm not in FINAL_ARMS]
        first = {(arm, seed): self._spec(arm, chosen[arm], seed) for arm in arms for seed in self.seeds}
        found = self._runner.run(first.values())
        guides = {seed: found[first["heuristic", seed]] for seed in self.seeds}
        steps = {spec: self._flops_per_step(spec, outcome) for spec, outcome in found.items()}
        later = {
            (arm, seed): self._later(arm, chosen[arm], seed, guides[seed], self._per_step(arm, seed, steps, guides))
            for arm in self.arms
            if arm in FINAL_ARMS
            for seed in self.seeds
        }
        found |= self._runner.run(later.values())
        return {arm: {seed: found[(first | later)[arm, seed]] for seed in self.seeds} for arm in self.arms}

    def _spec(self, arm: str, rate: float, seed: int) -> Spec:
        return Spec(task=self.task, arm=arm, learning_rate=rate, seed=seed, total_steps=self.total_steps)

    def _later(self, arm: str, rate: float, seed: int, guide: Outcome, per_step: float) -> Spec:
        """Return the run that costs what ``guide`` did."""
        steps = max(1, round(guide.flops / per_step))
        fossils = guide.fossils if arm == "static_final" else ()
        return Spec(task=self.task, arm=arm, learning_rate=rate, seed=seed, total_steps=steps, fossils=fossils)

    def _per_step(self, arm: str, seed: int, steps: dict[Spec, float], guides: dict[int, Outcome]) -> float:
        """Return the FLOPs of one step of ``arm``; those of a discovered network are counted in a run of one step."""
        if arm != "static_final":
            return next(cost for spec, cost in steps.items() if spec.arm == arm.removesuffix("_equal_flops"))
        probe = dataclasses.replace(self._spec(arm, self.rates[0], seed), total_steps=1, fossils=guides[seed].fossils)
        return self._flops_per_step(probe, self._runner.run([probe])[probe])

    @staticmethod
    def _flops_per_step(spec: Spec, outcome: Outcome) -> float:
        return outcome.flops / spec.total_steps

    def _scores(self, found: dict[Spec, Outcome]) -> dict[str, dict[float, float]]:
        pairs = {(spec.arm, spec.learning_rate) for spec in found}
        scores: dict[str, dict[float, float]] = {}
        for arm, rate in sorted(pairs):
            values = [o.decision for spec, o in found.items() if (spec.arm, spec.learning_rate) == (arm, rate)]
            scores.setdefault(arm, {})[rate] = statistics.fmean(values)
        return scores


def best(scores: dict[float, float]) -> float:
    """Return the learning rate with the best score."""
    return max(scores, key=lambda rate: scores[rate])


def summary(comparison: Comparison, scores: dict[str, dict[float, float]], outcomes: dict[str, dict[int, Outcome]]) -> Any:
    """Return the comparison as JSON data."""
    guide = outcomes["heuristic"]
    rows: dict[str, Any] = {}
    for arm, by_seed in outcomes.items():
        difference = interval([guide[seed].test - by_seed[seed].test for seed in comparison.seeds])
        rows[arm] = {
            "learning_rate": best(scores[arm]),
            "decision_by_learning_rate": {f"{rate:.4g}": score for rate, score in scores[arm].items()},
            "test": dataclasses.asdict(interval([outcome.test for outcome in by_seed.values()])),
            "heuristic_minus_this": dataclasses.asdict(difference),
            "parameters": statistics.fmean(outcome.parameters for outcome in by_seed.values()),
            "train_flops": statistics.fmean(outcome.flops for outcome in by_seed.values()),
            "runs": {str(seed): dataclasses.asdict(outcome) for seed, outcome in by_seed.items()},
        }
    return {
        "command": "python " + " ".join(sys.argv),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "task": comparison.task,
        "total_steps": comparison.total_steps,
        "tuning_seeds": list(comparison.tuning_seeds),
        "metric": tasks.get(comparison.task).metric_name,
        "arms": rows,
    }


def table(data: Any) -> str:
    """Return the comparison as a Markdown table."""
    lines = [
        "| arm | learning rate | test | heuristic minus this | parameters | training GFLOP |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in data["arms"].items():
        test, difference = Interval(**row["test"]), Interval(**row["heuristic_minus_this"])
        lines.append(
            f"| {arm} | {row['learning_rate']:.3g} | {_shown(test, sign='')} | {_shown(difference, sign='+')} | "
            f"{row['parameters']:,.0f} | {row['train_flops'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


def _shown(found: Interval, *, sign: str) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.mean:{sign}.2f}"
    return f"{100 * found.mean:{sign}.2f} [{100 * found.low:{sign}.2f}, {100 * found.high:{sign}.2f}]"


def main() -> None:
    """Run the comparison, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=tasks.names())
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tuning-seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to try, by default around the task's own")
    parser.add_argument("--total-steps", type=int, default=None)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    target = options.json or RESULTS / f"growth_controls_{options.task}.json"
    runner = Runner(options.cache or target.with_suffix(".jsonl"), options.workers)
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    rates = options.rates or [factor * tasks.get(options.task).learning_rate for factor in GRID]
    comparison = Comparison(
        options.task, rates, range(options.seeds), tuning_seeds, runner=runner, total_steps=options.total_steps
    )
    scores = comparison.tune()
    outcomes = comparison.compare({arm: best(scores[arm]) for arm in comparison.arms})
    data = summary(comparison, scores, outcomes)
    target.write_text(json.dumps(data, indent=1) + "\n")
    print(table(data))


if __name__ == "__main__":
    main()
