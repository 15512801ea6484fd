"""The small training runs of the detection benchmark: model, optimizer, schedule, batches, loss, and an evaluation.

Everything a run draws comes from generators that belong to its ``TrainingState``, so that a restored run repeats itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from morphogen.state import RandomStreams, TrainingState, draw_from
from morphogen.tasks import digits, mnist1d

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One training run.

    Attributes:
        draw: Returns the next batch, (inputs, targets).
        loss: (outputs, targets) -> a scalar.
        outputs_of: What the loop shows a governor as ``logits``; None for nothing.
        labelled: Whether targets are class numbers, shown as ``labels``.
        evaluate: Returns the loss on fixed held-out data in eval mode; lower is better.
        accuracy: Returns the share of the same data that is classified rightly; None where there are no classes.
        extras: Further parts of the state; what is added before the first look at ``state`` belongs to it.
        clip_norm: Gradients are clipped to it.
    """

    model: nn.Module
    optimizer: Optimizer
    draw: Callable[[], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[], float]
    extras: dict[str, object]
    scheduler: Any = None
    outputs_of: Callable[[Tensor], Tensor] | None = None
    labelled: bool = False
    clip_norm: float | None = None
    accuracy: Callable[[], float] | None = None

    @functools.cached_property
    def state(self) -> TrainingState:
        return TrainingState(self.model, self.optimizer, self.scheduler, extras=self.extras)

    def shown(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor | None]:
        """Return what the loop shows a governor beside loss and gradient norm."""
        logits = self.outputs_of(outputs.detach()) if self.outputs_of else None
        return {"logits": logits, "labels": targets if self.labelled else None}


@dataclass(frozen=True)
class Task:
    """A kind of run.

    Attributes:
        build: Seed -> run. Tasks that are drawn take ``world=``, the seed of the task itself; by default the same.
        has_world: Whether the task is drawn.
        settle_steps: Steps until it has settled; faults come then.
        excess: (eval loss, healthy twin's eval loss) -> by what share it is worse.
        tuned: Whether thresholds may look at it.
    """

    build: Callable[..., Run]
    settle_steps: int = 300
    excess: Callable[[float, float], float] = lambda loss, twin: (loss - twin) / abs(twin)
    tuned: bool = True
    has_world: bool = False


def likelihood_excess(loss: float, twin: float) -> float:
    """For a negative log-likelihood, which may cross zero: the share by which the typical error e^loss is larger."""
    return math.expm1(min(loss - twin, 50.0))


def classify(
    seed: int,
    net: Callable[[], nn.Module],
    draw: Callable[[torch.Generator], Batch],
    held_out: Batch,
    make_optimizer: Callable[[Any], Optimizer],
    *,
    schedule: Callable[[Optimizer], Any] | None = None,
    smoothing: float = 0.0,
    clip_norm: float | None = None,
) -> Run:
    """Return a run with cross-entropy over the last dimension of the outputs."""
    with draw_from(RandomStreams(seed).torch("net")):
        model = net()
    data = RandomStreams(seed).torch("batches")
    optimizer = make_optimizer(model.parameters())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=smoothing)

    return Run(
        model, optimizer, lambda: draw(data), loss,
        lambda: evaluated(model, held_out, lambda o, t: functional.cross_entropy(o.flatten(0, -2), t.flatten())),
        {"data": data},
        scheduler=schedule(optimizer) if schedule else None,
        outputs_of=lambda outputs: outputs, labelled=True, clip_norm=clip_norm,
        accuracy=lambda: evaluated(model, held_out, lambda o, t: (o.argmax(dim=-1) == t).float().mean()),
    )  # fmt: skip


def evaluated(model: nn.Module, held_out: Batch, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Return ``loss`` on ``held_out`` in eval mode."""
    model.eval()
    with torch.no_grad():
        value = float(loss(model(held_out[0]), held_out[1]))
    model.train()
    return value


def rows(inputs: Tensor, targets: Tensor, size: int) -> Callable[[torch.Generator], Batch]:
    """Return a function that draws ``size`` rows."""

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        return inputs[chosen], targets[chosen]

    return draw


def mlp(widths: tuple[int, ...], middle: Callable[[int], list[nn.Module]] = lambda width: []) -> nn.Sequential:
    """Return linear layers with ReLU between, and what ``middle`` makes before each ReLU."""
    layers: list[nn.Module] = []
    for before, width in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(before, width), *middle(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def norm(width: int) -> list[nn.Module]:
    return [nn.BatchNorm1d(width)]


def adamw(rate: float, weight_decay: float = 1e-2) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=weight_decay)


def sgd(rate: float) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9)


def rmsprop(rate: float) -> Callable[[Any], Optimizer]:
    return lambda parameters: torch.optim.RMSprop(parameters, rate)


# -- digits ----------------------------------------------------------------------------------------------------------


@functools.cache
def digits_splits() -> tuple[Batch, Batch]:
    """Return train and held-out images as rows of 64 values."""
    data = digits.load()
    return tuple((split.inputs.flatten(1), split.targets) for split in (data.train, data.decision))


def digits_run(
    seed: int,
    *,
    middle: Callable[[int], list[nn.Module]] = norm,
    batch_size: int = 64,
    optimizer: Callable[[Any], Optimizer] | None = None,
    schedule: Callable[[Optimizer], Any] | None = None,
    smoothing: float = 0.0,
    num_rows: int | None = None,
) -> Run:
    """Return a classifier of handwritten digits."""
    (inputs, targets), held_out = digits_splits()
    draw = rows(inputs[:num_rows], targets[:num_rows], batch_size)
    net = functools.partial(mlp, (64, 64, 64, 10), middle)
    return classify(seed, net, draw, held_out, optimizer or adamw(2e-3), schedule=schedule, smoothing=smoothing)


# -- imbalance -------------------------------------------------------------------------------------------------------


def imbalanced_run(
    seed: int, *, batch_size: int = 64, shares: tuple[float, ...] = (0.9, 0.05, 0.05), world: int | None = None
) -> Run:
    """Return a classifier of overlapping clusters of very different size."""
    nature = RandomStreams(seed if world is None else world).torch("world")
    centres = 0.6 * torch.randn(len(shares), 20, generator=nature)
    weights = torch.tensor(shares)

    def sample(size: int, generator: torch.Generator) -> Batch:
        targets = torch.multinomial(weights, size, replacement=True, generator=generator)
        return centres[targets] + torch.randn(size, 20, generator=generator), targets

    net = functools.partial(mlp, (20, 64, 64, len(shares)))
    return classify(seed, net, functools.partial(sample, batch_size), sample(1000, nature), sgd(0.03))


# -- sequences -------------------------------------------------------------------------------------------------------

SYMBOLS, LENGTH = 8, 24


class Transformer(nn.Module):
    """Two causal blocks of width 32 over ``SYMBOLS`` tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention of two heads, and a small perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fall(functional.gelu(self.rise(self.norm_2(x))))


def warm_up_and_cosine(warm_up_steps: int, total_steps: int) -> Callable[[Optimizer], Any]:
    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm_up_steps)
        return rise * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)))

    return lambda optimizer: LambdaLR(optimizer, factor)


