"""How the parameters of newborn seeds are best optimised: initialisation, moments, learning rate, and when they are born.

A small host grows by a fixed plan, the task's first blueprint in each slot, advanced as the gates allow, nothing pruned;
AdamW, cosine to zero. One factor at a time is changed against the default, and rate and timing in every combination:

    init       zero_out   the last layer of a seed is zero at birth (the blueprints' own)
               random     it is drawn as its layer's default says
    moments    carry      the host's go on, the seed's start at step 0
               kept_step  the host's go on, the seed's are zero with the host's step count
               reset      the host's are forgotten at each birth
    rate       inherit    the host's present rate
               restart    the cosine from its peak, over the steps that are left
               boost      the same, twice as high
    timing     early      all slots after 1/32 of the run
               periodic   one slot after 1/8, 5/16 and 1/2 of it (and so on, in steps of 3/16)
               plateau    one more slot whenever the decision accuracy has gained less than a point in 3/32 of the run

and two controls: the host that never grows, and the grown network from the first step on. The base learning rate of each
arm is the one of the grid with the best mean accuracy on the decision split; accuracies are on the test split, differences
to the default are paired by seed, with 95 % t-intervals. The same is reported at the lowest rate of the grid for all, where
nothing is tuned.

    python benchmarks/growth/newborn.py [--task mnist1d] [--seeds 6] [--steps 500] [--rates 0.005 ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from morphogen import tasks
from morphogen.growth import NewbornConfig, NewbornPolicy, Stage
from morphogen.recipes.results import Interval, interval
from morphogen.state import TrainingState, draw_from
from morphogen.tasks import BuiltTask, Split
from morphogen.version import __version__

RESULTS = Path(__file__).parents[1] / "results" / "growth_newborn.json"
TICKS = 32
PLATEAU_TICKS, PLATEAU_GAIN = 3, 0.01
RATES = (0.005, 0.015, 0.04)

Init = Literal["zero_out", "random"]
Moments = Literal["carry", "kept_step", "reset"]
Rate = Literal["inherit", "restart", "boost"]
Timing = Literal["early", "periodic", "plateau", "never", "from the start"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One combination of the factors."""

    init: Init = "zero_out"
    moments: Moments = "carry"
    rate: Rate = "inherit"
    timing: Timing = "periodic"

    @property
    def newborn(self) -> NewbornConfig:
        """The settings of the newborn policy."""
        return NewbornConfig(
            learning_rate=self.rate,
            moments="kept_step" if self.moments == "kept_step" else "fresh",
            host_moments="reset" if self.moments == "reset" else "carry",
        )

    def __str__(self) -> str:
        return f"{self.timing}, {self.rate}, {self.moments}, {self.init}"


DEFAULT = Arm()
ARMS = (
    *(
        Arm(rate=rate, timing=timing)
        for timing, rate in itertools.product(("early", "periodic", "plateau"), ("inherit", "restart", "boost"))
    ),
    Arm(moments="kept_step"),
    Arm(moments="reset"),
    Arm(init="random"),
    Arm(init="random", timing="early"),
    Arm(timing="never"),
    Arm(timing="from the start"),
)
"""What is run. The default is not the earliest timing, as a host that has hardly trained has hardly any moments to reset."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one run came to. Accuracies in [0, 1]; ``births`` are steps."""

    decision: float
    test: float
    parameters: int
    births: tuple[int, ...]


