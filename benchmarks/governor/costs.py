"""What the governor costs: its checks, its snapshots and its rewinds, in parts of a training step and of a plain copy.

The step is that of a small GPT (about 23 million parameters, 304 tensors with the moments of AdamW) on 512 tokens in
float32: forward, backward and the optimizer's step, on one thread. Checks are made between backward and the optimizer's
step, as in a training loop, each after the caches were flushed, so that none finds what another has just read. What is
done every ten steps alone counts with a tenth. All methods run once a round, in a drawn order. Times are process CPU time;
reported are medians, of the times and of the ratios within a round. What ``state.capture`` and ``state.restore`` cost, next
to ``deepcopy`` and ``torch.save``, is measured by ``benchmarks/state.py``.

Then a small network is rewound three times to one snapshot, and each time 30 steps are compared with the first run, bit
for bit: losses, weights, running statistics, moments, schedule, gradient scaler, all generators, and the data cursor.

    python benchmarks/governor/costs.py [--rounds N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from replay import exactness
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.governor import Governor, GovernorConfig
from morphogen.governor.consensus import Consensus
from morphogen.governor.detectors import standard_detectors
from morphogen.governor.keeper import Keeper
from morphogen.state import Snapshot, TrainingState

sys.path.append(str(Path(__file__).parents[1]))
from state import GPT, VOCABULARY, peak, reset_peak, resident, tensors_of

RESULTS = Path(__file__).parents[1] / "results" / "governor_costs.json"
CYCLE, TINY_CYCLE = 10, 40
"""Steps in which everything periodic happens: state checks and snapshots every 10, detectors' statistics every 8 (small)."""
NUM_TOKENS, TINY_STEPS = 512, 20 * TINY_CYCLE
NEVER = 10**9
COPY_IN, COPY_OUT = "copy into kept buffers", "copy from kept buffers"
CHECK = "check of a snapshot before it is trusted"
OBSERVED_REWIND = "observe that finds NaN weights and rewinds"
ALONE, GIVEN = "observe(loss)", "observe(loss, grad_norm)"
OUTPUTS, BOTH = "observe(loss, logits, labels)", "observe(loss, grad_norm, logits, labels)"
AIMS = {
    f"{ALONE}, % of the step": 2.0,
    f"{GIVEN}, % of the step": 0.2,
    "snapshot / copy": 1.1,
    "ten more snapshots, MiB": 1.0,
    "snapshot every 10 steps, % of the step": 1.0,
    "rewind / copy": 1.2,
    "replayed steps that differ": 0.0,
}


