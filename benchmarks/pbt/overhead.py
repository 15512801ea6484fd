"""What a population costs besides training: CPU time of an interval and memory, against population-based training of Ray Tune.

Eight members train for four steps of a few microseconds an interval; after each interval the two worst take over one of the two
best. So nearly all the time is the machinery's. Members are an array of 1 or 50 MiB (`array`), or a network with momentum of
that size in a TrainingState (`torch`); the score has noise, without which Ray Tune exploits members that are equal.

    inline            one process, snapshots in memory
    inline, durable   the same with a directory: every member is written at the end of every interval, synced, and can go on
    processes         two workers, parameters in shared memory
    ray-tune          class Trainable, asynchronous, actors reused, 0.25 CPU a member of 2, four checkpoints kept

CPU time is that of all processes, of whole runs, by the intervals that all members finished; with processes and Ray that
includes the start of workers, given apart as the difference to what a longer run costs an interval. `ray.init` is not counted.
Peak memory is above that before the run: PSS of all processes, polled; inline the high-water mark of the process. glibc is told
to give blocks from 1 MiB back to the system (MALLOC_MMAP_THRESHOLD_), else holes in its heap hide what is in use.

Each arm runs in a process of its own, one after the other.

    python benchmarks/pbt/overhead.py [--intervals 200] [--ray-intervals 30] [--no-ray] [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morphogen.version import __version__

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "pbt_overhead.json"
MEMBERS, STEPS = 8, 4
Rows = Mapping[str, Mapping[str, Any]]


def arms(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the arguments of overhead_arm.py by arm."""
    few, many = max(2, options.intervals // 10), options.intervals
    found = {
        "inline, 1 MiB": ["inline", "--intervals", f"{many}"],
        "inline, 1 MiB, ties": ["inline", "--intervals", f"{many}", "--ties"],
    }
    if options.quick:
        return found
    found |= {
        "inline, 1 MiB, durable": ["inline", "--intervals", f"{many}", "--durable"],
        "inline, 1 MiB, torch": ["inline", "--intervals", f"{many}", "--member", "torch"],
        "processes, 1 MiB": ["processes", "--intervals", f"{many}"],
        "processes, 1 MiB, longer": ["processes", "--intervals", f"{3 * many}"],
        "inline, 50 MiB": ["inline", "--intervals", f"{few}", "--megabytes", "50"],
        "inline, 50 MiB, torch": ["inline", "--intervals", f"{few}", "--megabytes", "50", "--member", "torch"],
        "inline, 50 MiB, durable": ["inline", "--intervals", f"{few}", "--megabytes", "50", "--durable"],
        "inline, 50 MiB, torch, durable": [
            *("inline", "--intervals", f"{few}", "--megabytes", "50", "--member", "torch", "--durable"),
        ],
    }
    if not options.no_ray:
        large = max(2, options.ray_intervals // 5)
        found["ray-tune, 1 MiB"] = ["ray-tune", "--intervals", f"{options.ray_intervals}"]
        found["ray-tune, 50 MiB"] = ["ray-tune", "--intervals", f"{large}", "--megabytes", "50"]
    return found


def run(arguments: list[str], folder: str | None) -> dict[str, Any]:
    """Run an arm in a process of its own; returns what it printed."""
    command = [sys.executable, str(HERE / "overhead_arm.py"), *arguments, *(["--folder", folder] if folder else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(arguments: list[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run says in the units of the table."""
    megabytes = float(arguments[arguments.index("--megabytes") + 1]) if "--megabytes" in arguments else 1.0
    asked = MEMBERS * STEPS * found["intervals"]
    return {
        **found,
        "cpu_ms_per_interval": 1e3 * found["cpu_seconds"] / found["intervals"],
        "wall_ms_per_interval": 1e3 * found["seconds"] / found["intervals"],
        "peak_by_states": found["peak_mb"] / (MEMBERS * megabytes),
        "steps_by_asked": found["steps_run"] / asked,
    }


def checks_of(rows: Rows) -> dict[str, bool | str]:
    """Return what was to be shown, and whether it was; of ratios also how much."""
    ties = rows["inline, 1 MiB, ties"]
    checks: dict[str, bool | str] = {
        "ties: no exploit, no step lost": ties["exploits"] == 0 and ties["steps_by_asked"] == 1.0,
        "steps run = steps asked": all(row["steps_by_asked"] == 1.0 for row in rows.values() if row["engine"] != "ray-tune"),
    }
    large = [row["peak_by_states"] for name, row in rows.items() if name.startswith("inline, 50")]
    if large:
        checks["peak memory < 1.5 x the states, 50 MiB"] = max(large) < 1.5
    wanted = {
        "inline, 1 MiB": ("ray-tune, 1 MiB", 1000),
        "processes, 1 MiB": ("ray-tune, 1 MiB", 100),
        "inline, 50 MiB": ("ray-tune, 50 MiB", 20),
        "inline, 50 MiB, durable": ("ray-tune, 50 MiB", 10),
    }
    for name, (theirs, least) in wanted.items():
        if name in rows and theirs in rows:
            ratio = rows[theirs]["cpu_ms_per_interval"] / rows[name]["cpu_ms_per_interval"]
            checks[f"{name}: {least} x less CPU than Ray Tune"] = f"{'met' if ratio >= least else 'NOT met'}: {ratio:.0f} x"
    if "processes, 1 MiB, longer" in rows:
        brief, longer = rows["processes, 1 MiB"], rows["processes, 1 MiB, longer"]
        later = (longer["cpu_seconds"] - brief["cpu_seconds"]) / (longer["intervals"] - brief["intervals"])
        checks["processes, 1 MiB: CPU ms of an interval, workers running"] = f"{1e3 * later:.1f}"
    return checks


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="What a population costs besides training.")
    parser.add_argument("--intervals", type=int, default=200)
    parser.add_argument("--ray-intervals", type=int, default=30)
    parser.add_argument("--no-ray", action="store_true", help="leave Ray Tune out")
    parser.add_argument("--folder", help="where directories of runs are made (default: that for temporary files)")
    parser.add_argument("--quick", action="store_true", help="two arms, a few intervals, and nothing is written without --json")
    parser.add_argument("--json", type=Path, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    if options.quick:
        options.intervals = 5
    if importlib.util.find_spec("ray") is None:
        options.no_ray = True
        print("Ray is not installed: its arms are left out")
    rows: dict[str, dict[str, Any]] = {}
    print(
        f"{'arm':32} {'CPU ms':>9} {'wall ms':>9} {'of an interval;':16} {'peak MiB':>9} {'x states':>9} {'steps':>6} exploits"
    )
    for name, arguments in arms(options).items():
        rows[name] = row = row_of(arguments, run(arguments, options.folder))
        costs = f"{row['cpu_ms_per_interval']:9.2f} {row['wall_ms_per_interval']:9.2f} {'':16}"
        memory = f"{row['peak_mb']:9.0f} {row['peak_by_states']:9.2f}"
        print(f"{name:32} {costs} {memory} {row['steps_by_asked']:6.2f} {row['exploits']:8}", flush=True)
    checks = checks_of(rows)
    for name, outcome in checks.items():
        print(f"{name}: {outcome if isinstance(outcome, str) else 'met' if outcome else 'NOT met'}")
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        versions = {"morphogen": __version__, "python": platform.python_version()}
        load = [round(value, 1) for value in os.getloadavg()]
        command = f"python benchmarks/pbt/overhead.py --intervals {options.intervals} --ray-intervals {options.ray_intervals}"
        content = {"command": command, **versions, "load_at_the_end": load, "cores": os.cpu_count()}
        path.write_text(json.dumps({**content, "rows": rows, "checks": checks}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