class Growing:
    """One run of one arm."""

    def __init__(self, task: str, arm: Arm, learning_rate: float, seed: int, total_steps: int) -> None:
        """Build task, schedule and policy."""
        self.arm, self.total_steps = arm, total_steps
        self.task = dataclasses.replace(tasks.get(task), learning_rate=learning_rate)
        self.built: BuiltTask = self.task.build(seed=seed, full_size=arm.timing == "from the start")
        self.model, optimizer = self.built.model, self.built.optimizer
        self.scheduler = CosineAnnealingLR(optimizer, total_steps)
        self.newborn = NewbornPolicy(arm.newborn, self.model, optimizer, total_steps)
        extras = {"newborn": self.newborn}
        self.state = TrainingState(self.model, optimizer, self.scheduler, extras=extras, newborn_options=self.newborn.options)
        self.batches = self.shuffled()
        self.births: list[int] = []
        self.accuracies: list[float] = []

    def run(self) -> Outcome:
        """Train to the end."""
        bounds = [self.total_steps * tick // TICKS for tick in range(TICKS + 1)]
        for tick, (start, end) in enumerate(itertools.pairwise(bounds)):
            self.decide(tick, start)
            self.train(end - start)
            self.model.sense()
            self.model.tick()
            if self.arm.timing == "plateau":
                self.accuracies.append(self.measure(self.built.data.decision))
        decision, test = (self.measure(split) for split in (self.built.data.decision, self.built.data.test))
        return Outcome(decision, test, self.model.num_parameters(), tuple(self.births))

    def train(self, num_steps: int) -> None:
        """Take so many steps."""
        train, optimizer = self.built.data.train, self.built.optimizer
        self.model.train()
        for chosen in itertools.islice(self.batches, num_steps):
            optimizer.zero_grad()
            self.task.loss(self.model(train.inputs[chosen]), train.targets[chosen]).backward()
            optimizer.step()
            self.scheduler.step()
            self.newborn.step()

    def shuffled(self) -> Iterator[Tensor]:
        """Yield the samples of each batch, shuffled anew each epoch, whole batches only."""
        count, size = len(self.built.data.train), self.task.batch_size
        for epoch in itertools.count():
            order = torch.from_numpy(self.built.streams.numpy("data", epoch).permutation(count))
            yield from order[: count - count % size].split(size)

    def decide(self, tick: int, step: int) -> None:
        """Germinate what is due, and lead on every seed whose gate is open."""
        for name, stage in self.model.stages().items():
            if stage in (Stage.TRAINING, Stage.BLENDING):
                self.model.advance(name)
        dormant = [name for name, stage in self.model.stages().items() if stage is Stage.DORMANT]
        for name in dormant[: self.due(tick)]:
            self.model.germinate(name, self.task.blueprints[0])
            if self.arm.init == "random":
                draw_last_layer(self.model.get_submodule(f"slots.{name}.seed"), self.built.streams.torch("outer", name))
            self.model.advance(name)
            self.births.append(step)
            self.accuracies.clear()

    def due(self, tick: int) -> int:
        """Return how many slots are sown at ``tick``."""
        if self.arm.timing == "early":
            return len(self.model.stages()) if tick == 1 else 0
        if self.arm.timing == "periodic":
            return int(tick >= 4 and (tick - 4) % 6 == 0)
        if self.arm.timing == "plateau" and len(self.accuracies) > PLATEAU_TICKS:
            before, lately = self.accuracies[:-PLATEAU_TICKS], self.accuracies[-PLATEAU_TICKS:]
            return int(max(lately) < max(before) + PLATEAU_GAIN)
        return 0

    def measure(self, split: Split) -> float:
        """Return the accuracy on ``split``, in [0, 1]."""
        self.model.eval()
        with torch.no_grad():
            outputs: Tensor = self.model(split.inputs)
        return float(self.task.per_sample(outputs, split.targets).mean())


def draw_last_layer(seed: nn.Module, generator: torch.Generator) -> None:
    """Initialise the last layer of ``seed`` as its class does by default."""
    last = [module for module in seed.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)][-1]
    assert not bool(last.weight.any()), "the last layer is zero at birth"
    with draw_from(generator):
        last.reset_parameters()


Outcomes = dict[Arm, dict[float, list[Outcome]]]
"""Arm -> rate -> outcomes by seed."""