class Turns:
    """Methods that take turns, and what each of them took; a method is timed alone, from cold caches."""

    def __init__(self, *, flush: bool = True) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._shuffle = random.Random(0).shuffle
        self._scratch = torch.zeros(2**24 if flush else 0)

    def take(self, methods: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
        """Run each method once, in a drawn order, and return what they return."""
        order, results = list(methods), {}
        self._shuffle(order)
        for name in order:
            self._scratch.add_(1.0)
            results[name] = self.time(name, methods[name])
        return results

    def time(self, name: str, method: Callable[[], object]) -> Any:
        """Run one method, and return what it returns."""
        start = time.process_time()
        result = method()
        self.seconds.setdefault(name, []).append(time.process_time() - start)
        return result


class Counted(TrainingState):
    """A training state that counts its captures, and may keep every buffer they fill, so that new ones add to its memory."""

    captures = 0
    buffers: dict[int, Tensor] | None = None

    def capture(self) -> Snapshot:
        snapshot = super().capture()
        self.captures += 1
        if self.buffers is not None:
            self.buffers |= {id(tensor): tensor for part, _, tensor in snapshot.named_tensors() if part != "loose"}
        return snapshot


class Training:
    """A network in training, and what its latest step gave to observe."""

    def __init__(self, model: nn.Module, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> None:
        """Fill the moments; ``draw`` returns inputs and labels."""
        self.model = model
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, foreach=True)
        self.state = Counted(model, self.optimizer)
        self._draw, self._draws = draw, torch.Generator().manual_seed(0)
        self.logits, self.labels, self.loss = torch.zeros(()), torch.zeros(()), torch.zeros(())
        self.forward_backward()
        self.norm = nn.utils.get_total_norm(self.gradients)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self) -> None:
        inputs, self.labels = self._draw(self._draws)
        self.logits = self.model(inputs)
        self.loss = F.cross_entropy(self.logits.flatten(0, -2), self.labels.flatten())
        self.loss.backward()

    @property
    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def gpt() -> Training:
    """Return a GPT; each step sees tokens of its own."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(VOCABULARY, (1, NUM_TOKENS + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    return Training(GPT(), draw)


def tiny() -> Training:
    """Return a classifier whose step takes less than a millisecond."""
    model = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
    return Training(model, lambda draws: (torch.randn(64, 10, generator=draws), torch.randint(5, (64,), generator=draws)))


# -- checks -----------------------------------------------------------------------------------------------------------


def ways_to_observe(run: Training) -> dict[str, Callable[[], object]]:
    """Return ways to observe by name, each with a governor of its own; only the last ever takes a snapshot."""
    checks = GovernorConfig(snapshot_every=NEVER)
    snapshots = GovernorConfig(snapshot_every=CYCLE, probation_steps=CYCLE)
    alone, given, outputs, both = (Governor(run.state, checks) for _ in range(4))
    keeping = Governor(run.state, snapshots)
    return {
        ALONE: lambda: alone.observe(run.loss),
        GIVEN: lambda: given.observe(run.loss, grad_norm=run.norm),
        OUTPUTS: lambda: outputs.observe(run.loss, logits=run.logits, labels=run.labels),
        BOTH: lambda: both.observe(run.loss, grad_norm=run.norm, logits=run.logits, labels=run.labels),
        f"{GIVEN}, a snapshot every {CYCLE} steps": lambda: keeping.observe(run.loss, grad_norm=run.norm),
    }


def recipes(run: Training) -> dict[str, Callable[[], object]]:
    """Return the common recipes by name."""
    return {
        "loss.item() and isfinite": lambda: math.isfinite(run.loss.item()),
        "_foreach_norm, norm, item": lambda: torch.stack(torch._foreach_norm(run.gradients)).norm().item(),
        "loop of isfinite over gradients": lambda: all(bool(torch.isfinite(grad).all()) for grad in run.gradients),
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(run.parameters, 1e9),
    }


def measure_checks(run: Training, rounds: int, turns: Turns) -> dict[str, list[float]]:
    """Return the seconds of each step and each check, round by round."""
    observing, others = ways_to_observe(run), recipes(run)
    for _ in range(rounds):
        turns.time("forward and backward", run.forward_backward)
        run.norm = nn.utils.get_total_norm(run.gradients)
        verdicts = turns.take(observing | others)
        assert all(verdicts[name].proceed for name in observing), verdicts
        turns.time("optimizer step", run.optimizer.step)
        run.optimizer.zero_grad()
    return turns.seconds


def amortised(values: Sequence[float], cycle: int) -> float:
    """Return the mean over the rounds of a cycle, of each the median over the cycles."""
    return statistics.fmean(statistics.median(values[phase::cycle]) for phase in range(cycle))


def summarise_checks(seconds: dict[str, list[float]], cycle: int) -> dict[str, dict[str, float]]:
    """Return milliseconds and per cent of the step in the same round, of each check."""
    halves = [seconds.pop(name) for name in ("forward and backward", "optimizer step")]
    steps = [sum(pair) for pair in zip(*halves, strict=True)]
    rows = {"the step": {"milliseconds": 1e3 * statistics.median(steps), "per cent of the step": 100.0}}
    for name, values in seconds.items():
        shares = [100 * value / step for value, step in zip(values, steps, strict=True)]
        rows[name] = {"milliseconds": 1e3 * amortised(values, cycle), "per cent of the step": amortised(shares, cycle)}
    return rows


# -- snapshots and rewinds --------------------------------------------------------------------------------------------


def measure_snapshots(run: Training, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each copy, snapshot, check of a snapshot, and rewind, round by round."""
    config = GovernorConfig(max_rewinds=NEVER)
    keeper = Keeper(run.state, config, standard_detectors(config), Consensus())
    live = tensors_of(run.model, run.optimizer)
    buffers = [tensor.clone() for tensor in live]
    turns, taken = Turns(), 0

    def take() -> None:
        nonlocal taken
        taken += 1
        keeper.take(taken, taken, taken)

    def rewind_observed() -> Callable[[], object]:
        governor = Governor(run.state, config)
        with torch.no_grad():
            run.parameters[0][0, 0] = torch.nan
        return lambda: governor.observe(torch.nan)

    for _ in range(rounds + 3):
        turns.take(
            {
                COPY_IN: lambda: torch._foreach_copy_(buffers, live),
                COPY_OUT: lambda: torch._foreach_copy_(live, buffers),
                "snapshot": take,
                "rewind": lambda: keeper.rewind(1),
            }
        )
        if keeper.ring.candidate is None:  # the rewind came last and dropped it
            take()
        turns.time(CHECK, keeper.candidate_damage)
        keeper.promote()
        verdict = turns.time(OBSERVED_REWIND, rewind_observed())
        assert verdict.rollback is not None, verdict
    return {name: values[3:] for name, values in turns.seconds.items()}  # the ring fills, then nothing is allocated


def measure_memory(run: Training) -> dict[str, float]:
    """Return MiB: how much ten more snapshots of a governor made the process grow, once its ring was full."""
    governor = Governor(run.state, GovernorConfig(snapshot_every=1, probation_steps=0))
    run.state.buffers = {}
    for _ in range(8):
        governor.observe(1.0)
    reset_peak()
    captured, before = run.state.captures, resident()
    for _ in range(10):
        governor.observe(1.0)
    assert run.state.captures == captured + 10, run.state.captures - captured
    run.state.buffers = None
    return {"ten more snapshots": resident() - before, "ten more snapshots, peak": peak() - before}


