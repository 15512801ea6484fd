"""How many faults the governor's detectors find, how soon, and how often they cry wolf; published rules on the same traces.

Small runs (a BatchNorm classifier, imbalanced classes, a transformer, a regression whose loss crosses zero, PPO on CartPole,
and a convolutional network that no threshold was chosen on) are trained until settled and then meet every kind of fault of
``morphogen.governor.faults``; each is compared with its healthy twin, which goes on with the same batches. A fault is
*damaging* when 120 steps later the evaluation loss is more than 10 % worse than the twin's (for the regression: the typical
error e^loss; for PPO: the mean return), or not finite. It counts as found when the first alarm from its first step on comes
within 50 steps. Healthy runs are recorded from their first step, and every alarm in one is false. Benign events are mild
faults that did no damage. Nothing interferes with the runs: detectors are replayed over what was recorded.

    python benchmarks/governor/detection.py [--quick] [--cache DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scoring
import torch
from fault_suite import record_all
from peers import PEERS
from scoring import GovernorWatch, Outcome, PeerWatch, Watcher
from traces import Record, Trace, load

from morphogen.governor import GovernorConfig
from morphogen.governor.detectors import standard_detectors
from morphogen.governor.faults import FAMILIES

RESULTS = Path(__file__).parents[1] / "results" / "governor_detection.json"
TABLES: dict[str, Callable[[Record], bool]] = {
    "all": lambda record: not record.weak,
    "tune": lambda record: record.split == "tune" and not record.weak,
    "held_out": lambda record: record.split == "held_out" and not record.weak,
    "never_tuned": lambda record: record.split == "never_tuned" and not record.weak,
    "weak": lambda record: record.weak or record.role != "fault",
}
OURS, BLIND = "morphogen", "morphogen, loss and gradient norm alone"


def main() -> None:
    """Record what is not in the cache, replay, print the tables, write the results."""
    parser = argparse.ArgumentParser(description="Recall, latency and false alarms of fault detectors on recorded runs.")
    parser.add_argument("--quick", action="store_true", help="one seed of each split, about three minutes")
    parser.add_argument("--cache", type=Path, help="where traces are kept; what is there is not recorded again")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scoring.check()
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        traces = load(cache, record_all(cache, options.quick))
    found = {name: _timed(name, make, traces) for name, make in watchers().items()}
    results = report(found, traces)
    results["command"] = "python benchmarks/governor/detection.py" + (" --quick" if options.quick else "")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.json}")


def watchers() -> dict[str, Callable[[], Watcher]]:
    """Return what is compared, by name."""
    config = GovernorConfig()
    ours: dict[str, Callable[[], Watcher]] = {
        OURS: lambda: GovernorWatch(standard_detectors(config), config),
        BLIND: lambda: GovernorWatch(standard_detectors(config), config, signals=False),
    }
    return ours | {name: (lambda make=make: PeerWatch(make())) for name, make in PEERS.items()}


def _timed(name: str, make: Callable[[], Watcher], traces: Sequence[Trace]) -> list[Outcome]:
    started = time.perf_counter()
    found = scoring.outcomes(make, traces)
    print(f"{time.perf_counter() - started:5.1f} s  replayed {name}", file=sys.stderr, flush=True)
    return found


def report(found: dict[str, list[Outcome]], traces: Sequence[Trace]) -> dict[str, Any]:
    """Print one table a split, and the misses; return everything."""
    tables: dict[str, dict[str, Any]] = {}
    for title, belongs in TABLES.items():
        tables[title] = {
            name: scoring.score([outcome for outcome in those if belongs(outcome.record)]) for name, those in found.items()
        }
        print(table(title, tables[title]))
    shifts = tables["all"][OURS]
    print(
        f"\n{shifts['shifts']} runs whose data changes abruptly: {OURS} alarms before it in {shifts['shifts_early']}, and "
        f"{shifts['shifts_last_alarm']} steps after it for the last time"
    )
    missed, wolf = scoring.misses(found[OURS]), scoring.false_alarms(found[OURS])
    print(f"damaging faults {OURS} misses: {len(missed)}")
    for row in missed:
        print("  {split:12} {task:11} {family:11} {strength:8} {kind:20} seed {seed}  {excess:+.0%}".format(**row))
    print(f"healthy runs {OURS} alarms in: {len(wolf)}")
    for row in wolf:
        print("  {split:12} {kind:24} seed {seed}  {alarms} alarms, {rewinds} rewinds, step {step}: {message}".format(**row))
    return {
        "torch": torch.__version__, "python": platform.python_version(), "deadline_steps": scoring.DEADLINE_STEPS,
        "traces": len(traces), "tables": tables, "missed": missed, "false_alarms": wolf,
        "missed_from_loss_and_gradient_norm": scoring.misses(found[BLIND]),
    }  # fmt: skip


def table(split: str, rows: dict[str, Any]) -> str:
    """Return one table as text."""
    first = next(iter(rows.values()))
    heads = ["damaging", *(f"{family}" for family in FAMILIES), "p50", "p90", "false/1k", "runs", "benign", "rewinds"]
    counts = [first["damaging"][1], *(first["families"][family][1] for family in FAMILIES), "", ""]
    counts += [first["healthy_steps"], first["healthy_runs"], first["benign"], first["benign"]]
    lines = [
        f"\n{split}: found of all faults in each family, of the damaging ones in brackets",
        _line("", heads),
        _line("of", [str(count) for count in counts]),
    ]
    for name, row in rows.items():
        hits, total = row["damaging"]
        cells = [f"{hits} = {hits / max(1, total):.0%}"]
        cells += [
            f"{row['families'][f][0]} ({row['damaging_families'][f][0]}/{row['damaging_families'][f][1]})" for f in FAMILIES
        ]
        cells += [str(row["latency_p50"]), str(row["latency_p90"]), f"{row['false_alarms_per_1000_steps']:.2f}"]
        cells += [str(row[key]) for key in ("healthy_runs_alarmed", "benign_alarmed", "benign_rewound")]
        lines.append(_line(name, cells))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    widths = (12, 15, 15, 15, 15, 15, 5, 5, 9, 6, 7, 8)
    return f"{name:40}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


if __name__ == "__main__":
    main()