def summarise(outcomes: Outcomes, chosen: dict[Arm, float]) -> list[dict[str, Any]]:
    """Return a row for each arm at the rate chosen for it."""
    default = [outcome.test for outcome in outcomes[DEFAULT][chosen[DEFAULT]]]
    rows: list[dict[str, Any]] = []
    for arm, by_rate in outcomes.items():
        own = by_rate[chosen[arm]]
        tests = [outcome.test for outcome in own]
        rows.append(
            {
                **dataclasses.asdict(arm),
                "learning_rate": chosen[arm],
                "test": _points(interval(tests)),
                "difference": _points(interval([test - base for test, base in zip(tests, default, strict=True)])),
                "decision": 100 * statistics.fmean(outcome.decision for outcome in own),
                "parameters": statistics.fmean(outcome.parameters for outcome in own),
                "births_steps": [statistics.fmean(column) for column in zip(*(o.births for o in own), strict=False)],
                "births_per_run": statistics.fmean(len(outcome.births) for outcome in own),
            }
        )
    return rows


def _points(values: Interval) -> dict[str, float]:
    assert values.high is not None
    return {"mean": 100 * values.mean, "half_width": 100 * (values.high - values.mean)}


def print_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print ``rows``."""
    print(f"\n{title}\n{'timing, rate, moments, init':44} {'lr':>6} {'test %':>14} {'- default':>14} {'born at steps'}")
    for row in rows:
        name = f"{row['timing']}, {row['rate']}, {row['moments']}, {row['init']}"
        spans = [
            f"{row[key]['mean']:{sign}.2f} +-{row[key]['half_width']:.2f}" for key, sign in (("test", ""), ("difference", "+"))
        ]
        births = ", ".join(f"{birth:.0f}" for birth in row["births_steps"]) + f" ({row['births_per_run']:.1f} a run)"
        print(f"{name:44} {row['learning_rate']:6g} {spans[0]:>14} {spans[1]:>14} {births}")


def main() -> None:
    """Measure, print the tables, and write the results."""
    parser = argparse.ArgumentParser(description="Optimisation of newborn seeds: an ablation.")
    parser.add_argument("--task", default="mnist1d", choices=("mnist1d", "digits"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = sorted(options.rates)
    outcomes: Outcomes = {arm: {rate: [] for rate in rates} for arm in ARMS}
    for seed in range(options.seeds):
        for arm, rate in itertools.product(ARMS, rates):
            outcomes[arm][rate].append(Growing(options.task, arm, rate, seed, options.steps).run())
        print(f"seed {seed}: {time.process_time():.0f} CPU s", file=sys.stderr, flush=True)
        if seed > 0:  # after each, so that an interruption costs seeds and not balance
            content = {"steps": options.steps, "seeds": seed + 1, **report(options.task, outcomes)}
            write(options.json, options.task, content)
    print(f"written to {options.json}")


def report(task: str, outcomes: Outcomes) -> dict[str, Any]:
    """Print both tables and return them as JSON data, with every single result."""
    rates = sorted(outcomes[DEFAULT])
    tuned = {
        arm: max(rates, key=lambda rate: statistics.fmean(outcome.decision for outcome in by_rate[rate]))
        for arm, by_rate in outcomes.items()
    }
    tables = {"tuned": summarise(outcomes, tuned), "untuned": summarise(outcomes, dict.fromkeys(outcomes, rates[0]))}
    print_table(f"{task}: base rate tuned for each arm", tables["tuned"])
    print_table(f"{task}: base rate {rates[0]:g} for all", tables["untuned"])
    single = {
        str(arm): {f"{rate:g}": [round(100 * outcome.test, 2) for outcome in own] for rate, own in by_rate.items()}
        for arm, by_rate in outcomes.items()
    }
    return {"rates": rates, "cpu_seconds": round(time.process_time()), **tables, "test_percent_by_seed": single}


def write(path: Path, task: str, results: dict[str, Any]) -> None:
    """Put the results of ``task`` beside those of other tasks in the file at ``path``."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rates = " ".join(f"{rate:g}" for rate in results["rates"])
    numbers = f"--seeds {results['seeds']} --steps {results['steps']} --rates {rates}"
    command = f"python benchmarks/growth/newborn.py --task {task} {numbers}"
    versions = {"morphogen": __version__, "torch": torch.__version__, "python": platform.python_version()}
    content[task] = {"command": command, **versions, **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
