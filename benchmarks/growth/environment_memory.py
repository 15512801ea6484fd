"""Memory of growth environments: the proportional set size of this process and of all its workers, summed.

    python benchmarks/growth/environment_memory.py --task digits --envs 16 --executor processes

Networks are trained, grown and pruned at random for some ticks before memory is read from ``/proc/PID/smaps_rollup``: Linux
alone has that. The process that multiprocessing keeps to track resources is counted, too. Prints one JSON row.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.masks import sample_choices


def processes_of(root: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended since
                continue
    found, left = [], [root]
    while left:
        found.append(left.pop())
        left += [child for child, parent in parents.items() if parent == found[-1]]
    return found


def pss_mib(process: int) -> float:
    """Proportional set size: memory of its own, and its share of what it shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure(task: str, num_envs: int, executor: str, num_workers: int | None, num_ticks: int) -> dict[str, object]:
    env = GrowthVectorEnv(task, num_envs, executor=executor, num_workers=num_workers)
    try:
        before = sum(map(pss_mib, processes_of(os.getpid())))
        _, info = env.reset(seed=0)
        generator = np.random.default_rng(0)
        for _ in range(num_ticks):
            *_, info = env.step(sample_choices(info["action_mask"], generator))
        by_process = [pss_mib(process) for process in processes_of(os.getpid())]
    finally:
        env.close()
    return {
        "task": task,
        "envs": num_envs,
        "executor": executor,
        "processes": len(by_process),
        "ticks": num_ticks,
        "pss_mib": round(sum(by_process)),
        "largest_pss_mib": round(max(by_process)),
        "before_reset_pss_mib": round(before),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--executor", default="processes")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--ticks", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(given.task, given.envs, given.executor, given.workers, given.ticks)))


if __name__ == "__main__":
    main()
