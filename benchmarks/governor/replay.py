"""Whether a run that the governor rewound goes on bit for bit as it did the first time, with all that can differ in it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.governor import Governor, GovernorConfig, Verdict
from morphogen.state import Snapshot, TrainingState, draw_from

SETTLING_STEPS, REPLAYED_STEPS, REWINDS = 25, 30, 3


class Cursor:
    """A place in a shuffled data set; epochs are drawn from the data generator."""

    def __init__(self, size: int, draws: torch.Generator) -> None:
        self._size, self._draws = size, draws
        self._order, self._next = torch.randperm(size, generator=draws), 0

    def batch(self, size: int) -> Tensor:
        """Return the numbers of the next samples."""
        if self._next + size > self._size:
            self._order, self._next = torch.randperm(self._size, generator=self._draws), 0
        self._next += size
        return self._order[self._next - size : self._next]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order.clone(), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._order, self._next = state["order"].clone(), state["next"]


class Remembering(TrainingState):
    """A training state that remembers its latest snapshot."""

    latest: Snapshot

    def capture(self) -> Snapshot:
        self.latest = super().capture()
        return self.latest


class Run:
    """A classifier with batch normalisation and dropout under bfloat16, augmented by the three global generators."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.inputs, self.labels = torch.randn(96, 16, generator=draws), torch.randint(5, (96,), generator=draws)
        with draw_from(draws):
            self.model = nn.Sequential(
                nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 5)
            )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=200)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
        self.draws = torch.Generator().manual_seed(1)
        self.cursor = Cursor(len(self.inputs), self.draws)
        extras = {"draws": self.draws, "cursor": self.cursor}
        self.state = Remembering(self.model, self.optimizer, self.scheduler, self.scaler, extras)
        self.governor: Governor | None = None
        self.loss = torch.zeros(())

    def step(self) -> Verdict | None:
        """Train one step; what moves the data draws from generators as users do, the global ones too."""
        chosen = self.cursor.batch(16)
        noise = 0.1 * torch.randn(16, 16, generator=self.draws) + 0.01 * random.random() + 0.01 * float(np.random.rand())
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(self.inputs[chosen] + noise)
        self.loss = F.cross_entropy(logits.float(), self.labels[chosen])
        self.scaler.scale(self.loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        verdict = self.governor.observe(self.loss, grad_norm=norm) if self.governor else None
        if verdict is None or verdict.proceed:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        return verdict

    def steps(self) -> list[str]:
        """Train the steps that are compared and return a checksum of everything after each."""
        checksums: list[str] = []
        for _ in range(REPLAYED_STEPS):
            verdict = self.step()
            assert verdict is not None and verdict.proceed, verdict
            checksums.append(self.checksum())
        return checksums

    def meet_fault(self) -> None:
        """Let weights, running statistics and moments go bad, and train until the governor has rewound."""
        with torch.no_grad():
            for tensor in (*self.model.parameters(), self.model[1].running_var, *self._moments()):
                tensor.fill_(torch.nan)
        verdicts = (self.step() for _ in range(10))
        assert any(verdict is not None and verdict.rollback is not None for verdict in verdicts)

    def _moments(self) -> list[Tensor]:
        return [values["exp_avg_sq"] for values in self.optimizer.state.values()]

    def checksum(self) -> str:
        """Return the SHA-256 of everything that a step reads or writes."""
        digest = hashlib.sha256()
        parts = (self.model, self.optimizer, self.scheduler, self.scaler, self.cursor)
        generators = (self.draws.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state())
        _digest([self.loss, [part.state_dict() for part in parts], generators], digest)
        return digest.hexdigest()


def _digest(value: Any, digest: Any) -> None:
    """Feed ``value`` to ``digest``, tensors and arrays by their bytes, all else by its text."""
    if isinstance(value, Mapping):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for part in value:
            _digest(part, digest)
    elif isinstance(value, Tensor):
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(value.tobytes())
    else:
        digest.update(repr(value).encode())


def exactness() -> dict[str, Any]:
    """Rewind three times to one snapshot; return how many of the steps that follow differ from the first time.

    As a control, that the comparison can fail: how many differ when one number is drawn from the global generator.
    """
    run = Run()
    for _ in range(SETTLING_STEPS):
        run.step()
    config = GovernorConfig(snapshot_every=10**9, learning_rate_penalty=1.0, skip_window_steps=0)
    run.governor = Governor(run.state, config)
    snapshot = run.state.latest
    sum_before, first = snapshot.checksum(), run.steps()
    differing: list[int] = []
    for _ in range(REWINDS):
        run.meet_fault()
        differing.append(num_differing(first, run.steps()))
    assert run.state.latest is snapshot
    unchanged = snapshot.checksum() == sum_before
    run.state.restore(snapshot)
    run.governor = Governor(run.state, config)
    torch.rand(())
    return {
        "steps": REPLAYED_STEPS,
        "steps that differ after each rewind": differing,
        "snapshot checksum unchanged": unchanged,
        "control, steps that differ after a draw too many": num_differing(first, run.steps()),
    }


def num_differing(left: list[str], right: list[str]) -> int:
    """Return in how many places two lists differ."""
    return sum(a != b for a, b in zip(left, right, strict=True))
