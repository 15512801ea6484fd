"""What growth as an environment costs beside the training it is made of.

Environments play a scripted agent, which grows wherever it may, and plain PyTorch loops train the same networks: the same
hosts and seeds at the same steps, the same number of batches, AdamW (fused) with a cosine schedule, the same passes over the
decision split, and nothing else. Both take turns, tick by tick, on one thread; times are CPU time of the process, of each tick
the least over some rounds of the same.

    control      ms of an environment step outside host and seed forward, backward, optimizer step and validation, for 4 and
                 for 16 environments: by timers around these parts ("direct"), and as environments minus plain loops
                 ("beyond plain", where plain loops fetch batches and count steps, too)
    inline       throughput of 8 environments over that of 8 plain loops in the same process
    processes    wall-clock throughput of 8 environments in two workers over that of two processes with 4 plain loops each
    reset        ms to build an environment

    python benchmarks/growth/environment_speed.py [--tasks digits mnist1d] [--ticks N] [--rounds N] [--parts control inline]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from morphogen import tasks
from morphogen.control import Op
from morphogen.envs import GrowthEnvConfig, GrowthVectorEnv
from morphogen.envs.episode import Episode
from morphogen.growth import GrowableModel, ablation
from morphogen.growth.incubation import straight_through
from morphogen.growth.lifecycle import ACTING
from morphogen.growth.operators import Seed
from morphogen.tasks import Task
from morphogen.tasks.training import TaskTraining

RESULTS = Path(__file__).parents[1] / "results" / "growth_environment_speed.json"
AIMS = {
    "control_ms": {4: 3.0, 16: 2.0},
    "inline_ratio": 0.9,
    "processes_ratio": 0.85,
}
Actions = NDArray[np.int64]


# -- the scripted agent ---------------------------------------------------------------------------------------------


def act(masks: dict[str, NDArray[np.bool_]], num_blueprints: int) -> Actions:
    """Fossilise, else advance, else germinate where that is possible, else wait; every environment sows in another order."""
    actions = np.zeros((len(masks["op"]), 8), dtype=np.int64)
    for row, action in enumerate(actions):
        for op in (Op.FOSSILIZE, Op.ADVANCE, Op.GERMINATE):
            places = np.flatnonzero(masks["slot"][row, op])
            if len(places):
                action[:2] = op, places[0]
                break
        if action[0] == Op.GERMINATE:
            action[2] = (row + action[1]) % num_blueprints
            action[4:6] = 1, 2  # three ticks to alpha 1
    return actions


# -- what was trained -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """How a slot acts: ``straight_through`` in incubation, else its residual times alpha. The seed is one nobody trains."""

    seed: Seed
    germination: int
    mix: str
    alpha: float
    acts: bool


@dataclass
class Plan:
    """What one environment trained, tick by tick: slot -> how it acts, while training and while measuring."""

    training: list[dict[str, Mixed]] = field(default_factory=list)
    measuring: list[dict[str, Mixed]] = field(default_factory=list)


def mixed(model: GrowableModel, known: dict[str, Mixed]) -> dict[str, Mixed]:
    """Return how the slots of ``model`` act now."""
    found: dict[str, Mixed] = {}
    for name, stage in model.stages().items():
        slot = model.slot(name)
        if slot.seed is None:
            continue
        before = known.get(name)
        number = slot.state.germination
        seed = before.seed if before is not None and before.germination == number else copy.deepcopy(slot.seed)
        found[name] = Mixed(seed, number, slot.mix, slot.state.alpha, stage in ACTING)
    return found


def rehearse(task: Task, num_envs: int, ticks: int) -> tuple[list[Actions], list[Plan]]:
    """Play once, and return the actions and what each environment trained."""
    plans = [Plan() for _ in range(num_envs)]
    train, measure = Episode._train_tick, Episode._measure

    def training(episode: Episode) -> None:
        plan = plans[episode.seed]
        plan.training.append(mixed(episode.model, plan.measuring[-1]))
        train(episode)

    def measuring(episode: Episode) -> Any:
        plan = plans[episode.seed]
        plan.measuring.append(mixed(episode.model, plan.training[-1] if plan.training else {}))
        return measure(episode)

    with mock.patch.object(Episode, "_train_tick", training), mock.patch.object(Episode, "_measure", measuring):
        env = GrowthVectorEnv(task, num_envs)
        actions: list[Actions] = []
        _, info = env.reset(seed=0)
        for _ in range(ticks):
            actions.append(act(info["action_mask"], len(task.blueprints)))
            _, _, ended, _, info = env.step(actions[-1])
            assert not ended.any(), "a run was rewound: choose other seeds"
        env.close()
    return actions, plans


# -- plain loops ----------------------------------------------------------------------------------------------------


class PlainNet(nn.Module):
    """The host and the seeds of one run, called by hand."""

    def __init__(self, host: nn.Module, ratio: float) -> None:
        super().__init__()
        self.host = host
        self.seeds = nn.ModuleDict()
        self.ratio = ratio
        self.mixes: dict[str, str] = {}
        self.alphas: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        for name, block in self.host.named_children():
            x = block(x)
            mix = self.mixes.get(name, "off")
            if mix == "incubate" and self.training:
                x = straight_through(x, self.seeds[name](x.detach()), self.ratio)
            elif mix == "full" and name not in self.alphas:
                x = x + self.seeds[name](x)
            elif mix in ("blend", "full"):
                x = x + self.seeds[name](x) * self.alphas[name]
        return x


class PlainRun:
    """A loop that trains what an environment trained."""

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task, self.plan, self.data = task, plan, task.load()
        self.net = PlainNet(task.make_host(self.data), GrowthEnvConfig().growth.incubation_ratio)
        self.optimizer = torch.optim.AdamW(
            self.net.host.parameters(), task.learning_rate, weight_decay=task.weight_decay, fused=True
        )
        self.born: dict[str, int] = {}
        self.steps = self.ticks = 0
        self.order = torch.arange(len(self.data.train))
        self.generator = np.random.default_rng(0)
        self.validate(plan.measuring[0])

    def tick(self) -> None:
        """Train up to the next decision, and measure."""
        self.follow(self.plan.training[self.ticks])
        self.net.train()
        task, train, optimizer = self.task, self.data.train, self.optimizer
        per_epoch = len(train) // task.batch_size
        for _ in range(task.tick_steps):
            epoch, place = divmod(self.steps, per_epoch)
            if place == 0:
                self.order = torch.from_numpy(self.generator.permutation(len(train)))
            rows = self.order[place * task.batch_size : (place + 1) * task.batch_size]
            inputs, targets = train.inputs[rows], train.targets[rows]
            optimizer.zero_grad()
            loss = task.loss(self.net(inputs), targets)
            loss.backward()
            optimizer.step()
            self.steps += 1
            rate = task.learning_rate * (1 + math.cos(math.pi * self.steps / task.total_steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
        self.ticks += 1
        self.validate(self.plan.measuring[self.ticks])

    def validate(self, slots: dict[str, Mixed]) -> list[float]:
        """Return the metric intact, with each acting seed off, and with all of them off, from one pass."""
        self.follow(slots)
        net, decision = self.net, self.data.decision
        acting = [name for name, how in slots.items() if how.acts]
        rows = [set[str](), *({name} for name in acting), *([set(acting)] if len(acting) > 1 else [])]
        count = len(decision)
        net.eval()
        with torch.no_grad():
            for name in acting:
                alpha = slots[name].alpha
                column = torch.tensor([0.0 if name in row else alpha for row in rows]).repeat_interleave(count)
                net.alphas[name] = column.reshape(-1, *(1 for _ in decision.inputs.shape[1:]))
            inputs = decision.inputs.repeat(len(rows), *(1 for _ in decision.inputs.shape[1:]))
            values = self.task.per_sample(net(inputs), decision.targets.repeat(len(rows)))
            return values.reshape(len(rows), count).mean(1).tolist()

    def follow(self, slots: dict[str, Mixed]) -> None:
        """Take on the seeds and mixes of the environment; moments of the other parameters go on."""
        for name in [name for name, number in self.born.items() if name not in slots or slots[name].germination != number]:
            self.remove(name)
        for name, how in slots.items():
            if name not in self.born:
                self.born[name] = how.germination
                self.net.seeds[name] = seed = copy.deepcopy(how.seed)
                self.optimizer.add_param_group({"params": list(seed.parameters())})
        self.net.mixes = {name: how.mix for name, how in slots.items()}
        self.net.alphas = {name: how.alpha for name, how in slots.items() if how.mix == "blend"}

    def remove(self, name: str) -> None:
        del self.born[name]
        gone = {id(parameter) for parameter in self.net.seeds[name].parameters()}
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if id(group["params"][0]) not in gone]
        del self.net.seeds[name]


def tick_each(loops: Sequence[PlainRun]) -> None:
    for loop in loops:
        loop.tick()


# -- timers ---------------------------------------------------------------------------------------------------------


class Stopwatch:
    """CPU seconds spent in named calls, the cost of the clock itself taken off."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        started = time.process_time()
        for _ in range(20_000):
            time.process_time()
        self.clock_seconds = (time.process_time() - started) / 20_000

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
                self.calls[name] = self.calls.get(name, 0) + 1

        return run

    def start(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.calls = dict.fromkeys(self.calls, 0)

    @property
    def overhead(self) -> float:
        """What the clock added to the whole."""
        return 2 * self.clock_seconds * sum(self.calls.values())

    def of(self, name: str) -> float:
        return self.seconds.get(name, 0.0) - self.clock_seconds * self.calls.get(name, 0)


@contextlib.contextmanager
def watched(watch: Stopwatch) -> Generator[None]:
    """Within the block, time the parts that are training and not control; for environments that were reset before."""
    with contextlib.ExitStack() as stack:
        for owner, method, name in (
            (TaskTraining, "_backward", "forward and backward"),
            (torch.optim.AdamW, "step", "optimizer step"),
            (ablation, "_pass", "validation"),
        ):
            timed = watch.timed(name, getattr(owner, method))
            timed.hooked = True  # optimizers made from now on would wrap `step` once more
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield


# -- the measurements -----------------------------------------------------------------------------------------------


def measure_control(task: Task, num_envs: int, ticks: int, rounds: int) -> dict[str, Any]:
    """Return ms of control for each environment step, directly and beyond plain loops, and where the whole goes."""
    actions, plans = rehearse(task, num_envs, ticks)
    ours, plain = alternate(task, actions, plans, rounds)
    played = [play_watched(task, actions, num_envs) for _ in range(rounds)]
    parts = {name: least([tick[name] for tick in ticks_played] for ticks_played in played) for name in played[0][0]}
    milliseconds = {name: 1000 * sum(seconds) / num_envs / ticks for name, seconds in parts.items()}
    return {
        "direct_ms": round(milliseconds.pop("control"), 3),
        "beyond_plain_ms": round(1000 * (sum(ours) - sum(plain)) / num_envs / ticks, 3),
        "parts_ms": {name: round(value, 2) for name, value in milliseconds.items()},
        "environments_ms": round(1000 * sum(ours) / num_envs / ticks, 2),
        "plain_ms": round(1000 * sum(plain) / num_envs / ticks, 2),
    }


def play_watched(task: Task, actions: Sequence[Actions], num_envs: int) -> list[dict[str, float]]:
    """Return for each step of all environments the CPU seconds of its parts, "control" among them."""
    watch, played = Stopwatch(), list[dict[str, float]]()
    env = GrowthVectorEnv(task, num_envs)
    env.reset(seed=0)
    with watched(watch):
        for action in actions:
            watch.start()
            started = time.process_time()
            env.step(action)
            whole = time.process_time() - started - watch.overhead
            parts = {name: watch.of(name) for name in watch.seconds}
            played.append({**parts, "control": whole - sum(parts.values())})
    env.close()
    return played


def alternate(task: Task, actions: Sequence[Actions], plans: Sequence[Plan], rounds: int) -> tuple[list[float], list[float]]:
    """Return the CPU seconds of each tick of all environments, and of all plain loops: the least of some rounds."""
    all_ours, all_plain = [], []
    for _ in range(rounds):
        env = GrowthVectorEnv(task, len(plans))
        env.reset(seed=0)
        loops = [PlainRun(task, plan) for plan in plans]
        ours, plain = [], []
        for number, action in enumerate(actions):
            turns = [(ours, partial(env.step, action)), (plain, partial(tick_each, loops))]
            for times, turn in turns if number % 2 else reversed(turns):
                started = time.process_time()
                turn()
                times.append(time.process_time() - started)
        env.close()
        all_ours.append(ours)
        all_plain.append(plain)
    return least(all_ours), least(all_plain)


def least(rounds: Iterable[Sequence[float]]) -> list[float]:
    """Return the least of each tick over rounds of the same: whatever else a machine does only adds."""
    return [min(times) for times in zip(*rounds, strict=True)]


def measure_inline(task: Task, ticks: int, rounds: int) -> dict[str, Any]:
    """Return the throughput of 8 environments over that of 8 plain loops."""
    actions, plans = rehearse(task, 8, ticks)
    ours, plain = alternate(task, actions, plans, rounds)
    return {"ratio": round(sum(plain) / sum(ours), 3)}


def measure_processes(task: Task, ticks: int) -> dict[str, Any]:
    """Return the wall-clock throughput of 8 environments in two workers over that of two processes with 4 loops each."""
    actions, plans = rehearse(task, 8, ticks)
    env = GrowthVectorEnv(task, 8, executor="processes", num_workers=2)
    with contextlib.closing(env), plain_processes(task, plans) as tick_all:
        env.reset(seed=0)
        ours, plain = [], []
        for number, action in enumerate(actions):
            turns = [(ours, partial(env.step, action)), (plain, tick_all)]
            for times, turn in turns if number % 2 else reversed(turns):
                started = time.perf_counter()
                turn()
                times.append(time.perf_counter() - started)
    return {
        "ratio": round(sum(plain) / sum(ours), 3),
        "median_ratio": ratio_of_medians(plain, ours),
        "environment_steps_per_second": round(8 * ticks / sum(ours), 1),
    }


@contextlib.contextmanager
def plain_processes(task: Task, plans: Sequence[Plan]) -> Iterator[Callable[[], None]]:
    """Yield a function that lets two processes with half of the plain loops each play a tick, and waits for both."""
    context = multiprocessing.get_context("fork")
    pipes, workers = [], []
    for half in (plans[::2], plans[1::2]):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_play, args=(task, half, theirs), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)

    def tick_all() -> None:
        for pipe in pipes:
            pipe.send("tick")
        for pipe in pipes:
            pipe.recv()

    try:
        for pipe in pipes:
            pipe.recv()
        yield tick_all
    finally:
        for pipe in pipes:
            pipe.send("end")
        for worker in workers:
            worker.join()


