"""What the tests of the three adapters share: a naive reading of a run, and a governor that learns what is normal quickly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from morphogen.governor import ExplosionConfig, Finding, GovernorConfig, Observation
from morphogen.state import draw_from


def contents(*parts: Any) -> list[Any]:
    """The states of models, optimizers, schedules and scalers, copied without the help of the code under test."""
    return [copy.deepcopy(part.state_dict()) for part in parts]


def same(left: Any, right: Any) -> bool:
    """Whether two trees of tensors and plain data are the same to the bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


class Recorder:
    """A detector that finds nothing and remembers every observation."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def inspect(self, observation: Observation) -> Finding | None:
        self.seen.append(observation)
        return None

    def accept(self, observation: Observation) -> None: ...

    def forget(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def damage(model: nn.Module, size: float = 10.0) -> None:
    """Put noise of ``size`` on all weights."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))


class Kit:
    contents = staticmethod(contents)
    same = staticmethod(same)
    damage = staticmethod(damage)
    Recorder = Recorder
    config = GovernorConfig(
        snapshot_every=5,
        probation_steps=5,
        patience=2,
        explosion=ExplosionConfig(window_steps=32, min_steps=20, lag_steps=8),
    )

    @staticmethod
    def network(seed: int = 0) -> nn.Module:
        """10 inputs, 5 classes."""
        with draw_from(torch.Generator().manual_seed(seed)):
            return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 5))

    @staticmethod
    def data(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Five noisy clusters in ten dimensions."""
        generator = torch.Generator().manual_seed(seed)
        centres = 1.5 * torch.randn(5, 10, generator=torch.Generator().manual_seed(7))
        targets = torch.randint(5, (count,), generator=generator)
        return centres[targets] + torch.randn(count, 10, generator=generator), targets


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