def chains(world: int, count: int) -> Tensor:
    """Return sequences, (count, LENGTH + 1), of a chain in which the last two symbols decide the odds of the next."""
    nature, generator = RandomStreams(world).torch("world"), RandomStreams(world).torch("sequences")
    odds = torch.softmax(2.0 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=nature), dim=-1)
    made = [torch.randint(SYMBOLS, (count,), generator=generator) for _ in range(2)]
    while len(made) < LENGTH + 1:
        made.append(torch.multinomial(odds[made[-2], made[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(made, dim=1)


def sequence_run(
    seed: int,
    *,
    optimizer: Callable[[Any], Optimizer] | None = None,
    schedule: Callable[[Optimizer], Any] | None = None,
    batch_size: int = 16,
    world: int | None = None,
) -> Run:
    """Return a small transformer that learns a second-order chain, warmed up and clipped."""
    made = chains(seed if world is None else world, 2200)
    inputs, targets = made[:, :-1].contiguous(), made[:, 1:].contiguous()
    return classify(
        seed, Transformer, rows(inputs[:2000], targets[:2000], batch_size), (inputs[2000:], targets[2000:]),
        optimizer or (lambda parameters: torch.optim.Adam(parameters, 5e-3)),
        schedule=schedule or warm_up_and_cosine(20, 2000), clip_norm=1.0,
    )  # fmt: skip


# -- regression ------------------------------------------------------------------------------------------------------


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the Gaussian negative log-likelihood without its constant: it is 0 for an exact deviation of 0.6."""
    log_variance = outputs[:, 1].clamp(-10.0, 10.0)
    return 0.5 * (log_variance + (targets - outputs[:, 0]).square() * torch.exp(-log_variance)).mean()


def regression_run(
    seed: int, *, loss: Callable[[Tensor, Tensor], Tensor] = nll, noise: float = 0.6, world: int | None = None
) -> Run:
    """Return a regression of mean and variance, whose loss crosses zero; ``noise`` is the targets' mean deviation."""
    nature, data = RandomStreams(seed if world is None else world).torch("world"), RandomStreams(seed).torch("batches")
    slopes = 0.5 * torch.randn(6, 3, generator=nature)

    def sample(size: int, generator: torch.Generator) -> Batch:
        inputs = torch.randn(size, 6, generator=generator)
        deviation = noise * torch.exp(0.5 * torch.tanh(inputs[:, 0]))
        targets = torch.sin(inputs @ slopes).sum(dim=1) + deviation * torch.randn(size, generator=generator)
        return inputs, targets

    with draw_from(RandomStreams(seed).torch("net")):
        model = mlp((6, 96, 96, 2))
    held_out = sample(1000, nature)
    return Run(
        model, torch.optim.Adam(model.parameters(), 3e-3), lambda: sample(64, data), loss,
        lambda: evaluated(model, held_out, loss), {"data": data}, outputs_of=lambda outputs: outputs[:, :1],
    )  # fmt: skip


# -- mnist1d: never tuned on -----------------------------------------------------------------------------------------


def mnist1d_run(seed: int) -> Run:
    """Return a convolutional classifier of 40-sample signals with BatchNorm."""
    data = mnist1d.load()
    draw = rows(data.train.inputs, data.train.targets, 32)

    def net() -> nn.Module:
        layers: list[nn.Module] = []
        for before, width in ((1, 8), (8, 16), (16, 16)):
            layers += [nn.Conv1d(before, width, 5, stride=2, padding=2), nn.BatchNorm1d(width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 10))

    held_out = (data.decision.inputs, data.decision.targets)
    return classify(seed, net, draw, held_out, adamw(5e-3), schedule=lambda optimizer: CosineAnnealingLR(optimizer, 2000))