def _play(task: Task, plans: Sequence[Plan], pipe: Any) -> None:
    torch.set_num_threads(1)
    loops = [PlainRun(task, plan) for plan in plans]
    pipe.send("ready")
    while pipe.recv() == "tick":
        tick_each(loops)
        pipe.send("done")


def measure_reset(task: Task) -> dict[str, Any]:
    """Return the median ms to begin an episode, the first in the process left out."""
    env = GrowthVectorEnv(task, 1)
    times = []
    for seed in range(21):
        started = time.process_time()
        env.reset(seed=seed)
        times.append(1000 * (time.process_time() - started))
    return {"first_ms": round(times[0], 1), "ms": round(statistics.median(times[1:]), 2)}


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> float:
    return round(statistics.median(above) / statistics.median(below), 3)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Cost of growth as an environment.")
    parser.add_argument("--tasks", nargs="+", default=["digits", "mnist1d"])
    parser.add_argument("--parts", nargs="+", default=["control", "inline", "processes", "reset"])
    parser.add_argument("--ticks", type=int, default=24, help="environment steps (default 24)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the same, the least of which counts (default 5)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/growth/environment_speed.py {' '.join(sys.argv[1:])}".strip()
    content: dict[str, Any] = {"command": command, "torch": torch.__version__, "python": platform.python_version()}
    content |= {"ticks": options.ticks, "rounds": options.rounds, "aims": AIMS, "tasks": {}}
    for name in options.tasks:
        task, found = tasks.get(name), {}
        if "reset" in options.parts:
            found["reset"] = measure_reset(task)
        if "control" in options.parts:
            found["control"] = {str(n): measure_control(task, n, options.ticks, options.rounds) for n in (4, 16)}
        if "inline" in options.parts:
            found["inline"] = measure_inline(task, options.ticks, options.rounds)
        if "processes" in options.parts:
            found["processes"] = measure_processes(task, options.ticks)
        content["tasks"][name] = found
        print(name, json.dumps(found, indent=1))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
