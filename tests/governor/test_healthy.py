"""Healthy runs of many kinds under a governor at its defaults: next to no alarm, and nothing ever rewound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from morphogen.governor import Governor
from morphogen.state import TrainingState, draw_from

NUM_STEPS = 300
SEEDS = (0, 1)
CENTRES = 1.5 * torch.randn(5, 10, generator=torch.Generator().manual_seed(7))
Batch = tuple[Tensor, Tensor]
Run = tuple[nn.Module, Optimizer, Callable[[], Batch], Callable[[Tensor, Tensor], Tensor], Any]


def net(chance: torch.Generator, *widths: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    with draw_from(chance):
        layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), between())]
        return nn.Sequential(*layers[:-1])


def normal(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=chance)


def clusters(chance: torch.Generator, size: int, noise: float = 1.0, shares: tuple[float, ...] = (0.2,) * 5) -> Batch:
    targets = torch.multinomial(torch.tensor(shares), size, True, generator=chance)
    return CENTRES[targets] + noise * normal(chance, size, 10), targets


def classification(chance: torch.Generator, size: int = 32, rate: float = 1e-3, **data: Any) -> Run:
    model = net(chance, 10, 32, 5)
    return model, Adam(model.parameters(), rate), lambda: clusters(chance, size, **data), functional.cross_entropy, None


def ordinary(chance: torch.Generator) -> Run:
    return classification(chance)


def two_samples_a_batch(chance: torch.Generator) -> Run:
    model, _, _, loss, _ = classification(chance)
    return model, SGD(model.parameters(), 0.01, momentum=0.9), lambda: clusters(chance, 2), loss, None


def one_sample_a_batch(chance: torch.Generator) -> Run:
    return classification(chance, size=1)


def imbalanced_classes(chance: torch.Generator) -> Run:
    return classification(chance, size=16, shares=(0.9, 0.025, 0.025, 0.025, 0.025))


def falls_to_nothing(chance: torch.Generator) -> Run:
    return classification(chance, rate=1e-2, noise=0.2)


def warm_up(chance: torch.Generator) -> Run:
    model, optimizer, batch, loss, _ = classification(chance, rate=1e-2)
    return model, optimizer, batch, loss, lr_scheduler.LinearLR(optimizer, 0.001, 1.0, 100)


def warm_restarts(chance: torch.Generator) -> Run:
    model, _, batch, loss, _ = classification(chance)
    optimizer = SGD(model.parameters(), 0.3, momentum=0.9)
    return model, optimizer, batch, loss, lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 60)


def memorisation(chance: torch.Generator) -> Run:
    inputs, targets = normal(chance, 64, 10), torch.randint(5, (64,), generator=chance)
    model = net(chance, 10, 128, 5)

    def batch() -> Batch:
        chosen = torch.randperm(64, generator=chance)[:8]
        return inputs[chosen], targets[chosen]

    return model, Adam(model.parameters(), 1e-2), batch, functional.cross_entropy, None


def heavy_tailed_noise(chance: torch.Generator) -> Run:
    model = net(chance, 4, 32, 1, between=nn.Tanh)

    def batch() -> Batch:
        inputs = normal(chance, 32, 4)
        student = normal(chance, 32, 1) / (normal(chance, 32, 3).square().mean(1, keepdim=True)).sqrt()
        return inputs, inputs[:, :1].sin() + student

    return model, Adam(model.parameters(), 3e-3), batch, functional.smooth_l1_loss, None


def likelihood_through_zero(chance: torch.Generator) -> Run:
    model = net(chance, 4, 32, 2, between=nn.Tanh)

    def batch() -> Batch:
        inputs = normal(chance, 32, 4)
        return inputs, inputs[:, 0].sin() + 0.05 * normal(chance, 32)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        mean, log_std = outputs[:, 0], outputs[:, 1].clamp(-5, 5)
        return (log_std + 0.5 * ((targets - mean) / log_std.exp()).square()).mean()

    return model, Adam(model.parameters(), 1e-2), batch, loss, None


def policy_gradient_around_zero(chance: torch.Generator) -> Run:
    model = net(chance, 6, 32, 3, between=nn.Tanh)

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        log_probabilities = outputs.log_softmax(1)
        chosen = torch.multinomial(log_probabilities.detach().exp(), 1, generator=chance)
        rewards = (chosen == 1).float() + 0.5 * normal(chance, len(outputs), 1)
        return -((rewards - rewards.mean()) * log_probabilities.gather(1, chosen)).mean()

    return model, Adam(model.parameters(), 3e-3), lambda: (normal(chance, 16, 6), torch.empty(0)), loss, None


def hinge_with_many_zeros(chance: torch.Generator) -> Run:
    model = net(chance, 10, 32, 5)
    batch = lambda: clusters(chance, 4, noise=0.8)  # noqa: E731
    return model, SGD(model.parameters(), 0.05, momentum=0.9), batch, functional.multi_margin_loss, None


def two_tasks_in_turn(chance: torch.Generator) -> Run:
    model = net(chance, 10, 32, 6)
    turn = iter(range(10**6))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if next(turn) % 4 == 0:
            return 20.0 * (outputs[:, 5] - targets).square().mean()
        return functional.cross_entropy(outputs[:, :5], targets)

    return model, Adam(model.parameters(), 3e-3), lambda: clusters(chance, 16), loss, None


def rare_rewards(chance: torch.Generator) -> Run:
    model = net(chance, 8, 32, 1, between=nn.Tanh)

    def batch() -> Batch:
        states = normal(chance, 32, 8)
        rewards = (torch.rand(32, 1, generator=chance) < 0.02).float()
        with torch.no_grad():
            return states, rewards + 0.95 * model(states + 0.3 * normal(chance, 32, 8)) * (1 - rewards)

    return model, Adam(model.parameters(), 1e-3), batch, functional.mse_loss, None


def convolutions_with_batch_norm(chance: torch.Generator) -> Run:
    with draw_from(chance):
        body = (nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        model = nn.Sequential(*body, nn.Linear(32, 4))
    patterns = normal(torch.Generator().manual_seed(3), 4, 1, 8, 8)

    def batch() -> Batch:
        targets = torch.randint(4, (8,), generator=chance)
        return patterns[targets] + normal(chance, 8, 1, 8, 8), targets

    return model, SGD(model.parameters(), 0.05, momentum=0.9), batch, functional.cross_entropy, None


def small_transformer(chance: torch.Generator) -> Run:
    with draw_from(chance):
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.Embedding(16, 32), layer, nn.Linear(32, 16))
    follow = torch.softmax(3 * normal(torch.Generator().manual_seed(5), 16, 16), 1)

    def batch() -> Batch:
        tokens = torch.randint(16, (8, 8), generator=chance)
        return tokens, torch.multinomial(follow[tokens.flatten()], 1, generator=chance)[:, 0]

    loss = lambda outputs, targets: functional.cross_entropy(outputs.flatten(0, 1), targets)  # noqa: E731
    return model, AdamW(model.parameters(), 3e-3), batch, loss, None


KINDS: tuple[Callable[[torch.Generator], Run], ...] = (
    *(ordinary, two_samples_a_batch, one_sample_a_batch, imbalanced_classes, falls_to_nothing, warm_up, warm_restarts),
    *(memorisation, heavy_tailed_noise, likelihood_through_zero, policy_gradient_around_zero, hinge_with_many_zeros),
    *(two_tasks_in_turn, rare_rewards, convolutions_with_batch_norm, small_transformer),
)


def governed(kind: Callable[[torch.Generator], Run], seed: int) -> Governor:
    """Train one run to its end and return its governor."""
    model, optimizer, batch, loss_of, schedule = kind(torch.Generator().manual_seed(seed))
    governor = Governor(TrainingState(model, optimizer, schedule))
    for _ in range(NUM_STEPS):
        inputs, targets = batch()
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        if governor.observe(loss).proceed:
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return governor


@pytest.fixture(scope="module")
def governors() -> Iterator[dict[str, Governor]]:
    yield {f"{kind.__name__} {seed}": governed(kind, seed) for kind in KINDS for seed in SEEDS}


def test_no_healthy_run_is_rewound(governors: dict[str, Governor]) -> None:
    assert {name: governor.rollbacks for name, governor in governors.items() if governor.rollbacks} == {}


def test_alarms_are_as_rare_as_documented(governors: dict[str, Governor]) -> None:
    """0.15 in 1,000 steps: one or two are expected in these 9,600."""
    alarms = {name: governor.skipped_steps for name, governor in governors.items() if governor.skipped_steps}
    assert sum(alarms.values()) <= 3, alarms


def test_every_healthy_run_ends_healthy_and_with_two_good_generations(governors: dict[str, Governor]) -> None:
    for name, governor in governors.items():
        assert governor.status == "healthy", name
        assert len(governor._keeper.ring.good) == 2 and governor._keeper.ring.good[0].step > 100, name
