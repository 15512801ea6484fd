"""How large the first updates after a governed rewind are, in learning rates, by optimizer and strategy.

One 8x8 weight matrix in float64 whose gradient is given: 300 steps of random signs, as of a run that has settled, which
leave second moments of exactly 1; then the governor takes its snapshot. In the next step the gradient that reaches the
optimizer is 10,000 times too large, behind the governor's back, and a weight turns NaN, so that it rewinds. Then all
gradients are 1 for 16 steps. Reported is the largest move of a weight over the learning rate, in the first of them and in
the 15 after it. The twin met no fault and was not rewound.

    restore, reset, zero_momentum   what the governor offers
    keep stale                      weights rewound, moments left as the fault made them, as most loops do
    zeroed, step kept               running means of gradients and of their squares zeroed, `step` kept: a common mistake

    python benchmarks/governor/first_update.py [--json PATH]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from morphogen.governor import Governor, GovernorConfig, Verdict
from morphogen.state import Snapshot, TrainingState, surgery

RESULTS = Path(__file__).parents[1] / "results" / "governor_first_update.json"
RATE, WIDTH, SETTLING_STEPS, MEASURED_STEPS, FAULT = 1e-3, 8, 300, 16, 1e4
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=RATE),
    "SGD, momentum": lambda p: optim.SGD(p, lr=RATE, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=RATE),
    "Adam, amsgrad": lambda p: optim.Adam(p, lr=RATE, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, lr=RATE, weight_decay=0.0),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=RATE, weight_decay=0.0, fused=True),
    "NAdam": lambda p: optim.NAdam(p, lr=RATE),
    "RAdam": lambda p: optim.RAdam(p, lr=RATE),
    "Adamax": lambda p: optim.Adamax(p, lr=RATE),
    "RMSprop": lambda p: optim.RMSprop(p, lr=RATE),
    "RMSprop, momentum": lambda p: optim.RMSprop(p, lr=RATE, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, lr=RATE),
    "Adadelta": lambda p: optim.Adadelta(p, lr=RATE),
    "Adafactor": lambda p: optim.Adafactor(p, lr=RATE),
    "ASGD": lambda p: optim.ASGD(p, lr=RATE),
    "Rprop": lambda p: optim.Rprop(p, lr=RATE),
    "Muon": lambda p: optim.Muon(p, lr=RATE, weight_decay=0.0),
}
ADAMS = ("Adam", "AdamW", "AdamW, fused")
GOVERNED = ("restore", "reset", "zero_momentum")
ROUNDING = 1e-6
"""An update is a difference of weights, and `eps` is in it: equal to a limit means up to this much above it."""


class Matrix(nn.Module):
    """A weight matrix; with c as input, its gradient is c."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.weight = nn.Parameter(start)

    def forward(self, c: Tensor) -> Tensor:
        return (self.weight * c).sum()


@dataclasses.dataclass
class Run:
    """A governed run, or for a ``governor`` of None an ungoverned one."""

    model: Matrix
    optimizer: optim.Optimizer
    state: TrainingState
    snapshot: Snapshot
    governor: Governor | None = None

    @classmethod
    def settled(cls, name: str, strategy: str | None = None) -> Run:
        """Return a run after the settling steps, governed from there on with ``strategy``."""
        model = Matrix()
        optimizer = OPTIMIZERS[name](model.parameters())
        state = TrainingState(model, optimizer)
        run = cls(model, optimizer, state, state.capture())
        signs = torch.Generator().manual_seed(2)
        for _ in range(SETTLING_STEPS):
            run.step(2.0 * torch.randint(2, (WIDTH, WIDTH), generator=signs).double() - 1.0)
        run.snapshot = state.capture()
        run.governor = None if strategy is None else Governor(state, GovernorConfig.model_validate({"optimizer": strategy}))
        return run

    def step(self, gradient: Tensor, error: float = 1.0) -> Verdict | None:
        """Train one step; ``error`` multiplies the gradient after it was observed."""
        self.optimizer.zero_grad()
        loss = self.model(gradient)
        loss.backward()
        verdict = self.governor.observe(loss) if self.governor else None
        if verdict is None or verdict.proceed:
            for parameter in self.model.parameters():
                parameter.grad.mul_(error)
            self.optimizer.step()
        return verdict

    def spoil(self) -> None:
        """Let the fault into weights and moments."""
        self.step(ones(), error=FAULT)
        with torch.no_grad():
            self.model.weight[0, 0] = torch.nan

    def updates(self) -> list[Tensor]:
        """Return the next moves of the weights."""
        moves: list[Tensor] = []
        for _ in range(MEASURED_STEPS):
            before = self.model.weight.detach().clone()
            verdict = self.step(ones())
            assert verdict is None or verdict.proceed, verdict
            moves.append(self.model.weight.detach() - before)
        return moves


