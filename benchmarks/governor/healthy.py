"""Healthy runs of many kinds, recorded from their first step: every alarm in one is false."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cartpole import ppo_run
from tasks import (
    Batch,
    Run,
    adamw,
    classify,
    digits_run,
    digits_splits,
    evaluated,
    imbalanced_run,
    mlp,
    mnist1d_run,
    regression_run,
    rmsprop,
    sequence_run,
    sgd,
    warm_up_and_cosine,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, MultiStepLR

from morphogen.state import RandomStreams, draw_from


@dataclass(frozen=True)
class Healthy:
    """A kind of healthy run.

    Attributes:
        shift_step: Where the data changes so abruptly that an alarm is no mistake; 0 if it does not.
    """

    build: Callable[[int], Run]
    steps: int = 800
    tuned: bool = True
    shift_step: int = 0


class Dropout(nn.Module):
    """Dropout that draws from the run's own generator."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self._kept, self._generator = 1.0 - share, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self._generator) < self._kept) / self._kept


def dropout_run(seed: int) -> Run:
    """Digits with label smoothing and dropout."""
    chance = RandomStreams(seed).torch("dropout")
    run = digits_run(seed, middle=lambda width: [Dropout(0.3, chance)], smoothing=0.1)
    run.extras["dropout"] = chance
    return run


def restarts(optimizer: Any) -> Any:
    """Warm restarts every 100 steps."""
    return CosineAnnealingWarmRestarts(optimizer, 100)


def regress(
    seed: int,
    sample: Callable[[int, torch.Generator], Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    widths: tuple[int, ...],
    batch_size: int = 64,
) -> Run:
    """Return a regression on freshly drawn data."""
    data = RandomStreams(seed).torch("batches")
    with draw_from(RandomStreams(seed).torch("net")):
        model = mlp(widths)
    held_out = sample(500, RandomStreams(seed).torch("held out"))
    return Run(
        model, torch.optim.Adam(model.parameters(), 2e-3), lambda: sample(batch_size, data), loss,
        lambda: evaluated(model, held_out, loss), {"data": data}, outputs_of=lambda outputs: outputs,
    )  # fmt: skip


def heavy_tailed_run(seed: int) -> Run:
    """Squared error under noise of Student's t with 3 degrees of freedom."""

    def sample(size: int, generator: torch.Generator) -> Batch:
        inputs = torch.randn(size, 6, generator=generator)
        normal = torch.randn(size, 4, generator=generator)
        noise = normal[:, 0] / normal[:, 1:].square().mean(dim=1).sqrt()
        return inputs, torch.sin(inputs[:, 0] + inputs[:, 1]) + 0.5 * noise

    return regress(seed, sample, lambda o, t: (o[:, 0] - t).square().mean(), (6, 64, 64, 1))


def autoencoder_run(seed: int) -> Run:
    """Reconstruct digits, with losses of some hundredths."""
    inputs = digits_splits()[0][0] * 0.2

    def sample(size: int, generator: torch.Generator) -> Batch:
        chosen = inputs[torch.randint(len(inputs), (size,), generator=generator)]
        return chosen, chosen

    return regress(seed, sample, functional.mse_loss, (64, 48, 12, 48, 64))


def hinge_run(seed: int) -> Run:
    """A triplet margin loss, which is exactly zero in more and more batches."""
    centres = 2.0 * torch.randn(5, 10, generator=RandomStreams(seed).torch("world"))

    def sample(size: int, generator: torch.Generator) -> Batch:
        own = torch.randint(5, (size,), generator=generator)
        other = (own + 1 + torch.randint(4, (size,), generator=generator)) % 5
        points = centres[torch.cat([own, own, other])] + torch.randn(3 * size, 10, generator=generator)
        return points, own

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.triplet_margin_loss(*outputs.chunk(3), margin=1.0)

    return regress(seed, sample, loss, (10, 32, 8), batch_size=16)


def shifting_run(seed: int, what: str) -> Run:
    """Digits whose data changes at step 400 for good.

    "inputs": other mean and deviation. "frequencies": five classes go from 5 % to 50 %. "new_classes": from nothing to 50 %.
    """
    run = digits_run(seed, middle=lambda width: [nn.LayerNorm(width)])
    (inputs, targets), _ = digits_splits()
    data, num_drawn = run.extras["data"], torch.zeros((), dtype=torch.int64)
    run.extras["num_drawn"] = num_drawn
    rare = {"inputs": 0.5, "frequencies": 0.05, "new_classes": 0.0}[what]
    groups = [torch.nonzero(targets < 5).flatten(), torch.nonzero(targets >= 5).flatten()]

    def draw() -> Batch:
        moved = int(num_drawn.add_(1)) > 400
        second = torch.rand(64, generator=data) < (0.5 if moved else rare)
        places = torch.rand(64, generator=data)
        chosen = torch.where(second, *(group[(places * len(group)).long()] for group in reversed(groups)))
        return (inputs[chosen] * 1.5 + 0.5 if moved and what == "inputs" else inputs[chosen]), targets[chosen]

    run.draw = draw
    return run


def mixture_run(seed: int) -> Run:
    """Batches from three sources of different difficulty in turn, one of them rare."""
    run = imbalanced_run(seed, shares=(0.4, 0.3, 0.3))
    data, easy = run.extras["data"], run.draw

    def draw() -> Batch:
        source = int(torch.randint(20, (), generator=data))
        inputs, targets = easy()
        return (inputs * 0.3 if source == 0 else inputs * 0.6 if source < 7 else inputs), targets

    run.draw = draw
    return run


def tiny_rows_run(seed: int) -> Run:
    """Batches of two."""
    return digits_run(seed, middle=lambda width: [nn.LayerNorm(width)], batch_size=2, optimizer=adamw(5e-4))


def steps_down(optimizer: Any) -> Any:
    """Learning rate times 0.1 at steps 300 and 600."""
    return MultiStepLR(optimizer, [300, 600])


def noisy_labels_run(seed: int) -> Run:
    """Digits of which 30 % have a wrong label, for good."""
    (inputs, targets), held_out = digits_splits()
    world = RandomStreams(seed).torch("world")
    wrong = torch.rand(len(targets), generator=world) < 0.3
    targets = torch.where(wrong, torch.randint(10, (len(targets),), generator=world), targets)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(inputs), (32,), generator=generator)
        return inputs[chosen], targets[chosen]

    return classify(seed, functools.partial(mlp, (64, 64, 64, 10)), draw, held_out, adamw(1e-3))


