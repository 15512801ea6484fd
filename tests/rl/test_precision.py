"""Narrow precision and compilation: the same agent, and really narrow, really compiled."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphogen.rl import PPO, PolicyConfig, PPOConfig
from morphogen.rl.experience import digest
from morphogen.rl.minibatches import batches_of
from morphogen.rl.precision import autocast_dtype
from morphogen.rl.update import Hyperparameters


def one_gradient(agent: Any) -> tuple[torch.Tensor, float]:
    """The gradient of the first minibatch, and the largest log-ratio in it."""
    rollout = agent._collector.collect(32, 0.99)
    rows = digest(rollout, agent._parts.critic, None, config=agent.config, generator=torch.Generator()).rows
    batch = batches_of(rollout, rows, None).whole()
    loss, _ = agent._updater._loss(batch, Hyperparameters.at(agent.config, 0.0))
    gradients = torch.autograd.grad(loss, list(agent.policy.parameters()))
    outputs = agent._updater._outputs(batch, batch.observation)
    assert outputs.actor.dtype is outputs.critic.dtype is torch.float32
    evaluation = agent.policy.distribution.evaluate(outputs.actor, batch.rows.action_B, batch.rows.mask_BM)
    log_ratio = (evaluation.log_prob_BH - batch.rows.log_prob_BH).sum(1)
    return torch.cat([gradient.flatten() for gradient in gradients]), float(log_ratio.detach().abs().max())


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize("action", ["categorical", "factored", "gaussian", "squashed"])
def test_bf16_points_the_same_way(kit: SimpleNamespace, action: str, memory: Any) -> None:
    policy = PolicyConfig(hidden=(64, 64), memory=memory, memory_width=32, action_gain=1.0)
    (wide, same), (narrow, near) = (
        one_gradient(kit.agent(action, policy=policy, entropy_coef=0.01, precision=precision)) for precision in ("fp32", "bf16")
    )
    assert same < 1e-5 < near < 0.05  # narrow it is, and not by too much
    assert float(torch.cosine_similarity(wide, narrow, dim=0)) > 0.99


@pytest.mark.parametrize(
    ("precision", "width", "device", "expected"),
    [
        ("auto", 64, "cpu", None),
        ("auto", 1024, "cpu", None),
        ("auto", 64, "cuda", None),
        ("auto", 256, "cuda", torch.bfloat16),
        ("fp32", 1024, "cuda", None),
        ("bf16", 8, "cpu", torch.bfloat16),
        ("fp16", 8, "cuda", torch.float16),
    ],
)
def test_what_is_narrow_when(precision: Any, width: int, device: str, expected: torch.dtype | None) -> None:
    assert autocast_dtype(PPOConfig(precision=precision, device=device), width, torch.device(device)) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cuda_agent_trains_and_an_overflow_skips_the_step(precision: Any) -> None:
    events: list[Any] = []
    policy = PolicyConfig(hidden=(256, 256))
    config = PPOConfig(num_envs=4, rollout_steps=32, epochs=2, device="cuda", precision=precision, policy=policy)
    agent = PPO("CartPole-v1", config, emit=events.append).learn(256)
    assert all(math.isfinite(event.policy_loss) for event in events)
    agent.state.verify()
    if precision == "fp16":
        before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
        agent.state.scalers[""].update(2.0**60)
        agent.reconfigure(epochs=1, minibatch_size=1000)
        agent.learn(1)
        assert events[-1].skipped_minibatches == 1
        assert all(torch.equal(old, new) for old, new in zip(before, agent.policy.parameters(), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device_within_an_epoch() -> None:
    agent = PPO("CartPole-v1", PPOConfig(num_envs=4, rollout_steps=32, device="cuda", epochs=1)).learn(128)
    rollout = agent._collector.collect(32, 0.99)
    rows = digest(rollout, agent._parts.critic, None, config=agent.config, generator=torch.Generator()).rows
    batches = list(batches_of(rollout, rows, None).epoch(64, torch.Generator()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            agent._updater._step(batch, Hyperparameters.at(agent.config, 0.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
@pytest.mark.parametrize("memory", ["none", "lstm"])
def test_a_compiled_agent_runs_compiled_code_and_learns_the_same(kit: SimpleNamespace, memory: Any) -> None:
    policy = PolicyConfig(hidden=(8,), memory=memory, memory_width=6)
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, compiled = (
        kit.agent(policy=policy, compile=compile_it, longest=2, minibatch_size=1000).learn(2 * 24)
        for compile_it in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    for mine, theirs in zip(eager.policy.parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
