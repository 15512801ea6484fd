"""The members of overhead.py: a block of numbers of a given size, of which four tiny steps an interval change two."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from morphogen.pbt import LearningRate, StateMember
from morphogen.state import RandomStreams, TrainingState

STEPS = 4
NOISE = 1e-3
SEARCH = {"rate": {"kind": "log_float", "low": 1e-4, "high": 1e-1}}


class Work:
    """What a member does, here and under Ray: gradient steps on theta, and a score with noise."""

    def __init__(self, megabytes: float, seed: int, noise: float) -> None:
        self.values: NDArray[np.float32] = np.ones(int(megabytes * 2**20 / 4), np.float32)
        self.values[:2] = 0.9
        self.rate, self.num_steps, self.noise = 0.02, 0, noise
        self._generator = np.random.default_rng(seed)

    def train(self, steps: int) -> float:
        """Do the steps; returns the score."""
        for _ in range(steps):
            self.values[:2] -= 2.0 * self.rate * self.values[:2]
            self.num_steps += 1
        return 1.2 - float((self.values[:2] ** 2).sum()) * (self.noise > 0.0) + self.noise * self._generator.standard_normal()


class ArrayMember:
    """The plainest member: an array."""

    def __init__(self, megabytes: float, seed: int, noise: float) -> None:
        self.work = Work(megabytes, seed, noise)
        self.steps_run = 0

    def train(self, until: int) -> Mapping[str, float]:
        steps = until - self.work.num_steps
        score = self.work.train(steps)
        self.steps_run += steps
        return {"score": score, "steps_run": self.steps_run, "at_seconds": time.time()}

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        return {"values": self.work.values.copy(), "num_steps": self.work.num_steps}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        np.copyto(self.work.values, values["values"])
        self.work.num_steps = values["num_steps"]

    def apply_hyperparameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        self.work.rate = values["rate"]
        return {"rate": self.work.rate}


class TorchMember(StateMember):
    """A network with SGD in a TrainingState, of the same size, momentum included; one row is trained."""

    def __init__(self, megabytes: float, seed: int, noise: float) -> None:
        rows = int(megabytes * 2**20 / 4 / 2 / 256)
        self.model = nn.Embedding(rows, 256)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        optimizer.state[self.model.weight]["momentum_buffer"] = torch.zeros_like(self.model.weight)
        self._chance = RandomStreams(seed).numpy("noise")
        self._noise, self.steps_run = noise, 0
        state = TrainingState(self.model, optimizer, extras={"noise": self._chance})
        super().__init__(state, step=self._learn, score=self._judge, knobs={"rate": LearningRate(state)})

    def _learn(self) -> None:
        with torch.no_grad():
            self.model.weight[0, :2].mul_(1.0 - 2.0 * 0.02)
        self.steps_run += 1

    def _judge(self) -> dict[str, float]:
        score = -float(self.model.weight[0, :2].detach().square().sum()) + self._noise * self._chance.standard_normal()
        return {"score": score, "steps_run": self.steps_run, "at_seconds": time.time()}


KINDS = {"array": ArrayMember, "torch": TorchMember}


@dataclasses.dataclass(frozen=True)
class Make:
    """Makes members; importable, as worker processes need it."""

    kind: str
    megabytes: float
    noise: float = NOISE

    def __call__(self, place: int, hyperparameters: Mapping[str, Any], seed: int) -> Any:
        return KINDS[self.kind](self.megabytes, seed, self.noise)
