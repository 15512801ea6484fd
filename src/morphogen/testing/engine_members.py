"""Members to check engines with: real ones that train in no time, and go wrong when asked to."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from morphogen.pbt import Attribute, LearningRate, StateMember, Trained
from morphogen.pbt.records import Hyperparameters
from morphogen.state import RandomStreams, TrainingState, draw_from

START: Hyperparameters = {"learning_rate": 0.01, "dropout": 0.25}
OTHER: Hyperparameters = {"learning_rate": 0.003, "dropout": 0.5}
SPACES: dict[str, Any] = {
    "learning_rate": {"kind": "log_float", "low": 1e-4, "high": 1e-1},
    "dropout": {"kind": "ordered", "values": (0.0, 0.25, 0.5)},
}
_AGES_SECONDS = 3600.0


class TroubledMember(StateMember):
    """A small network that learns a sine, with dropout, batch normalisation and chance from every kind of generator.

    Args:
        seed: Of its weights and its data.
        trouble: What goes wrong at step ``at_step``, and only then: "raises", "is NaN", "hangs", "dies",
            "dies when saved" after it. Or all the time: "not born", "ignores" hyperparameters, "keeps" its parameters to
            itself. "" for nothing.
        at_step: When.
    """

    def __init__(self, seed: int, trouble: str = "", at_step: int = 6) -> None:
        """Have trained nothing; ValueError if it is not born."""
        if trouble == "not born":
            raise ValueError("this one is not born")
        streams = RandomStreams(seed)
        with draw_from(streams.torch("weights")):
            layers = nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 1)
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.data = streams.torch("data")
        state = TrainingState(self.model, self.optimizer, extras={"data": self.data})
        knobs = {"learning_rate": LearningRate(state), "dropout": Attribute(layers[3], "p")}
        super().__init__(state, step=self._learn, score=self._judge, knobs=knobs)
        self._trouble, self._at_step, self._is_nan = trouble, at_step, False

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return all that travels; one that "keeps" it does not."""
        if self._trouble == "keeps":
            raise RuntimeError("this one gives nothing")
        return super().get_parameters(include_optimizer)

    def apply_hyperparameters(self, values: Hyperparameters) -> dict[str, Any]:
        """Use ``values``; one that "ignores" them does not."""
        return super().apply_hyperparameters({} if self._trouble == "ignores" else values)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves."""
        if self._trouble == "dies when saved" and self.num_steps == self._at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().state_dict()

    def _learn(self) -> None:
        if self.num_steps == self._at_step:
            self._begin_trouble()
        offset = 0.1 * float(np.random.standard_normal())  # shared: an engine must give each member its own
        offset += 0.1 * random.random()  # shared: likewise
        input_B2 = torch.randn(16, 2, generator=self.data) + offset
        loss = (self.model(input_B2)[:, 0] - input_B2.sum(1).sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _judge(self) -> Trained:
        if self._is_nan:
            self._is_nan = False
            return Trained(float("nan"))
        input_B2 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        self.model.eval()
        with torch.no_grad():
            errors_B = (self.model(input_B2)[:, 0] - input_B2.sum(1).sin()).square()
        self.model.train()
        return Trained(-float(errors_B.mean()), tuple((-errors_B[:4]).tolist()), {"worst": float(errors_B.max())})

    def _begin_trouble(self) -> None:
        if self._trouble == "raises":
            raise RuntimeError("this one is broken")
        if self._trouble == "hangs":
            time.sleep(_AGES_SECONDS)
        if self._trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        self._is_nan = self._trouble == "is NaN"


class PlainMember:
    """A member with the four methods and no more."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.height, self.rate = 0.0, 0.0

    def train(self, until: int) -> float:
        """Climb."""
        self.height += self.rate
        return self.height

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return the height."""
        return {"height": self.height}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """Go on from another height."""
        self.height = values["height"]

    def apply_hyperparameters(self, values: Hyperparameters) -> None:
        """Climb at another rate."""
        self.rate = float(values["learning_rate"])


def troubled_member(
    place: int, hyperparameters: Hyperparameters, seed: int, *, troubles: Mapping[int, str] | None = None
) -> TroubledMember:
    """Make a member; ``troubles`` says what goes wrong with whom, by place."""
    return TroubledMember(seed, (troubles or {}).get(place, ""))


def plain_member(place: int, hyperparameters: Hyperparameters, seed: int) -> PlainMember:
    """Make a member that can do little."""
    return PlainMember()
