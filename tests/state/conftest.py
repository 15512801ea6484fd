"""A small run with every kind of part, and a naive reading of it that knows nothing of the code under test."""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler

from morphogen.errors import CheckpointError
from morphogen.state import TrainingState

NUM_TOKENS, WIDTH, BATCH = 7, 6, 4


class Net(nn.Module):
    """Tied head, BatchNorm, dropout, a frozen layer, and a buffer that no ``state_dict`` holds."""

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        layers = {
            "embed": nn.Embedding(NUM_TOKENS, WIDTH),
            "frozen": nn.Linear(WIDTH, WIDTH),
            "norm": nn.BatchNorm1d(WIDTH),
            "body": nn.Linear(WIDTH, WIDTH),
            "drop": nn.Dropout(0.2),
            "head": nn.Linear(WIDTH, NUM_TOKENS, bias=False),
        }
        for name in reversed(layers) if reverse else layers:
            self.add_module(name, layers[name])
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("level", torch.zeros(WIDTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).mean(1)
        hidden = self.drop(self.norm(hidden + self.frozen(hidden)))
        if self.training:
            with torch.no_grad():
                self.level.lerp_(hidden.mean(0).to(self.level.dtype), 0.1)
        return self.head(torch.tanh(self.body(hidden - self.level)))


class Tally:
    """An extra with ``state_dict``: numbers, a tuple, an array, a tensor and a nested dict with integer keys."""

    def __init__(self) -> None:
        self.count, self.mean, self.last, self.by_step = 0, np.zeros(3), torch.zeros(2), {0: (0, float("inf"))}

    def add(self, loss: float) -> None:
        self.count += 1
        self.mean += (loss - self.mean) / self.count
        self.last[self.count % 2] = loss
        self.by_step = {self.count: (self.count, loss)}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(vars(self)):
            raise ValueError(f"a tally holds {sorted(vars(self))}, got {sorted(state)}")
        vars(self).update(state)


def _muon(model: nn.Module) -> dict[str, Optimizer]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = [parameter for parameter in trainable if parameter.ndim != 2]
    square = [parameter for parameter in trainable if parameter.ndim == 2]
    return {"matrices": torch.optim.Muon(square, lr=0.01), "rest": torch.optim.AdamW(flat, lr=0.01)}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    decayed = [name for name in named if named[name].ndim == 2]
    plain = [name for name in named if named[name].ndim != 2]
    return [
        {"params": [(name, named[name]) for name in decayed], "weight_decay": 0.1},
        {"params": [(name, named[name]) for name in plain], "lr": 0.002, "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer | dict[str, Optimizer]]] = {
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw-single": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False),
    "adamw-amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adamw-groups": lambda m: torch.optim.AdamW(_groups(m), lr=0.01),
    "adamw-tensor-lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05, initial_accumulator_value=0.1),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.5),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "muon": _muon,
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=3, history_size=4),
}

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.02, total_steps=40, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, T_max=9)], milestones=[4]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5, 7], gamma=0.5),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@dataclasses.dataclass
class Run:
    """A live run, its parts, and one training step of it."""

    model: Net
    optimizers: dict[str, Optimizer]
    schedulers: dict[str, Any]
    extras: dict[str, Any]
    state: TrainingState

    def step(self) -> float:
        """Train on one batch; draws from its own generators and from all global ones."""
        tokens = torch.randint(0, NUM_TOKENS, (BATCH, 3), generator=self.extras["data"])
        labels = torch.from_numpy(self.extras["noise"].integers(0, NUM_TOKENS, BATCH))
        scale = 1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand())

        def closure() -> Tensor:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            logits = self.model(tokens) + self.extras["hidden"]
            loss = scale * F.cross_entropy(logits, labels)
            loss.backward()
            return loss

        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in self.optimizers.values()):
            loss = float(self.optimizers[""].step(closure).detach())
        else:
            loss = float(closure().detach())
            for optimizer in self.optimizers.values():
                optimizer.step()
        for scheduler in self.schedulers.values():
            scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        with torch.no_grad():
            self.extras["hidden"].mul_(0.9).add_(0.01 * loss)
            for slow, fast in zip(self.extras["ema"].parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        self.extras["tally"].add(loss)
        return loss

    def steps(self, count: int) -> list[float]:
        """Train for ``count`` steps and return the losses."""
        return [self.step() for _ in range(count)]

    def contents(self) -> dict[str, Any]:
        """Everything in the run, copied without the help of the code under test."""
        return {
            "tensors": naive_tensors(self.model),
            "ema": naive_tensors(self.extras["ema"]),
            "trainable": {name: p.requires_grad for name, p in self.model.named_parameters()},
            "training": {name: module.training for name, module in self.model.named_modules()},
            "optimizers": {part: naive_optimizer(optimizer) for part, optimizer in self.optimizers.items()},
            "schedulers": {part: naive_schedule(scheduler) for part, scheduler in self.schedulers.items()},
            "tally": copy.deepcopy(self.extras["tally"].state_dict()),
            "hidden": self.extras["hidden"].clone(),
            "streams": (self.extras["data"].get_state(), copy.deepcopy(self.extras["noise"].bit_generator.state)),
            "global": (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)),
        }

    def identities(self) -> dict[str, Any]:
        """Ids of everything whose identity must survive, and where the model's tensors lie in memory."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        return {
            "tensors": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
            "groups": [(id(group), id(group["params"])) for group in groups],
            "members": [[id(parameter) for parameter in group["params"]] for group in groups],
            "rates": [id(group["lr"]) for group in groups if isinstance(group["lr"], Tensor)],
            "extras": {name: id(extra) for name, extra in self.extras.items()},
        }


def naive_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Clones of all parameters and buffers of ``module``, under each of their names."""
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def naive_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """A deep copy of the optimizer's own ``state_dict``."""
    return copy.deepcopy(optimizer.state_dict())


