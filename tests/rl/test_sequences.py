"""The sequence path of the update against walking through the rollout step by step; and padding that reaches nothing."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from morphogen.rl import CriticConfig, PolicyConfig
from morphogen.rl.experience import digest
from morphogen.rl.minibatches import Minibatch, batches_of
from morphogen.rl.policy import NetworkOutputs
from morphogen.rl.update import Hyperparameters


def recurrent(kit: SimpleNamespace, memory: Any, **settings: Any) -> Any:
    policy = PolicyConfig(hidden=(8,), memory=memory, memory_width=6, head_hidden=(5,))
    return kit.agent("factored", policy=policy, critic=CriticConfig(kind="quantile", num_quantiles=5), masks=True, **settings)


def gradients(agent: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(agent.policy.parameters())))


def stepwise(agent: Any, rollout: Any) -> NetworkOutputs:
    """Walk through the rollout in its own order, clearing the memory at each start; rows as [step, env]."""
    state, outputs = rollout.state_TSCNW[0], []
    for step in range(len(rollout.start_TN)):
        state = state.masked_fill(torch.from_numpy(rollout.start_TN[step])[:, None], 0.0)
        out, state = agent.policy(rollout.observation_TND[step][None], state)
        outputs.append(out)
    return NetworkOutputs(torch.cat([out.actor[0] for out in outputs]), torch.cat([out.critic[:, 0] for out in outputs], 1))


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_sequences_are_the_steps_forward_and_backward(kit: SimpleNamespace, memory: Any) -> None:
    agent = recurrent(kit, memory)
    agent._collector.collect(7, 0.99)  # so that episodes and memories reach into the rollout
    rollout = agent._collector.collect(24, 0.99)
    assert rollout.start_TN[1:].sum() > 5
    rows = digest(rollout, agent._parts.critic, None, config=agent.config, generator=torch.Generator()).rows
    batch = batches_of(rollout, rows, None).whole()
    weight_A, weight_QK = torch.randn(rollout.actor_TNA.shape[-1]), torch.randn(5)
    naive, order = stepwise(agent, rollout), (batch.rows.advantage_B[:, None] == rows.advantage_B).int().argmax(1)
    found = agent._updater._outputs(batch, batch.observation)
    torch.testing.assert_close(found.actor, naive.actor[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.critic, naive.critic[:, order], atol=1e-5, rtol=1e-5)
    losses = [((out.actor @ weight_A).square().mean() + (out.critic @ weight_QK).square().mean()) for out in (found, naive)]
    for mine, theirs in zip(*(gradients(agent, loss) for loss in losses), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("memory", ["lstm", "gru"])
@pytest.mark.parametrize(
    "settings", [{}, {"adversarial": {}}, {"kl_penalty": {"kind": "fixed"}}], ids=["plain", "adversarial", "kl"]
)
def test_padding_changes_no_bit_of_loss_or_gradient(kit: SimpleNamespace, memory: Any, settings: dict[str, Any]) -> None:
    agent = recurrent(kit, memory, entropy_coef=0.01, target_kl=1.0, **settings)
    rollout = agent._collector.collect(24, 0.99)
    rows = digest(rollout, agent._parts.critic, None, config=agent.config, generator=torch.Generator()).rows
    batch = batches_of(rollout, rows, None).whole()
    assert batch.places_B is not None
    padded = torch.ones(batch.observation.shape[:2], dtype=torch.bool).flatten()
    padded[batch.places_B] = False
    assert padded.any()
    poisoned = batch.observation.clone()
    poisoned.flatten(0, 1)[padded] = 1e6
    ends = [everything(agent, given) for given in (batch, dataclasses.replace(batch, observation=poisoned))]
    for clean, dirty in zip(*ends, strict=True):
        assert torch.equal(clean, dirty)


def everything(agent: Any, batch: Minibatch) -> list[Tensor]:
    """Loss, all that is watched, and all gradients of one minibatch, with the same chance each time."""
    agent._updater._generator.manual_seed(0)
    loss, watched = agent._updater._loss(batch, Hyperparameters.at(agent.config, 0.0))
    return [loss.detach(), *watched, *gradients(agent, loss)]
