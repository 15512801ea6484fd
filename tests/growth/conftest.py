"""A growing run with everything in it, and a naive reading of it that knows nothing of the code under test."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from morphogen.growth import GrowableModel, GrowthConfig, Sowing, Stage
from morphogen.state import TrainingState
from morphogen.telemetry.events import Event
from morphogen.testing import LENIENT, HostCase, lead_to

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
}
LIVE_STAGES = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


def train_step(module: nn.Module, optimizer: Optimizer, inputs: Tensor, target: Tensor) -> Tensor:
    """Take one step towards ``target`` and return the outputs."""
    optimizer.zero_grad()
    outputs = module(inputs)
    (outputs - target).square().mean().backward()
    optimizer.step()
    return outputs.detach()


class GrowthRun:
    """A growable model in training: its optimizer, its TrainingState and its own data."""

    def __init__(self, case: HostCase, optimizer: str = "adam", config: GrowthConfig = LENIENT, seed: int = 0) -> None:
        self.case = case
        self.events: list[Event] = []
        self.model: GrowableModel = case.model(config=config, seed=seed, emit=self.events.append)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.data = torch.Generator().manual_seed(1)
        self.state = TrainingState(self.model, self.optimizer, extras={"data": self.data})

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets from the run's own stream."""
        inputs = torch.randn(self.case.example().shape, generator=self.data)
        with torch.no_grad():
            shape = copy.deepcopy(self.model.host).eval()(inputs).shape
        return inputs, torch.randn(shape, generator=self.data)

    def step(self) -> Tensor:
        """Train on one batch and let the sensors read the gradients."""
        outputs = train_step(self.model, self.optimizer, *self.batch())
        self.model.sense()
        return outputs

    def steps(self, count: int) -> list[Tensor]:
        """Train on ``count`` batches with one tick after each, and return the outputs."""
        outputs: list[Tensor] = []
        for _ in range(count):
            outputs.append(self.step())
            self.model.tick()
        return outputs

    def sow(self, slot: str, blueprint: str = "low_rank", stage: Stage = Stage.GERMINATED, **sowing: Any) -> None:
        """Germinate and lead the seed to ``stage``."""
        self.model.germinate(slot, Sowing(blueprint=blueprint, **sowing))
        lead_to(self.model, slot, stage, self.case.example())

    def members(self) -> set[int]:
        """Ids of the parameters in the optimizer; fails if one is there twice."""
        listed = [id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]]
        assert len(listed) == len(set(listed))
        return set(listed)

    def owned(self) -> set[int]:
        """Ids of the trainable parameters that somebody owns."""
        return {id(p) for pairs in self.model.owners().values() for _, p in pairs if p.requires_grad}

    def contents(self) -> dict[str, Any]:
        """Everything in the run, copied without the help of the code under test."""
        model = self.model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        held = {names.get(id(p), "gone"): copy.deepcopy(values) for p, values in self.optimizer.state.items()}
        return {
            "clock": model.clock,
            "slots": {name: (model.slot(name).state, model.slot(name).sensors) for name in model.stages()},
            "tensors": {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())},
            "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
            "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
            "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
            "modes": {name: part.training for name, part in model.named_modules()},
            "hooks": {name: list(part._forward_hooks) for name, part in model.named_modules()},
            "groups": [
                {**group, "params": [names.get(id(p), "gone") for p in group["params"]]}
                for group in self.optimizer.param_groups
            ],
            "moments": dict(sorted(held.items())),
            "data": self.data.get_state(),
            "chance": chance(),
        }


def chance() -> tuple[Any, ...]:
    """The states of the global generators."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)


def same(left: Any, right: Any) -> bool:
    """Whether two nests are equal to the bit: types, keys, shapes, dtypes, signed zeros, NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _bytes(left) == _bytes(right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the entries of two readings that are not the same to the bit."""
    return [key for key in {**left, **right} if not (key in left and key in right and same(left[key], right[key]))]


@dataclasses.dataclass(frozen=True)
class Kit:
    """What tests of this folder share."""

    run: Callable[..., GrowthRun] = GrowthRun
    train_step: Callable[[nn.Module, Optimizer, Tensor, Tensor], Tensor] = train_step
    optimizers: Mapping[str, Callable[[Any], Optimizer]] = dataclasses.field(default_factory=lambda: OPTIMIZERS)
    chance: Callable[[], tuple[Any, ...]] = chance
    same: Callable[[Any, Any], bool] = same
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]] = differences


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Runs and comparisons."""
    return Kit()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test that asks for ``live_stage`` run in each stage in which a seed is in the slot."""
    if "live_stage" in metafunc.fixturenames:
        metafunc.parametrize("live_stage", LIVE_STAGES, ids=lambda stage: stage.name)
