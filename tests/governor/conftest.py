"""A plain training loop under a governor, and a naive reading of everything in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from morphogen.governor import Detector, Governor, GovernorConfig, Rollback, Verdict
from morphogen.state import TrainingState, draw_from
from morphogen.telemetry.events import Event

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    "adamw_single": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, foreach=False, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
}
CENTRES = 1.5 * torch.randn(5, 10, generator=torch.Generator().manual_seed(7))
Change = Callable[[Any], Any]


def as_it_is(value: Any) -> Any:
    return value


def small_model(seed: int = 0, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    """10 inputs, 5 classes."""
    with draw_from(torch.Generator().manual_seed(seed)):
        middle: list[nn.Module] = [nn.BatchNorm1d(16)] if batch_norm else []
        middle += [nn.ReLU(), nn.Dropout(dropout)] if dropout else [nn.ReLU()]
        return nn.Sequential(nn.Linear(10, 16), *middle, nn.Linear(16, 5))


class Loop:
    """A small classification run: model, optimizer, schedule, own data stream, governor."""

    def __init__(
        self,
        config: GovernorConfig | None = None,
        *,
        optimizer: str = "adam",
        model: nn.Module | None = None,
        detectors: Sequence[Detector] = (),
        emit: bool = True,
        extras: Mapping[str, object] | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.model = model if model is not None else small_model(seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = CosineAnnealingLR(self.optimizer, 10_000)
        self.data = torch.Generator().manual_seed(seed + 1)
        self.events: list[Event] = []
        self.verdicts: list[Verdict] = []
        self.state = TrainingState(self.model, self.optimizer, self.scheduler, extras={"data": self.data, **(extras or {})})
        emitting = {"emit": self.events.append} if emit else {}
        self.governor = Governor(self.state, config, detectors=detectors, **emitting)

    def batch(self) -> tuple[Tensor, Tensor]:
        targets = torch.randint(5, (self.batch_size,), generator=self.data)
        return CENTRES[targets] + torch.randn(self.batch_size, 10, generator=self.data), targets

    def observe(
        self, *, inputs: Change = as_it_is, loss: Change = as_it_is, gradients: Change = as_it_is, **given: Any
    ) -> Verdict:
        """Forward, backward and the governor's verdict; each change is made to what it is named after."""
        batch, targets = self.batch()
        self.optimizer.zero_grad()
        value = functional.cross_entropy(self.model(inputs(batch)), targets)
        value = loss(value)
        value.backward()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(gradients(parameter.grad))
        verdict = self.governor.observe(value, **given)
        self.verdicts.append(verdict)
        return verdict

    def step(self, **changes: Any) -> Verdict:
        """One pass of the loop of the README."""
        verdict = self.observe(**changes)
        if verdict.proceed:
            self.optimizer.step()
            self.scheduler.step()
        return verdict

    def steps(self, count: int, **changes: Any) -> list[Verdict]:
        return [self.step(**changes) for _ in range(count)]

    def steps_until(self, wanted: str, most: int, **changes: Any) -> Verdict:
        """Step until a verdict is ``wanted`` ("skip", "rewind"); fails after ``most`` steps."""
        for _ in range(most):
            verdict = self.step(**changes)
            if verdict.action.value == wanted:
                return verdict
        raise AssertionError(f"no {wanted} in {most} steps")

    @property
    def rollbacks(self) -> list[Rollback]:
        return [event for event in self.events if isinstance(event, Rollback)]

    def contents(self) -> dict[str, Any]:
        """Weights, buffers, moments and learning rates, copied without the help of the code under test."""
        return contents(self.model, self.optimizer)

    def poison(self) -> None:
        """Make one weight NaN: the run itself is damaged."""
        with torch.no_grad():
            next(iter(self.model.parameters())).view(-1)[0] = math.nan

    def damage(self, size: float = 3.0) -> None:
        """Put noise of ``size`` times their own size on the weights."""
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.model.parameters():
                scale = size * parameter.square().mean().sqrt()
                parameter.add_(scale * torch.randn(parameter.shape, generator=noise))


def contents(model: nn.Module, *optimizers: Optimizer) -> dict[str, Any]:
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for number, optimizer in enumerate(optimizers):
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"{number} {named.get(id(parameter), 'gone')} {key}"] = copy.deepcopy(value)
        tensors[f"{number} rates"] = [float(group["lr"]) for group in optimizer.param_groups]
    return tensors


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the entries that are not the same to the bit."""
    return [name for name in {**left, **right} if not _same(left.get(name), right.get(name))]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same_kind = left.shape == right.shape and left.dtype == right.dtype
        return same_kind and left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()
    return type(left) is type(right) and left == right


def is_finite(entries: Mapping[str, Any]) -> bool:
    return all(bool(value.isfinite().all()) for value in entries.values() if isinstance(value, Tensor))


class Kit:
    """What the tests of this folder share."""

    Loop = Loop
    optimizers = tuple(OPTIMIZERS)
    small_model = staticmethod(small_model)
    contents = staticmethod(contents)
    differences = staticmethod(differences)
    is_finite = staticmethod(is_finite)

    @staticmethod
    def times(factor: float) -> Change:
        """Multiply by ``factor``, whatever it is applied to."""
        return lambda value: value * factor

    nan = staticmethod(lambda value: value * math.nan)
    inf = staticmethod(lambda value: value + math.inf)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
