"""PPO against Stable-Baselines3 and sb3-contrib: steps per CPU-second and returns, at the same settings.

The peers and the simulators are in an extra; in an environment of their own:

    python -m venv .venv-ppo
    .venv-ppo/bin/pip install --constraint constraints.txt torch
    .venv-ppo/bin/pip install --constraint constraints.txt --editable '.[ppo-bench]'

Rows are in rows.py, the environments that Gymnasium does not have in environments.py. Each arm of a row trains with each seed
in a process of its own with one thread; arms take turns seed by seed (A B A B). Time is process CPU time of training: imports,
making environments and agent, one update of an agent that is thrown away, and evaluation are left out. Evaluated are 50
episodes without exploration, with seeds that training has not seen. A ratio is that of neighbours; reported is the median
over seeds.

    .venv-ppo/bin/python benchmarks/ppo/run.py ROW [ROW ...] [--seeds N] [--steps N] [--arms ARM ...] [--json PATH]

Results go to benchmarks/results/ppo.json after each seed, a row beside the others that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checks import Outcome, Run, summary
from rows import ROWS, Row

RESULTS = Path(__file__).parents[1] / "results" / "ppo.json"
WORKER = Path(__file__).with_name("worker.py")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
VERSIONS = ("morphogen", "stable-baselines3", "sb3-contrib", "gymnasium", "torch", "numpy")


def measure(name: str, arm: str, seed: int, options: argparse.Namespace) -> Run:
    """Return the run of a worker, which works in a folder that is thrown away: MuJoCo writes a log where it is."""
    command = [sys.executable, str(WORKER), name, arm, str(seed), "--episodes", str(options.episodes)]
    command += ["--steps", str(options.steps)] if options.steps else []
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | ONE_THREAD, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def rounds(name: str, arms: Sequence[str], seeds: int, options: argparse.Namespace) -> Iterator[list[Run]]:
    """Yield all runs so far, after each seed."""
    runs: list[Run] = []
    for seed in range(seeds):
        for arm in arms:
            run = measure(name, arm, seed, options)
            runs.append(run)
            found = f"{run.speed:.0f} steps/CPU-s, {run.cpu_seconds:.1f} CPU-s, return {run.mean_return:.2f}"
            print(f"{name}, {arm}, seed {seed}: {found}", file=sys.stderr, flush=True)
        yield runs


def judge(row: Row, runs: Sequence[Run]) -> list[Outcome]:
    """Return the outcome of every check whose arms all ran."""
    ran = {run.arm for run in runs}
    asked = [check for check in row.checks if {getattr(check, key) for key in ("arm", "other") if hasattr(check, key)} <= ran]
    return [check.outcome(runs) for check in asked]


def report(row: Row, runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the runs of a row came to as JSON data."""
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in row.arms}
    return {
        "arms": {arm: summary(own) | {"what": dataclasses.asdict(row.arms[arm])} for arm, own in by_arm.items() if own},
        "checks": [dataclasses.asdict(outcome) for outcome in judge(row, runs)],
        "settings": dataclasses.asdict(row.task),
    }


def show(name: str, row: Row, runs: Sequence[Run]) -> None:
    """Print the table of a row."""
    print(f"\n{name}\n{'arm':30} {'steps/CPU-s':>11} {'range':>15} {'update':>7} {'return':>9} {'range':>19} invalid")
    for arm in dict.fromkeys(run.arm for run in runs):
        found: Any = summary([run for run in runs if run.arm == arm])
        speed, part, total = (found[key] for key in ("steps_per_cpu_second", "update_cpu_part", "evaluation_return"))
        invalid = "-" if found["invalid_actions"] is None else found["invalid_actions"]
        print(
            f"{arm:30} {speed['median']:11.0f} {speed['low']:7.0f}-{speed['high']:<7.0f} {part['median']:7.0%} "
            f"{total['mean']:9.2f} {total['low']:9.2f} {total['high']:9.2f} {invalid:>7}"
        )
    for outcome in judge(row, runs):
        print(f"  {outcome.asked}: {outcome.found}, {'met' if outcome.met else 'MISSED'}")


def write(path: Path, name: str, found: dict[str, Any], command: str) -> None:
    """Put a row beside the others in the file at ``path``."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    versions = {package: importlib.metadata.version(package) for package in VERSIONS}
    content[name] = {"command": command, "versions": versions | {"python": platform.python_version()}, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Measure, print the tables, and write the results."""
    parser = argparse.ArgumentParser(description="PPO against Stable-Baselines3 and sb3-contrib.")
    parser.add_argument("rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, help="instead of the row's own number")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    parser.add_argument("--episodes", type=int, default=50, help="of an evaluation (default 50)")
    parser.add_argument("--arms", nargs="+", help="these alone (default: all of the row)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    for name in options.rows:
        row = ROWS[name]
        arms: list[str] = options.arms or list(row.arms)
        if not set(arms) <= set(row.arms):
            parser.error(f"the arms of {name} are {', '.join(row.arms)}; got {', '.join(arms)}")
        changed = [f"--{key} {value}" for key in ("seeds", "steps") if (value := getattr(options, key))]
        changed += [shlex.join(["--arms", *arms])] if options.arms else []
        changed += [f"--episodes {options.episodes}"] if options.episodes != 50 else []
        command = " ".join(["python benchmarks/ppo/run.py", name, *changed])
        runs: list[Run] = []
        for runs in rounds(name, arms, options.seeds or row.seeds, options):
            write(options.json, name, report(row, runs), command)
        show(name, row, runs)
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
