"""What a governor saves, and what it costs a healthy run: whole runs from their first step in the loop of the README.

Recovered accuracy: each task of ``fault_suite`` is trained for a fixed number of batches, once as it is, once with a fault,
and once with the same fault under a ``Governor`` with the default config, that is shown loss, outputs, labels and, where the
loop clips, the gradient norm. The fault is drawn for each seed: its kind from all that fit the task, its step from the middle
half of the run, its strength the default. A step that a rewind brings back is not hit again. A fault of many steps goes on in
those it has not hit yet ("governed"), or it passes with the first rewind ("passing"): both are tried. All runs draw the same
number of batches: skipped steps are lost, rewound ones are made again. A run is *within* if each metric is not worse than the
95 % prediction interval of a single healthy run, mean +- t * deviation * sqrt(1 + 1/n); a run that collapsed is not. It is
*damaged* if it is more than 10 % worse than its healthy twin, by the rule of ``detection.py``. What chance alone does is shown
by a control: the healthy run that loses one batch at the fault's step, and nothing else.

Live false alarms: every kind of healthy run of ``healthy`` under a governor, next to its twin without one. A run in which no
step was stopped must end with the same weights, bit for bit.

    python benchmarks/governor/recovery.py [--quick] [--only fault|healthy] [--reports DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import healthy
import torch
from fault_suite import TASKS, unfit_left_out
from live import Governed, LiveRun
from scipy.special import stdtrit
from tasks import Task

from morphogen.governor.faults import KINDS, Fault, Schedule
from morphogen.state import RandomStreams

RESULTS = Path(__file__).parents[1] / "results" / "governor_recovery.json"
RUN_STEPS = {"sequence": 500}
DEFAULT_STEPS = 1000
FAULT_SEEDS, QUICK_FAULT_SEEDS = range(100, 120), range(100, 106)
HEALTHY_SEEDS, QUICK_HEALTHY_SEEDS = range(20, 22), range(20, 21)
"""Other runs than those of ``detection.py``."""
LOWER_IS_BETTER = {"loss": True, "accuracy": False}
DAMAGE = 0.1
BRIEF_STEPS = 5
"""Faults are at work for so many steps at most, or for 30 and more."""
WORLD = 0
"""One task for all seeds, so that runs differ by the chance of training alone."""
WAYS = ("healthy", "control", "ungoverned", "governed", "passing")

Metrics = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One seed of one task: how it ended healthy, with a batch less, and with its fault without and with a governor."""

    task: str
    seed: int
    fault: Fault
    ended: dict[str, Metrics]
    told: dict[str, Governed]

    def excess(self, way: str) -> float:
        """By what share the loss is worse than the healthy twin's."""
        loss = self.ended[way]["loss"]
        return TASKS[self.task].excess(loss, self.ended["healthy"]["loss"]) if math.isfinite(loss) else math.inf

    def is_damaged(self, way: str) -> bool:
        """Whether it ended more than 10 % worse than the healthy twin."""
        return not self.excess(way) <= DAMAGE

    def row(self) -> dict[str, Any]:
        """Return it for the results."""
        named = {"task": self.task, "seed": self.seed, "kind": self.fault.kind, "step": self.fault.step}
        named["lasted_steps"] = self.fault.duration_steps
        excess = {way: self.excess(way) for way in WAYS[1:]}
        return named | self.ended | {"excess": excess, "told": {way: told.counts() for way, told in self.told.items()}}


# -- recovered accuracy ----------------------------------------------------------------------------------------------