def keeps_identity(run: Training) -> bool:
    """Whether a governed rewind leaves every parameter and moment the same object at the same address."""
    governor = Governor(run.state)
    before = [(tensor.data_ptr(), id(tensor)) for tensor in _objects(run)]
    with torch.no_grad():
        run.parameters[0][0, 0] = torch.nan
    assert governor.observe(torch.nan).rollback is not None
    return before == [(tensor.data_ptr(), id(tensor)) for tensor in _objects(run)]


def _objects(run: Training) -> list[Tensor]:
    return run.parameters + [value for values in run.optimizer.state.values() for value in values.values()]


def summarise_snapshots(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return milliseconds and ratios to the copy in the same direction in the same round."""
    rows: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        base = seconds[COPY_OUT if name in (COPY_OUT, "rewind", OBSERVED_REWIND) else COPY_IN]
        ratio = statistics.median(value / copied for value, copied in zip(values, base, strict=True))
        rows[name] = {"milliseconds": 1e3 * statistics.median(values), "ratio to copy": ratio}
    return rows


# -- results ----------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print the tables, write the results."""
    parser = argparse.ArgumentParser(description="What checks, snapshots and rewinds of the governor cost.")
    parser.add_argument("--rounds", type=int, default=6 * CYCLE, help=f"rounds, a multiple of {CYCLE} (default {6 * CYCLE})")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    if options.rounds < CYCLE or options.rounds % CYCLE:
        parser.error(f"--rounds must be a positive multiple of {CYCLE}, got {options.rounds}. Try {2 * CYCLE}.")
    torch.set_num_threads(1)
    run, small = gpt(), tiny()
    results: dict[str, Any] = {
        "command": f"python benchmarks/governor/costs.py --rounds {options.rounds}",
        "torch": torch.__version__, "python": platform.python_version(),
        "parameters": sum(parameter.numel() for parameter in run.parameters),
        "tensors": len(tensors_of(run.model, run.optimizer)), "tokens": NUM_TOKENS, "rounds": options.rounds,
        "checks": summarise_checks(measure_checks(run, options.rounds, Turns()), CYCLE),
        "snapshots": summarise_snapshots(measure_snapshots(run, options.rounds // 2)),
        "memory_mebibytes": measure_memory(run),
        "rewind keeps id and data_ptr": keeps_identity(run),
        "replay": exactness(),
        "checks of a network of 10-32-5 units": summarise_checks(
            measure_checks(small, TINY_STEPS, Turns(flush=False)), TINY_CYCLE
        ),
        "host-device synchronisations": "not measured: no CUDA device",
    }  # fmt: skip
    results["aims"] = aims(results)
    print(report(results))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
    print(f"written to {options.json}")


def aims(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each aim with what was measured and whether it is met."""
    checks, snapshots = results["checks"], results["snapshots"]
    per_snapshot = sum(snapshots[name]["milliseconds"] for name in ("snapshot", CHECK))
    measured = {
        f"{ALONE}, % of the step": checks[ALONE]["per cent of the step"],
        f"{GIVEN}, % of the step": checks[GIVEN]["per cent of the step"],
        "snapshot / copy": snapshots["snapshot"]["ratio to copy"],
        "ten more snapshots, MiB": results["memory_mebibytes"]["ten more snapshots, peak"],
        "snapshot every 10 steps, % of the step": 100 * per_snapshot / CYCLE / checks["the step"]["milliseconds"],
        "rewind / copy": snapshots["rewind"]["ratio to copy"],
        "replayed steps that differ": sum(results["replay"]["steps that differ after each rewind"]),
    }
    numeric = {
        name: {"measured": value, "aim": f"<= {AIMS[name]}", "met": value <= AIMS[name]} for name, value in measured.items()
    }
    kept = results["rewind keeps id and data_ptr"]
    same = results["replay"]["snapshot checksum unchanged"]
    return numeric | {
        "rewind keeps id and data_ptr": {"measured": kept, "aim": "true", "met": kept},
        "snapshot checksum unchanged": {"measured": same, "aim": "true", "met": same},
    }


def report(results: Mapping[str, Any]) -> str:
    """Return everything as text."""
    lines = [f"{results['parameters'] / 1e6:.1f} M parameters, {results['tensors']} tensors, {NUM_TOKENS} tokens a step"]
    for part in ("checks", "snapshots", "checks of a network of 10-32-5 units"):
        lines.append(part)
        for name, row in results[part].items():
            (_, milliseconds), (unit, value) = row.items()
            lines.append(f"  {name:54} {milliseconds:10.3f} ms {value:8.3f} {unit}")
    lines += [f"  {name}: {value}" for part in ("memory_mebibytes", "replay") for name, value in results[part].items()]
    for name, aim in results["aims"].items():
        value = f"{aim['measured']:.3f}" if isinstance(aim["measured"], float) else aim["measured"]
        lines.append(f"{name}: {value}, aim {aim['aim']}: {'met' if aim['met'] else 'MISSED'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
