"""The update: what a minibatch may not do, and when it stops."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from morphogen.errors import UpdateDiverged
from morphogen.rl import losses
from morphogen.rl.actions import Evaluation
from morphogen.rl.advantages import normalize_advantages
from morphogen.rl.experience import digest
from morphogen.rl.minibatches import RowBatches, Rows, batches_of
from morphogen.rl.update import Hyperparameters


def everything_in(agent: Any) -> list[torch.Tensor]:
    """Copies of weights and moments."""
    moments = [value for state in agent._parts.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*agent.policy.parameters(), *moments)]


def experience(agent: Any, steps: int = 16) -> tuple[Any, Rows]:
    rollout = agent._collector.collect(steps, 0.99)
    return rollout, digest(rollout, agent._parts.critic, None, config=agent.config, generator=torch.Generator()).rows


class Scripted:
    """Batches whose advantages are poisoned in some minibatches."""

    def __init__(self, batches: RowBatches, poisoned: list[bool]) -> None:
        self._batches, self._poisoned = batches, poisoned

    def epoch(self, minibatch_size: int, generator: torch.Generator) -> Any:
        whole = self._batches.whole()
        nan = dataclasses.replace(whole.rows, target_BZ=whole.rows.target_BZ * float("nan"))
        return (dataclasses.replace(whole, rows=nan) if poisoned else whole for poisoned in self._poisoned)


@pytest.mark.parametrize("settings", [{}, {"gradient_variance": {}}], ids=["plain", "gradient_variance"])
def test_a_minibatch_that_is_not_finite_changes_nothing_at_all(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    agent = kit.agent(epochs=1, **settings)
    agent.learn(24)
    rollout, rows = experience(agent)
    before, statistics = (
        everything_in(agent),
        str({name: part.state_dict() for name, part in agent._parts.travelling().items()}),
    )
    batches = Scripted(batches_of(rollout, rows, None), [True, True])
    result = agent._updater.update(batches, Hyperparameters.at(agent.config, 0.0))
    assert (result.skipped_minibatches, result.minibatches) == (2, 2)
    for old, new in zip(before, everything_in(agent), strict=True):
        assert torch.equal(old, new)
    assert str({name: part.state_dict() for name, part in agent._parts.travelling().items()}) == statistics
    assert math.isnan(result.policy_loss)


def test_skipped_minibatches_leave_the_others_as_they_would_be(kit: SimpleNamespace) -> None:
    ends = []
    for poisoned in ([False, False], [False, True, True, False]):
        agent = kit.agent(epochs=1)
        rollout, rows = experience(agent)
        agent._updater.update(Scripted(batches_of(rollout, rows, None), poisoned), Hyperparameters.at(agent.config, 0.0))
        ends.append(everything_in(agent))
    assert all(torch.equal(old, new) for old, new in zip(*ends, strict=True))


def test_three_in_a_row_raise_also_across_updates(kit: SimpleNamespace) -> None:
    agent = kit.agent(epochs=1)
    rollout, rows = experience(agent)
    now, batches = Hyperparameters.at(agent.config, 0.0), batches_of(rollout, rows, None)
    agent._updater.update(Scripted(batches, [True, True, False]), now)
    agent._updater.update(Scripted(batches, [True, True]), now)
    before = everything_in(agent)
    with pytest.raises(UpdateDiverged, match="3 minibatches in a row"):
        agent._updater.update(Scripted(batches, [True]), now)
    assert all(torch.equal(old, new) for old, new in zip(before, everything_in(agent), strict=True))


def test_a_large_step_stops_the_epochs(kit: SimpleNamespace) -> None:
    events: list[Any] = []
    agent = kit.agent(epochs=6, target_kl=1e-3, learning_rate=0.5, emit=events.append)
    agent.learn(24)
    assert 1 <= events[0].epochs < 6
    assert events[0].kl > 1.5e-3
    agent.reconfigure(target_kl=None)
    agent.learn(24)
    assert events[1].epochs == 6


def test_the_step_is_clipped_to_the_norm(kit: SimpleNamespace) -> None:
    """One step of plain gradient descent moves by the clipped gradient, whatever its size."""
    agent = kit.agent(epochs=1, max_grad_norm=1e-3, minibatch_size=1000, gae_lambda=1.0)
    agent._updater._optimizer = torch.optim.SGD(agent.policy.parameters(), lr=1.0, fused=True)
    before = torch.cat([parameter.detach().flatten() for parameter in agent.policy.parameters()])
    rollout, rows = experience(agent)
    agent._updater.update(batches_of(rollout, rows, None), Hyperparameters.at(agent.config, 0.0))
    after = torch.cat([parameter.detach().flatten() for parameter in agent.policy.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


# -- losses -------------------------------------------------------------------------------------------------------------


def rows_of(log_prob_BH: torch.Tensor, **fields: Any) -> Rows:
    rows = len(log_prob_BH)
    empty = torch.zeros(rows, 1)
    return Rows(**{**dict(mask_BM=None, action_B=empty, log_prob_BH=log_prob_BH, actor_BA=None, critic_BQK=None), **dict(
        advantage_B=torch.zeros(rows), target_BZ=empty), **fields})  # fmt: skip


def evaluated(log_prob_BH: torch.Tensor, relevant_BH: torch.Tensor | None = None) -> Evaluation:
    return Evaluation(log_prob_BH, torch.zeros_like(log_prob_BH), relevant_BH)


def test_the_surrogate_against_a_naive_loop() -> None:
    chance = torch.Generator().manual_seed(0)
    old, new = torch.randn(20, 3, generator=chance), torch.randn(20, 3, generator=chance)
    advantage, relevant = torch.randn(20, generator=chance), torch.rand(20, 3, generator=chance) < 0.7
    joint = losses.policy_loss(evaluated(new), rows_of(old), advantage, 0.2, "joint")
    per_head = losses.policy_loss(evaluated(new, relevant), rows_of(old), advantage, 0.2, "per_head")
    total_joint = total_head = 0.0
    for row in range(20):
        a = float(advantage[row])
        ratio = math.exp(float((new - old)[row].sum()))
        total_joint += min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        for head in range(3):
            ratio = math.exp(float((new - old)[row, head]))
            total_head += min(ratio * a, min(max(ratio, 0.8), 1.2) * a) * bool(relevant[row, head])
    assert float(joint.value) == pytest.approx(-total_joint / 20, rel=1e-4)
    assert float(per_head.value) == pytest.approx(-total_head / 20, rel=1e-4)


@pytest.mark.parametrize("ratio", ["joint", "per_head"])
def test_the_gradient_is_that_of_the_surrogate(ratio: Any) -> None:
    """Against autograd through the textbook formula."""
    chance = torch.Generator().manual_seed(0)
    old, new = torch.randn(50, 3, generator=chance), torch.randn(50, 3, generator=chance).requires_grad_()
    advantage, relevant = torch.randn(50, generator=chance), torch.rand(50, 3, generator=chance) < 0.7
    evaluation = evaluated(new, relevant if ratio == "per_head" else None)
    (found,) = torch.autograd.grad(losses.policy_loss(evaluation, rows_of(old), advantage, 0.3, ratio).loss, new)
    log_ratio = new - old if ratio == "per_head" else (new - old).sum(1, keepdim=True)
    terms = torch.minimum(log_ratio.exp() * advantage[:, None], log_ratio.exp().clamp(0.7, 1.3) * advantage[:, None])
    (expected,) = torch.autograd.grad(-(terms * relevant if ratio == "per_head" else terms).sum() / 50, new)
    torch.testing.assert_close(found, expected)


def test_joint_and_per_head_have_equal_gradients_at_ratio_one() -> None:
    old, advantage = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 10)
    gradients = []
    for ratio in ("joint", "per_head"):
        new = old.clone().requires_grad_()
        losses.policy_loss(evaluated(new), rows_of(old), advantage, 0.2, ratio).loss.backward()
        gradients.append(new.grad)
    torch.testing.assert_close(*gradients)


def test_extreme_log_probabilities_stay_finite() -> None:
    new = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = losses.policy_loss(evaluated(new), rows_of(torch.zeros(2, 1)), torch.tensor([-1.0, 1.0]), 0.2, "joint")
    loss.loss.backward()
    assert torch.isfinite(torch.stack((loss.loss.detach(), loss.value, loss.kl))).all()
    assert torch.isfinite(new.grad).all()


def test_the_divergence_estimate_is_never_negative_and_unbiased() -> None:
    chance = torch.Generator().manual_seed(0)
    sample = torch.randn(200_000, 1, generator=chance)
    normal = torch.distributions.Normal
    old, new = normal(0.0, 1.0).log_prob(sample), normal(0.3, 1.0).log_prob(sample)
    found = losses.policy_loss(evaluated(new), rows_of(old), torch.zeros(len(sample)), 0.2, "joint").kl
    assert float(found) == pytest.approx(0.3**2 / 2, rel=0.02)
    few = losses.policy_loss(evaluated(new[:3]), rows_of(old[:3]), torch.zeros(3), 0.2, "joint").kl
    assert few >= 0


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_advantages_are_normalised_whatever_their_number(rows: int) -> None:
    advantage = torch.linspace(-3, 5, rows)
    normal = normalize_advantages(advantage)
    assert torch.isfinite(normal).all()
    if rows > 1:
        assert float(normal.mean()) == pytest.approx(0, abs=1e-6)
        assert float(normal.std()) == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(normalize_advantages(torch.full((rows,), 2.5))).all()
