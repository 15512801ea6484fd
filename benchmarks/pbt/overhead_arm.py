"""Runs one arm of overhead.py in this process, and prints what it took as one line of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from overhead_members import NOISE, SEARCH, STEPS, Make

from morphogen.pbt import PBTConfig, PopulationResult, PopulationTrainer

POLL_SECONDS = 0.5


class Usage:
    """CPU time and memory of this process and all below it, since this was made; polled, so that none escapes by dying."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._cpu: dict[tuple[int, float], float] = {}
        self._before = 0.0
        self._stop = threading.Event()
        self.peak_bytes = 0
        self.num_processes = 0
        self._poll()
        self._before, self._bytes_before = self._sum(), self.peak_bytes
        self._thread = threading.Thread(target=self._keep_polling, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """Stop; returns CPU seconds, peak memory above the beginning, processes seen."""
        self._stop.set()
        self._thread.join()
        self._poll()
        return {
            "cpu_seconds": self._sum() - self._before,
            "peak_mb": (self.peak_bytes - self._bytes_before) / 2**20,
            "processes": len(self._cpu),
        }

    def _sum(self) -> float:
        return sum(self._cpu.values())

    def _keep_polling(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        total = 0
        for process in (self._own, *self._own.children(recursive=True)):
            try:
                times = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = times.user + times.system
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it ended just now
        self.peak_bytes = max(self.peak_bytes, total)


def configuration(intervals: int, seed: int, **others: Any) -> PBTConfig:
    """Return 8 members of which the worst two take over others, as Ray Tune's would."""
    return PBTConfig(
        population_size=8,
        total_steps=intervals * STEPS,
        perturbation_interval=STEPS,
        hyperparameters=SEARCH,
        truncation_ratio=0.25,
        optimizer_exploit_strategy="copy",
        seed=seed,
        **others,
    )


def run_own(options: argparse.Namespace) -> dict[str, Any]:
    """Run a population of ours; CPU time of whole processes, interpreters of workers included."""
    config = configuration(options.intervals, options.seed, synchronous=not options.asynchronous)
    make = Make(options.member, options.megabytes, 0.0 if options.ties else NOISE)
    warm = configuration(2, options.seed, synchronous=True)
    PopulationTrainer(Make(options.member, 0.01), warm).run()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        directory = os.path.join(folder, "run") if options.durable else None
        workers = {"num_workers": options.workers} if options.engine == "processes" else None
        trainer = PopulationTrainer(make, config, options.engine, directory=directory, options=workers)
        usage, started, thread_started = Usage(), time.time(), time.thread_time()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of memory begins anew (Linux)
        resident = memory("VmRSS")
        result = trainer.run()
        seconds, thread_seconds = time.time() - started, time.thread_time() - thread_started
        used = usage.end()
    if options.engine == "inline":  # without the thread that polls, and without missing what comes between two polls
        used |= {"cpu_seconds": thread_seconds, "peak_mb": memory("VmHWM") - resident}
    return {**used, **facts(result, started), "seconds": seconds}


def memory(key: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def facts(result: PopulationResult, started: float) -> Mapping[str, float]:
    """Return what a run came to: steps that members ran, when the first interval was over, exploits."""
    latest = {report.member: report.metrics["steps_run"] for report in result.reports}
    first = [report.metrics["at_seconds"] for report in result.reports if report.interval == 1]
    exploits = sum(exploit.is_exploit for exploit in result.exploits)
    return {"steps_run": sum(latest.values()), "exploits": exploits, "start_seconds": max(first) - started}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="One arm of overhead.py.")
    parser.add_argument("engine", choices=("inline", "processes", "ray-tune"))
    parser.add_argument("--member", choices=("array", "torch"), default="array")
    parser.add_argument("--megabytes", type=float, default=1.0)
    parser.add_argument("--intervals", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--durable", action="store_true")
    parser.add_argument("--ties", action="store_true")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.engine == "ray-tune":
        found = importlib.import_module("overhead_ray").run_ray(options, Usage)
    else:
        found = run_own(options)
    print(json.dumps({"engine": options.engine, "intervals": options.intervals, **found}))


if __name__ == "__main__":
    main()