def naive_schedule(scheduler: Any) -> dict[str, Any]:
    """A deep copy of the plain attributes of a scheduler and of the schedulers inside it."""
    skipped = ("optimizer", "_schedulers", "lr_lambdas", "anneal_func")
    plain = {name: value for name, value in vars(scheduler).items() if name not in skipped and not callable(value)}
    inner = [naive_schedule(inside) for inside in getattr(scheduler, "_schedulers", ())]
    return {**copy.deepcopy(plain), "inner": inner}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """True if two nests are the same; else says where they first differ."""

    difference: str = ""

    def __bool__(self) -> bool:
        return not self.difference


def same(left: Any, right: Any, path: str = "") -> Comparison:
    """Compare two nests to the bit: types, keys, shapes, dtypes and values, NaN included."""
    if type(left) is not type(right):
        return Comparison(f"{path}: {type(left).__name__} is not {type(right).__name__}")
    if isinstance(left, Mapping):
        pairs = [(key, left[key], right.get(key)) for key in left]
        equal = set(left) == set(right)
    elif isinstance(left, list | tuple | collections.deque):
        pairs = [(index, *pair) for index, pair in enumerate(zip(left, right, strict=False))]
        equal = len(left) == len(right)
    else:
        pairs, equal = [], _same_leaf(left, right)
    found = (same(one, other, f"{path}.{key}") for key, one, other in pairs)
    nothing = Comparison("" if equal else f"{path}: {left} is not {right}"[:500])
    return next((comparison for comparison in found if not comparison), nothing)


def _same_leaf(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and _bytes(left) == _bytes(right)
    if isinstance(left, np.ndarray | np.generic):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return left.hex() == right.hex() if isinstance(left, float) else bool(left == right)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def build_run(optimizer: str = "adam", schedule: str = "none", *, seed: int = 0, reverse: bool = False) -> Run:
    """Build a fresh run; equal arguments give equal runs. Seeds the global generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Net(reverse)
    for parameter in dict(sorted(model.named_parameters())).values():
        nn.init.normal_(parameter, std=0.3)
    made = OPTIMIZERS[optimizer](model)
    optimizers = made if isinstance(made, dict) else {"": made}
    schedulers = {part: SCHEDULES[schedule](value) for part, value in optimizers.items() if schedule != "none"}
    extras: dict[str, Any] = {
        "data": torch.Generator().manual_seed(seed),
        "noise": np.random.Generator(np.random.PCG64(seed)),
        "ema": copy.deepcopy(model).requires_grad_(False),
        "hidden": torch.zeros(NUM_TOKENS),
        "tally": Tally(),
    }
    state = TrainingState(model, optimizers, scheduler=schedulers or None, extras=extras)
    return Run(model, optimizers, schedulers, extras, state)


class Malicious:
    """Unpickling it makes a directory: the least that code inside a checkpoint can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def saved(tmp_path: Path, optimizer: str = "adamw-groups") -> Run:
    """A checkpoint of some steps ago, and the run, trained on since."""
    run = build_run(optimizer, "sequential")
    run.steps(2)
    run.state.save(tmp_path / "c", user_data={"step": 3})
    run.steps(2)
    return run


def refused(run: Run, path: Path, message: str) -> str:
    """Check that loading ``path`` fails and changes nothing; return the error's text."""
    before, identities, snapshot = run.contents(), run.identities(), run.state.capture()
    with pytest.raises(CheckpointError, match=message) as caught:
        run.state.load(path)
    assert same(run.contents(), before)
    assert run.identities() == identities
    assert run.state.capture().checksum() == snapshot.checksum()
    return str(caught.value)


@dataclasses.dataclass(frozen=True)
class Kit:
    """What tests of this folder share."""

    build: Callable[..., Run] = build_run
    same: Callable[[Any, Any], Comparison] = same
    net: Callable[..., Net] = Net
    tensors: Callable[[nn.Module], dict[str, Tensor]] = naive_tensors
    optimizer: Callable[[Optimizer], dict[str, Any]] = naive_optimizer
    schedule: Callable[[Any], dict[str, Any]] = naive_schedule
    saved: Callable[..., Run] = saved
    refused: Callable[[Run, Path, str], str] = refused
    malicious: Callable[[Path], object] = Malicious


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Builders and comparisons."""
    return Kit()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test that asks for ``any_optimizer`` or ``any_schedule`` run for each of the table."""
    for fixture, table in (("any_optimizer", OPTIMIZERS), ("any_schedule", SCHEDULES)):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, list(table))