def trials_of(name: str, seeds: Sequence[int], total_steps: int) -> list[Trial]:
    """Run one task with all seeds, each with a fault of another kind as long as there are kinds."""
    task, chance = TASKS[name], RandomStreams(0).torch("faults", name)
    kinds = fitting_kinds(task)
    order = torch.randperm(len(kinds), generator=chance).tolist()
    trials: list[Trial] = []
    for index, seed in enumerate(seeds):
        step = int(torch.randint(total_steps // 4, 3 * total_steps // 4, (), generator=chance))
        fault = Fault(step, kinds[order[index % len(order)]])
        trials.append(_trial(name, seed, fault, total_steps))
    return trials


def fitting_kinds(task: Task) -> list[str]:
    """Return the kinds of fault that can happen to the task's runs, in the order of the table."""
    live = LiveRun(task.build(0))
    live.train(2)  # moments are made by the first step
    settled = live.run.state.capture()
    found: list[str] = []
    for kind in KINDS:
        with unfit_left_out():
            live.run.state.restore(settled)
            live.train(3, Schedule([Fault(2, kind)], live.run.state, RandomStreams(0).torch("fault", kind)))
            found.append(kind)
    return found


def _trial(name: str, seed: int, fault: Fault, total_steps: int) -> Trial:
    live = _build(name, seed)
    live.train(fault.step)
    before = live.run.state.capture()
    live.train(total_steps)
    ended = {"healthy": live.metrics()}
    live.run.state.restore(before)
    live.lose_batch()
    live.train(total_steps)
    ended["control"] = live.metrics()
    live.run.state.restore(before)
    live.train(total_steps, _schedule(fault, live, seed))
    ended["ungoverned"] = live.metrics()
    told: dict[str, Governed] = {}
    for way in ("governed", "passing"):
        if told and (fault.duration_steps == 1 or not told["governed"].rewinds):  # the same again
            told[way], ended[way] = told["governed"], ended["governed"]
            continue
        live = _build(name, seed)
        told[way] = live.train_governed(total_steps, _schedule(fault, live, seed), passing=way == "passing")
        ended[way] = live.metrics()
    return Trial(name, seed, fault, ended, told)


def _build(name: str, seed: int) -> LiveRun:
    task = TASKS[name]
    return LiveRun(task.build(seed, world=WORLD) if task.has_world else task.build(seed))


def _schedule(fault: Fault, live: LiveRun, seed: int) -> Schedule:
    return Schedule([fault], live.run.state, RandomStreams(seed).torch("fault", fault.kind))


@dataclass(frozen=True)
class Interval:
    """Where a single healthy run ends with 95 % probability."""

    mean: float
    low: float
    high: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the prediction interval of one more value like these."""
        mean, n = statistics.mean(values), len(values)
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
        return cls(mean, mean - half, mean + half, min(values), max(values))

    def contains(self, value: float, lower_is_better: bool) -> bool:
        """Whether ``value`` is a number no worse than the interval."""
        return math.isfinite(value) and (value <= self.high if lower_is_better else value >= self.low)


def judged(trials: Sequence[Trial]) -> tuple[dict[str, Any], list[dict[str, bool]]]:
    """Return what became of one task's runs, and for each trial which of its runs are within."""
    names = list(trials[0].ended["healthy"])
    intervals = {name: Interval.of([trial.ended["healthy"][name] for trial in trials]) for name in names}

    def is_within(trial: Trial, way: str, among: Iterable[str]) -> bool:
        if way in trial.told and trial.told[way].collapsed:
            return False
        return all(intervals[name].contains(trial.ended[way][name], LOWER_IS_BETTER[name]) for name in among)

    metrics = {
        name: {
            "healthy": dataclasses.asdict(intervals[name]),
            "median": {way: _median([trial.ended[way][name] for trial in trials], LOWER_IS_BETTER[name]) for way in WAYS},
            "within": {way: sum(is_within(trial, way, [name]) for trial in trials) for way in WAYS},
        }
        for name in names
    }
    within = [{way: is_within(trial, way, names) for way in WAYS} for trial in trials]
    return {"metrics": metrics, **counted(list(zip(trials, within, strict=True)))}, within


def counted(those: Sequence[tuple[Trial, dict[str, bool]]]) -> dict[str, Any]:
    """Return how many of some runs are within, damaged and so on."""
    totals = {
        name: {way: sum(trial.told[way].counts()[name] for trial, _ in those) for way in WAYS[3:]}
        for name in ("rewinds", "skipped_steps", "collapsed", "level_shifts")
    }
    return {
        "runs": len(those),
        "within": {way: sum(within[way] for _, within in those) for way in WAYS},
        "damaged": {way: sum(trial.is_damaged(way) for trial, _ in those) for way in WAYS},
        **totals,
    }


def _median(values: Sequence[float], lower_is_better: bool) -> float:
    """Return the median, where what is not finite is worse than anything."""
    worst = math.inf if lower_is_better else -math.inf
    return statistics.median(value if math.isfinite(value) else worst for value in values)


def recovered_accuracy(seeds: Sequence[int], share: float, reports: Path | None) -> dict[str, Any]:
    """Run all tasks for ``share`` of their length, print tables, and return everything."""
    tasks: dict[str, Any] = {}
    found: list[tuple[Trial, dict[str, bool]]] = []
    for name in TASKS:
        started, steps = time.perf_counter(), round(share * RUN_STEPS.get(name, DEFAULT_STEPS))
        trials = trials_of(name, seeds, steps)
        summary, within = judged(trials)
        tasks[name] = {"steps": steps, **summary}
        found += zip(trials, within, strict=True)
        print(f"{time.perf_counter() - started:6.0f} s  {name}: {len(trials)} faults", file=sys.stderr, flush=True)
    brief = [(trial, within) for trial, within in found if trial.fault.duration_steps <= BRIEF_STEPS]
    lasting = [(trial, within) for trial, within in found if trial.fault.duration_steps > BRIEF_STEPS]
    durations = {"brief": counted(brief), "lasting": counted(lasting), "all": counted(found)}
    print(_recovery_table(tasks) + "\n\n" + _durations_table(durations))
    short = [trial for trial, within in found if not within["governed"]]
    damaged = [trial for trial, within in found if within["governed"] and trial.is_damaged("governed")]
    for title, those in {"outside the interval": short, "within it, but 10 % worse than the healthy twin": damaged}.items():
        print(f"\ngoverned runs {title}: {len(those)} of {len(found)}")
        print("\n".join(_described(trial) for trial in those))
    for trial in (*short, *damaged) if reports is not None else ():
        (reports / f"{trial.task}-{trial.seed}-{trial.fault.kind}.txt").write_text(trial.told["governed"].report + "\n")
    rows = [trial.row() | {"within": within} for trial, within in found]
    seen = {f"{t.task} seed {t.seed} {t.fault}": t.told["governed"].seen for t in (*short, *damaged)}
    return {"tasks": tasks, "durations": durations, "seen_in_runs_that_fell_short": seen, "runs": rows}


def _slashed(counts: dict[str, int], ways: Sequence[str] = WAYS) -> str:
    return "/".join(str(counts[way]) for way in ways if way in counts)


def _durations_table(durations: dict[str, Any]) -> str:
    lines = [
        f"brief: faults of up to {BRIEF_STEPS} steps, lasting: of 30 and more",
        f"{'':8}{'runs':>6}{'within h/c/u/g/p':>20}"
        f"{'worse c/u/g/p':>16}{'rewinds':>10}{'skipped':>12}{'collapsed':>11}{'level shifts':>14}",
    ]
    for name, summary in durations.items():
        within, worse = _slashed(summary["within"]), _slashed(summary["damaged"], WAYS[1:])
        counts = "".join(
            f"{_slashed(summary[key]):>{width}}"
            for key, width in (("rewinds", 10), ("skipped_steps", 12), ("collapsed", 11), ("level_shifts", 14))
        )
        lines.append(f"{name:>8}{summary['runs']:>6}{within:>20}{worse:>16}{counts}")
    return "\n".join(lines)


def _described(trial: Trial) -> str:
    numbers = ", ".join(
        f"{name} {trial.ended['governed'][name]:.4g} ("
        + ", ".join(f"{way} {trial.ended[way][name]:.4g}" for way in WAYS if way != "governed")
        + ")"
        for name in trial.ended["healthy"]
    )
    told = trial.told["governed"]
    counts = f"{told.rewinds} rewinds, {told.skipped_steps} skipped" + (", collapsed" if told.collapsed else "")
    head = f"  {trial.task:11} seed {trial.seed}  {trial.fault.kind} at step {trial.fault.step}: {numbers}; {counts}"
    return "\n".join((head, *(f"      {line}" for line in told.seen)))


def _recovery_table(summaries: dict[str, Any]) -> str:
    widths = (10, 8, 7, 18, 20, 8, 8, 8, 13, 7, 9, 5)
    heads = (
        "healthy",
        "95 % interval",
        "within h/c/u/g/p",
        "median u",
        "g",
        "p",
        "worse c/u/g/p",
        "rewinds",
        "skipped",
        "steps",
    )
    lines = [
        "h: healthy, c: control, u: ungoverned, g: governed, p: governed, passing faults",
        _line(("task", "metric", *heads), widths),
    ]
    for name, summary in summaries.items():
        for metric, found in summary["metrics"].items():
            healthy, within, median = found["healthy"], found["within"], found["median"]
            sign = -1 if name == "ppo" else 1  # its loss is minus the mean return
            low, high = sorted((sign * healthy["low"], sign * healthy["high"]))
            cells = [name, "return" if name == "ppo" else metric, f"{sign * healthy['mean']:.4g}", f"{low:.4g} to {high:.4g}"]
            cells += [f"{_slashed(within)} of {summary['runs']}"]
            cells += [f"{sign * median[way]:.4g}" for way in WAYS[2:]]
            cells += [_slashed(summary["damaged"], WAYS[1:])]
            cells += [_slashed(summary["rewinds"]), _slashed(summary["skipped_steps"]), str(summary["steps"])]
            lines.append(_line(cells, widths))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


# -- live false alarms -----------------------------------------------------------------------------------------------


def healthy_runs(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Train every kind of healthy run with and without a governor."""
    for name, kind in healthy.KINDS.items():
        started = time.perf_counter()
        for seed in seeds:
            twin, live = LiveRun(kind.build(seed)), LiveRun(kind.build(seed))
            twin.train(kind.steps)
            governed = live.train_governed(kind.steps)
            same = _same_weights(twin, live)
            alarms = governed.alarm_steps
            named = {"kind": name, "seed": seed, "steps": kind.steps, "shift_step": kind.shift_step}
            told = {"alarms": len(alarms), **governed.counts(), "identical": same}
            yield named | told | {"governed": live.metrics(), "twin": twin.metrics(), "seen": governed.seen}
        print(f"{time.perf_counter() - started:6.0f} s  {name}: {len(seeds)} healthy runs", file=sys.stderr, flush=True)


def _same_weights(left: LiveRun, right: LiveRun) -> bool:
    ours, theirs = left.run.model.state_dict(), right.run.model.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def false_alarms(seeds: Sequence[int]) -> dict[str, Any]:
    """Run all kinds, print what alarmed, and return everything."""
    rows = list(healthy_runs(seeds))
    steady = [row for row in rows if not row["shift_step"]]
    shifts = [row for row in rows if row["shift_step"]]
    found = {"steady": alarm_summary(steady), "abrupt_shifts": alarm_summary(shifts)}
    for name, summary in found.items():
        print(
            "\n{name}: {runs} healthy runs, {steps} steps: {alarms} alarms = {alarms_per_1000_steps:.3f} per 1,000 steps, in "
            "{runs_alarmed} runs; {rewinds} rewinds, {level_shifts} level shifts accepted, {collapsed} collapsed; of "
            "{untouched} without an alarm {identical} are as without a governor, bit for bit".format(name=name, **summary)
        )
    for row in (row for row in rows if row["alarms"] or row["level_shifts"]):
        ends = ", ".join(f"{key} {value:.4g} (twin {row['twin'][key]:.4g})" for key, value in row["governed"].items())
        print("  {kind:24} seed {seed}  {skipped_steps} skipped, {rewinds} rewinds: {ends}".format(ends=ends, **row))
        for line in row["seen"]:
            print(f"      {line}")
    return found | {"runs": rows}


def alarm_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return counts over some runs."""
    untouched = [row for row in rows if not row["alarms"]]
    totals = {key: sum(row[key] for row in rows) for key in ("steps", "observations", "alarms", "skipped_steps", "rewinds")}
    return totals | {
        "runs": len(rows),
        "alarms_per_1000_steps": 1000 * totals["alarms"] / totals["observations"],
        "runs_alarmed": len(rows) - len(untouched),
        "level_shifts": sum(row["level_shifts"] for row in rows),
        "collapsed": sum(row["collapsed"] for row in rows),
        "untouched": len(untouched),
        "identical": sum(row["identical"] for row in untouched),
    }


# -- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Run both sections, print the tables, write the results."""
    parser = argparse.ArgumentParser(description="What a governor saves of faulty runs, and what it costs healthy ones.")
    parser.add_argument(
        "--quick", action="store_true", help="six faults a task in runs of half the length, about three minutes"
    )
    parser.add_argument("--only", choices=("fault", "healthy"), help="one section alone")
    parser.add_argument("--reports", type=Path, help="where the governor's report of each run that fell short goes")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.reports is not None:
        options.reports.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    flags = (" --quick" if options.quick else "") + (f" --only {options.only}" if options.only else "")
    results: dict[str, Any] = {
        "command": "python benchmarks/governor/recovery.py" + flags,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if options.only != "healthy":
        seeds, share = (QUICK_FAULT_SEEDS, 0.5) if options.quick else (FAULT_SEEDS, 1.0)
        results["recovered_accuracy"] = recovered_accuracy(seeds, share, options.reports)
    if options.only != "fault":
        results["false_alarms"] = false_alarms(QUICK_HEALTHY_SEEDS if options.quick else HEALTHY_SEEDS)
    results["seconds"] = round(time.perf_counter() - started)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    print(f"written to {options.json}")


def _plain(value: Any) -> Any:
    """Return ``value`` with None for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
