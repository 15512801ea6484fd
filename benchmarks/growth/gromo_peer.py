"""Growing the width of an MLP: morphogen against gromo 0.1.0, on the same data and for the same training FLOPs.

gromo (BSD-3, https://github.com/growingnet/gromo) is a peer of this benchmark alone. It and what it needs beyond the package:

    pip install gromo==0.1.0

The network is in -> 4 -> 24 -> 10 with SELU, gromo's default activation, which all its methods suit; the first hidden layer
grows to 16 units and then to 32, at 1/5 and 2/5 of the steps of "scratch". All other arms of a seed start from the same
weights, and all see the same batches of 64; AdamW, cosine to zero. Every arm stops when it has spent the FLOPs that the final
network from scratch needs for its steps. Those of growing count: the peer's statistics and line search; incubating and failed
seeds, their scoring and gradmax's directions. As torch's counter sees matrix products alone, optimizer steps and the peer's
singular value decompositions are free.

    narrow             the network that never grows
    scratch            the final network from the first step on
    gromo tiny         as in its tutorial: statistics, optimal update and new units, line search (without the factor 0, which
                       would leave the new units dead), and a new optimizer, whose rate goes on along the cosine
    gromo gradmax      its settings for GradMax, ``gradmax_normalization``, no line search: the new units do not act at birth
    gromo zeros        Kaiming incoming, zero outgoing weights; no statistics
    ... restart        the same, with the cosine from its peak over the steps that are left, at each growth
    widen zero_out, net2net, gradmax
                       seeds of the blueprint "widen"; merged into the host's layers as soon as they are fossilised
    widen shadow       zero_out, with the other incubator
    widen boost        zero_out with the newborn policy "boost"; merged at the end, as a merged seed goes by the host's rate
    ... ungated        the same, with the shortest incubation and blending there is, and kept whatever it contributes, as the
                       peer keeps what it adds
    mlp, glu           residual seeds at the second layer instead

Statistics are of a quarter of the training split. On MNIST-1D with 1,000 steps (3 seeds) those of all of it cost the peer 22 %
of its budget rather than 6 %, for the same accuracy.

The learning rate of each arm is the one of the grid with the best mean accuracy on the decision split over seeds used for
nothing else. Test accuracies in %, with 95 % t-intervals; differences are paired by seed.

    python benchmarks/growth/gromo_peer.py [--tasks mnist1d digits] [--seeds 10] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gromo_arms import ARMS, Outcome, Spec, make

from morphogen import tasks
from morphogen.recipes.results import interval
from morphogen.tasks import TaskData
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "growth_gromo.json"
STEPS = {"mnist1d": 1500, "digits": 600}
"""Steps of the scratch arm."""
RATES = (0.015, 0.04, 0.1)
TUNING_SEEDS = (1000, 1001)
PLANNING_SEEDS = (2000, 2001, 2002)


def planned_steps(spec: Spec) -> int:
    """Return for how many steps the budget lasts, from runs that are used for nothing else; the most that was found."""
    found: list[int] = []
    for seed in PLANNING_SEEDS:
        trial = make(dataclasses.replace(spec, seed=seed, budget=math.inf))
        spent = trial.run().flops
        found.append(spec.unit_steps + math.floor((spec.budget - spent) / trial.step_flops()))
    return max(found)


def compare(data: TaskData, seeds: int, unit_steps: int) -> dict[str, Any]:
    """Tune and run every arm; return rows by arm."""
    scratch = Spec(arm=ARMS[1], data=data, rate=RATES[1], seed=0, total_steps=unit_steps, unit_steps=unit_steps)
    budget = make(scratch).step_flops() * unit_steps
    rows: dict[str, Any] = {}
    for arm in ARMS:
        spec = dataclasses.replace(scratch, arm=arm, budget=budget)
        spec = dataclasses.replace(spec, total_steps=planned_steps(spec))
        tuned = {rate: statistics.fmean(run(spec, rate, seed).decision for seed in TUNING_SEEDS) for rate in RATES}
        rate = max(RATES, key=lambda rate, tuned=tuned: tuned[rate])
        own = [run(spec, rate, seed) for seed in range(seeds)]
        rows[arm.name] = row(own, budget) | {"steps": spec.total_steps, "learning_rate": rate, "decision_by_rate": tuned}
        print(f"{arm.name}: {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
    seconds = rows["scratch"]["cpu_seconds"]
    return {name: found | {"cpu_over_scratch": found["cpu_seconds"] / seconds} for name, found in rows.items()}


def run(spec: Spec, rate: float, seed: int) -> Outcome:
    """Return what a run comes to at this rate and seed."""
    return make(dataclasses.replace(spec, rate=rate, seed=seed)).run()


def row(own: Sequence[Outcome], budget: int) -> dict[str, Any]:
    """Return the numbers of one arm."""
    return {
        "test_percent": points([outcome.test for outcome in own]),
        "decision_percent": 100 * statistics.fmean(outcome.decision for outcome in own),
        "test_percent_by_seed": [round(100 * outcome.test, 2) for outcome in own],
        "parameters": statistics.fmean(outcome.parameters for outcome in own),
        "width": statistics.fmean(outcome.width for outcome in own),
        "failed_seeds": sum(outcome.failed for outcome in own),
        "flops_over_budget": statistics.fmean(outcome.flops for outcome in own) / budget,
        "growth_flops_over_budget": statistics.fmean(outcome.growth_flops for outcome in own) / budget,
        "cpu_seconds": statistics.median(outcome.cpu_seconds for outcome in own),
    }


def points(values: Sequence[float]) -> dict[str, float]:
    """Return mean and half the width of the 95 % interval, in %."""
    found = interval(values)
    assert found.high is not None
    return {"mean": 100 * found.mean, "half_width": 100 * (found.high - found.mean)}


def add_differences(rows: dict[str, Any]) -> dict[str, Any]:
    """Add to each row its paired differences; return which arms of each library do best on the decision split, in tuning."""

    def best_of(names: Sequence[str]) -> str:
        return max(names, key=lambda name: max(rows[name]["decision_by_rate"].values()))

    best = {"peer": best_of([arm.name for arm in ARMS if arm.peer]), "seeds": best_of([arm.name for arm in ARMS if arm.seeds])}
    for found in rows.values():
        for title, other in (("minus_scratch", "scratch"), ("minus_best_gromo", best["peer"])):
            pairs = zip(found["test_percent_by_seed"], rows[other]["test_percent_by_seed"], strict=True)
            found[title] = points([(own - base) / 100 for own, base in pairs])
    return {"best_gromo": best["peer"], "best_morphogen": best["seeds"]}


def print_table(task: str, rows: dict[str, Any], best: dict[str, Any]) -> None:
    print(f"\n{task}; best on the decision split: {best['best_gromo']}, {best['best_morphogen']}")
    titles = ("test %", "- scratch", "- best gromo")
    print(f"{'arm':22} {'lr':>6} {titles[0]:>14} {titles[1]:>15} {titles[2]:>15} params  FLOPs growing steps failed   CPU")
    for name, found in rows.items():
        spans = [found[key] for key in ("test_percent", "minus_scratch", "minus_best_gromo")]
        signed = zip(spans, ("", "+", "+"), strict=True)
        texts = [f"{span['mean']:{sign}.2f} +-{span['half_width']:.2f}" for span, sign in signed]
        print(
            f"{name:22} {found['learning_rate']:6g} {texts[0]:>14} {texts[1]:>15} {texts[2]:>15} {found['parameters']:6.0f} "
            f"{found['flops_over_budget']:6.3f} {found['growth_flops_over_budget']:7.3f} {found['steps']:5d} "
            f"{found['failed_seeds']:6d} {found['cpu_over_scratch']:5.2f}"
        )


def main() -> None:
    """Measure, print the tables, and write the results."""
    parser = argparse.ArgumentParser(description="Growing the width of an MLP, against gromo.")
    parser.add_argument("--tasks", nargs="+", default=["mnist1d", "digits"], choices=sorted(STEPS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # what it says at every growth: sizes have changed, a factor is the one that was set
    warnings.filterwarnings("ignore", module=r"gromo\..*")
    for task in options.tasks:
        rows = compare(tasks.get(task).load(), options.seeds, STEPS[task])
        best = add_differences(rows)
        print_table(task, rows, best)
        write(options.json, task, {"seeds": options.seeds, "budget_steps": STEPS[task], "rates": RATES, **best, "arms": rows})
    print(f"written to {options.json}")


def write(path: Path, task: str, results: dict[str, Any]) -> None:
    """Put the results of ``task`` beside those of other tasks in the file at ``path``."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    command = f"python benchmarks/growth/gromo_peer.py --tasks {task} --seeds {results['seeds']}"
    versions = {"morphogen": __version__, "gromo": importlib.metadata.version("gromo"), "torch": torch.__version__}
    content[task] = {"command": command, **versions, "python": platform.python_version(), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
