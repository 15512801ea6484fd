"""The training loop of the benchmark. It is any loop: faults reach it through hooks, the recorder only looks."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from tasks import Batch, Run
from torch import Tensor

from morphogen.governor.faults import Injections

NOTHING = Injections(())


class Watch(Protocol):
    """What looks at each step between ``backward`` and ``step``."""

    def look(self, step: int, loss: Tensor, norm: Tensor | None, outputs: Tensor, labels: Tensor) -> bool:
        """Return whether the step is to be taken."""
        ...


class Faults(Protocol):
    """What puts faults into steps, as ``Schedule`` does."""

    def at(self, step: int) -> contextlib.AbstractContextManager[Injections]: ...


def train(run: Run, watch: Watch, steps: range, faults: Faults | None = None) -> None:
    """Train for the given steps."""
    for step in steps:
        train_step(run, watch, step, faults)


def train_step(run: Run, watch: Watch, step: int, faults: Faults | None = None) -> None:
    """Draw a batch and train on it, with the faults due at ``step``."""
    batch = run.draw()  # outside the fault: reinforcement learning collects experience here
    with faults.at(step) if faults else contextlib.nullcontext(NOTHING) as injected:
        _update(run, watch, step, batch, injected)


def _update(run: Run, watch: Watch, step: int, batch: Batch, injected: Injections) -> None:
    inputs, targets = batch[0], injected.labels(batch[1])
    run.optimizer.zero_grad()
    outputs = run.model(inputs)
    loss = run.loss(outputs, targets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.clip_norm) if run.clip_norm else None
    if watch.look(step, loss, norm, outputs, targets):
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()
