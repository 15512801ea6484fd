"""A minimal PPO on CartPole: each minibatch update is one training step.

The equations and limits are those of Gymnasium's CartPole-v1, for many poles at once.
"""

from __future__ import annotations

from typing import Any

import torch
from tasks import Batch, Run, mlp
from torch import Tensor, nn

from morphogen.state import RandomStreams, draw_from

NUM_POLES, ROLLOUT_STEPS, EPOCHS, BATCH, MAX_STEPS = 16, 64, 4, 128, 500
DISCOUNT, TRACE, CLIP, REWARD = 0.98, 0.95, 0.2, 0.1


class Poles:
    """Carts with a pole; an episode ends when one falls, leaves the track or stood for 500 steps."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.state = self._fresh(count)
        self.age = torch.zeros(count)

    def _fresh(self, count: int) -> Tensor:
        return 0.1 * torch.rand(count, 4, generator=self.generator, dtype=torch.float64) - 0.05

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move by actions in {0, 1}; returns the states before any restart, who fell, and who was stopped."""
        x, speed, angle, spin = self.state.unbind(dim=1)
        force = 20.0 * actions.double() - 10.0
        sine, cosine = angle.sin(), angle.cos()
        push = (force + 0.05 * spin.square() * sine) / 1.1
        spin_up = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine.square() / 1.1))
        speed_up = push - 0.05 * spin_up * cosine / 1.1
        moved = (x + 0.02 * speed, speed + 0.02 * speed_up, angle + 0.02 * spin, spin + 0.02 * spin_up)
        after = torch.stack(moved, dim=1)
        fell = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.20943951023931953)
        self.age += 1
        stopped = (self.age >= MAX_STEPS) & ~fell
        over = fell | stopped
        fresh = self._fresh(len(after))
        self.state = torch.where(over.unsqueeze(1), fresh, after)
        self.age = torch.where(over, 0.0, self.age)
        return after, fell, stopped


class Rollouts:
    """Experience in minibatches: inputs are states, targets have columns action, log-probability, advantage, return."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self._model, self._generator = model, generator
        self._poles = Poles(NUM_POLES, generator)
        self._inputs, self._targets = torch.zeros(0, 4), torch.zeros(0, 4)
        self._orders: list[Tensor] = []

    def draw(self) -> Batch:
        """Return the next minibatch, after a new rollout when all were used."""
        if not self._orders:
            self._collect()
            for _ in range(EPOCHS):
                order = torch.randperm(len(self._inputs), generator=self._generator)
                self._orders += list(order.split(BATCH))
        chosen = self._orders.pop()
        return self._inputs[chosen], self._targets[chosen]

    @torch.no_grad()
    def _collect(self) -> None:
        states, choices, log_odds, rewards, values, going, nexts = ([] for _ in range(7))
        for _ in range(ROLLOUT_STEPS):
            inputs = self._poles.state.float()
            outputs = self._model(inputs)
            odds = outputs[:, :2].log_softmax(dim=1)
            actions = (torch.rand(NUM_POLES, generator=self._generator) > odds[:, 0].exp()).long()
            after, fell, stopped = self._poles.step(actions)
            states.append(inputs)
            choices.append(actions.float())
            log_odds.append(odds.gather(1, actions.unsqueeze(1)).squeeze(1))
            rewards.append(torch.full((NUM_POLES,), REWARD))
            values.append(outputs[:, 2])
            nexts.append(torch.where(fell, 0.0, self._model(after.float())[:, 2]))
            going.append((~(fell | stopped)).float())
        advantage, advantages = torch.zeros(NUM_POLES), list[Tensor]()
        for reward, value, following, goes_on in zip(*map(reversed, (rewards, values, nexts, going)), strict=True):
            advantage = reward + DISCOUNT * following - value + DISCOUNT * TRACE * goes_on * advantage
            advantages.insert(0, advantage)
        returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
        columns = [torch.cat(column) for column in (choices, log_odds, advantages, returns)]
        self._inputs, self._targets = torch.cat(states), torch.stack(columns, dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "poles": self._poles.state.clone(), "age": self._poles.age.clone(), "inputs": self._inputs,
            "targets": self._targets, "orders": list(self._orders),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._poles.state, self._poles.age = state["poles"].clone(), state["age"].clone()
        self._inputs, self._targets, self._orders = state["inputs"], state["targets"], list(state["orders"])


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return PPO's clipped loss, with value loss and entropy bonus."""
    actions, before, advantages, returns = targets.unbind(dim=1)
    odds = outputs[:, :2].log_softmax(dim=1)
    ratio = (odds.gather(1, actions.long().unsqueeze(1)).squeeze(1) - before).exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    entropy = -(odds.exp() * odds).sum(dim=1).mean()
    return -gain + 0.5 * (outputs[:, 2] - returns).square().mean() - 0.01 * entropy


@torch.no_grad()
def mean_return(model: nn.Module, seed: int, count: int = 32) -> float:
    """Return the mean length of ``count`` episodes with drawn actions, always the same chance."""
    generator = RandomStreams(seed).torch("evaluation")
    poles, alive, total = Poles(count, generator), torch.ones(count, dtype=torch.bool), torch.zeros(count)
    while bool(alive.any()):
        odds = model(poles.state.float())[:, :2].softmax(dim=1)
        _, fell, stopped = poles.step((torch.rand(count, generator=generator) > odds[:, 0]).long())
        total += alive
        alive &= ~(fell | stopped)
    return float(total.mean())


def ppo_run(seed: int) -> Run:
    """Return PPO; its evaluation is minus the mean return."""
    with draw_from(RandomStreams(seed).torch("net")):
        model = PolicyAndValue()
    data = RandomStreams(seed).torch("batches")
    rollouts = Rollouts(model, data)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-5)
    return Run(
        model, optimizer, rollouts.draw, loss, lambda: -mean_return(model, seed),
        {"data": data, "rollouts": rollouts}, outputs_of=lambda outputs: outputs[:, :2], clip_norm=0.5,
    )  # fmt: skip


class PolicyAndValue(nn.Module):
    """Two perceptrons; the policy's comes last. Outputs are two logits and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.policy = mlp((4, 64, 64, 1)), mlp((4, 64, 64, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.policy(inputs), self.value(inputs)], dim=1)
