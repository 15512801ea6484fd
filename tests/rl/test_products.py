"""Every torso x memory x action distribution x critic trains, and its ratio is 1 before the first step."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphogen.rl import CriticConfig, PolicyConfig
from morphogen.rl.experience import digest
from morphogen.rl.minibatches import batches_of

CRITICS = {"scalar": {}, "quantile": {"num_quantiles": 5}, "categorical": {"bins": 7}}
PRODUCTS = list(
    itertools.product(
        ("mlp", "cnn"),
        ("none", "lstm", "gru"),
        ("categorical", "factored", "gaussian", "squashed"),
        CRITICS,
        (False, True),
    )
)


def build(kit: SimpleNamespace, torso: str, memory: Any, action: str, critic: CriticConfig, **settings: Any) -> Any:
    policy = PolicyConfig(hidden=(8,), channels=(2,), memory=memory, memory_width=6)
    masks = action in ("categorical", "factored")
    return kit.agent(action, torso, policy=policy, critic=critic, masks=masks, **settings)


@pytest.mark.parametrize(("torso", "memory", "action", "critic", "twin"), PRODUCTS)
def test_a_product_starts_at_ratio_one_and_trains(
    *, kit: SimpleNamespace, torso: str, memory: str, action: str, critic: Any, twin: bool
) -> None:
    events: list[Any] = []
    agent = build(kit, torso, memory, action, CriticConfig(kind=critic, twin=twin, **CRITICS[critic]), emit=events.append)
    parts = agent._parts
    rollout = agent._collector.collect(16, agent.config.gamma)
    rows = digest(rollout, parts.critic, None, config=agent.config, generator=torch.Generator()).rows
    for batch in batches_of(rollout, rows, None).epoch(10, torch.Generator()):
        with torch.no_grad():
            evaluation = agent.policy.distribution.evaluate(
                agent._updater.evaluate(batch).actor, batch.rows.action_B, batch.rows.mask_BM
            )
        ratio = (evaluation.log_prob_BH - batch.rows.log_prob_BH).sum(1).exp()
        assert (ratio - 1).abs().max() < (1e-6 if memory == "none" else 1e-5)
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    agent.learn(2 * 8 * 3)
    assert [event.skipped_minibatches for event in events] == [0, 0]
    assert all(math.isfinite(event.policy_loss + event.value_loss + event.entropy + event.kl) for event in events)
    moved = [not torch.equal(old, new) for old, new in zip(before, agent.policy.parameters(), strict=True)]
    assert all(moved), [name for (name, _), m in zip(agent.policy.named_parameters(), moved, strict=True) if not m]
    agent.state.verify()


@pytest.mark.parametrize("memory", ["none", "lstm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"normalize_observations": True, "normalize_rewards": True, "normalize_values": True},
        {"value_clip_range": 0.2, "target_kl": 0.01, "ratio": "per_head", "entropy_coef": 0.01},
        {"kl_penalty": {"kind": "adaptive", "coefficient": 1.0, "target": 0.01}},
        {"gradient_variance": {}, "max_grad_norm": None},
        {"adversarial": {}, "normalize_advantages": False},
        {"precision": "bf16"},
    ],
    ids=["normalisers", "clipping", "kl_penalty", "gradient_variance", "adversarial", "bf16"],
)
def test_an_option_trains_with_and_without_memory(kit: SimpleNamespace, settings: dict[str, Any], memory: str) -> None:
    events: list[Any] = []
    agent = build(
        kit, "mlp", memory, "factored", CriticConfig(kind="quantile", num_quantiles=5), emit=events.append, **settings
    )
    agent.learn(2 * 8 * 3)
    assert len(events) == 2
    assert [event.skipped_minibatches for event in events] == [0, 0]
    agent.state.verify()