def ones() -> Tensor:
    return torch.ones(WIDTH, WIDTH, dtype=torch.float64)


def rewound(name: str, strategy: str) -> Run:
    """Return a run that the governor has just rewound."""
    run = Run.settled(name, strategy)
    run.spoil()
    verdict = run.step(ones())
    assert verdict is not None and verdict.rollback is not None and verdict.rollback.optimizer_strategy == strategy, verdict
    return run


def has_zeroed_squares(optimizer: optim.Optimizer) -> bool:
    """Whether a second moment is zero though its ``step`` is not: the next updates would be several times too large."""
    return any(
        isinstance(state.get(key), Tensor) and not state[key].any() and float(state["step"]) > 0.0
        for state in optimizer.state.values()
        for key in surgery.SECOND_MOMENTS
    )


def stale(name: str) -> Run:
    """Return a run of which the weights alone were rewound."""
    run = Run.settled(name)
    run.spoil()
    run.state.restore(run.snapshot, optimizer="keep")
    return run


def zeroed(name: str) -> Run:
    """Return a run whose moments were zeroed after the rewind, and ``step`` was not."""
    run = Run.settled(name)
    run.spoil()
    run.state.restore(run.snapshot)
    surgery.scale_moments(run.optimizer, first=0.0, second=0.0)
    return run


def measure(name: str) -> dict[str, Any]:
    """Return sizes by strategy for one optimizer, and whether "restore" gave the twin's updates to the bit."""
    runs = {"twin": Run.settled(name)} | {strategy: rewound(name, strategy) for strategy in GOVERNED}
    runs |= {"keep stale": stale(name), "zeroed, step kept": zeroed(name)}
    zeroing = [strategy for strategy, run in runs.items() if has_zeroed_squares(run.optimizer)]
    moves = {strategy: run.updates() for strategy, run in runs.items()}
    row: dict[str, Any] = {strategy: sizes(those) for strategy, those in moves.items()}
    row["leaving second moments zeroed"] = zeroing
    row["restore equals twin"] = all(map(torch.equal, moves["restore"], moves["twin"]))
    return row


def sizes(moves: list[Tensor]) -> dict[str, float]:
    """Return the size of the first update and of the largest after it, in learning rates."""
    first, *rest = (float(move.abs().max()) / RATE for move in moves)
    return {"first": round(first, 7), "largest of the next 15": round(max(rest), 7)}


def aims(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each aim with what was measured and whether it is met."""
    differing = [name for name, row in rows.items() if not row["restore equals twin"]]
    reset = max(rows[name]["reset"]["first"] for name in ADAMS)
    zero = max(rows[name]["zero_momentum"]["first"] for name in ADAMS)
    zeroing = [
        f"{name}: {strategy}" for name, row in rows.items() for strategy in GOVERNED
        if strategy in row["leaving second moments zeroed"]
    ]  # fmt: skip
    rmsprop = max(rows[name]["reset"]["first"] for name in rows if name.startswith("RMSprop"))
    return {
        "optimizers": {"measured": len(rows), "aim": ">= 10", "met": len(rows) >= 10},
        "restore differs from twin": {"measured": differing, "aim": "none", "met": not differing},
        "first update after reset, Adam and AdamW": _at_most(reset, 1.0),
        "first update after zero_momentum, Adam and AdamW": _at_most(zero, 0.1),
        "first update after reset, RMSprop": _at_most(rmsprop, 1.0),
        "second moments zeroed, `step` kept, by the governor": {"measured": zeroing, "aim": "none", "met": not zeroing},
    }


def _at_most(value: float, limit: float) -> dict[str, Any]:
    return {"measured": value, "aim": f"<= {limit}", "met": value <= limit + ROUNDING}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the sizes as text: first update, largest of the next 15."""
    strategies = [key for key, value in next(iter(rows.values())).items() if isinstance(value, dict)]
    lines = [f"{'first / largest of the next 15':32}" + "".join(f"{strategy:>19}" for strategy in strategies)]
    for name, row in rows.items():
        pairs = (row[strategy].values() for strategy in strategies)
        lines.append(f"{name:32}" + "".join(f"{' / '.join(f'{size:.3g}' for size in pair):>19}" for pair in pairs))
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description="Size of the first updates after a governed rewind, in learning rates.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(name) for name in OPTIMIZERS}
    reached = aims(rows)
    print(table(rows))
    for name, aim in reached.items():
        print(f"{name}: {aim['measured']}, aim {aim['aim']}: {'met' if aim['met'] else 'MISSED'}")
    results = {
        "command": "python benchmarks/governor/first_update.py",
        "torch": torch.__version__, "python": platform.python_version(),
        "settling_steps": SETTLING_STEPS, "unit": "learning rates", "updates": rows, "aims": reached,
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