KINDS: dict[str, Healthy] = {
    "digits": Healthy(digits_run),
    "imbalance": Healthy(imbalanced_run),
    "sequence": Healthy(sequence_run, 600),
    "sequence_adamw_warm_up": Healthy(
        functools.partial(sequence_run, optimizer=adamw(3e-3, 0.1), schedule=warm_up_and_cosine(100, 600)), 600
    ),
    "regression": Healthy(regression_run),
    "ppo": Healthy(ppo_run, 1500),
    "batch_of_2": Healthy(tiny_rows_run),
    "batch_of_8": Healthy(functools.partial(digits_run, batch_size=8, optimizer=adamw(1e-3))),
    "sequence_batch_of_4": Healthy(functools.partial(sequence_run, batch_size=4), 600),
    "heavy_tails": Healthy(heavy_tailed_run, 1000),
    "memorisation": Healthy(functools.partial(digits_run, num_rows=128, batch_size=16), 1000),
    "warm_restarts": Healthy(functools.partial(digits_run, schedule=restarts)),
    "warm_restarts_sgd": Healthy(functools.partial(digits_run, optimizer=sgd(0.1), schedule=restarts)),
    "steps_down": Healthy(functools.partial(digits_run, optimizer=sgd(0.05), schedule=steps_down)),
    "rmsprop": Healthy(functools.partial(digits_run, optimizer=rmsprop(1e-3))),
    "high_rate_sgd": Healthy(functools.partial(digits_run, middle=lambda width: [], optimizer=sgd(0.1))),
    "smoothing_and_dropout": Healthy(dropout_run),
    "noisy_labels": Healthy(noisy_labels_run),
    "autoencoder": Healthy(autoencoder_run),
    "hinge": Healthy(hinge_run),
    "mixture": Healthy(mixture_run),
    "shift_of_inputs": Healthy(functools.partial(shifting_run, what="inputs")),
    "shift_of_frequencies": Healthy(functools.partial(shifting_run, what="frequencies")),
    "new_classes": Healthy(functools.partial(shifting_run, what="new_classes"), shift_step=400),
    "mnist1d": Healthy(mnist1d_run, tuned=False),
}
