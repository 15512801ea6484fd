"""The arm of overhead.py that is not ours: population-based training of Ray Tune, over the same members."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"RAY_worker_niceness": "0", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}

import numpy as np
import ray
from overhead_members import NOISE, STEPS, Work
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining


class Trainable(tune.Trainable):
    """A member; each step of Ray's is an interval."""

    def setup(self, config: dict[str, Any]) -> None:
        self._work = Work(config["megabytes"], os.getpid(), config["noise"])
        self._work.rate, self._log = config["rate"], config["log"]

    def step(self) -> dict[str, float]:
        score = self._work.train(STEPS)
        with open(self._log, "ab") as file:
            file.write(b".")
        return {"score": score}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        np.save(Path(checkpoint_dir) / "values.npy", self._work.values)

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._work.values = np.load(Path(checkpoint) / "values.npy")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._work.rate = new_config["rate"]
        return True


def run_ray(options: argparse.Namespace, make_usage: Callable[[], Any]) -> dict[str, Any]:
    """Run a population of Ray Tune's: asynchronous, actors reused; the time of ``ray.init`` is not counted."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        log = Path(folder) / "steps"
        rates = tune.loguniform(1e-4, 1e-1)
        space = {"rate": rates, "megabytes": options.megabytes, "noise": NOISE, "log": str(log)}
        scheduler = PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=1,
            quantile_fraction=0.25,
            hyperparam_mutations={"rate": rates},
        )
        tuner = tune.Tuner(
            tune.with_resources(Trainable, {"cpu": 0.25}),
            param_space=space,
            tune_config=tune.TuneConfig(metric="score", mode="max", scheduler=scheduler, num_samples=8, reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=folder,
                stop={"training_iteration": options.intervals},
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
                verbose=0,
            ),
        )
        usage, started = make_usage(), time.time()
        tuner.fit()
        seconds = time.time() - started
        used = usage.end()
        steps = STEPS * log.stat().st_size
    exploits = scheduler._num_perturbations
    ray.shutdown()
    return {**used, "seconds": seconds, "steps_run": steps, "exploits": exploits, "version": ray.__version__}
