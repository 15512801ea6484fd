"""A PPO agent as a member: what travels, what is its own, and that every hyperparameter acts and stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphogen.pbt import PPOMember
from morphogen.pbt.member import bind
from morphogen.pbt.snapshots import from_bytes, to_bytes
from morphogen.rl import PPO, PPOConfig
from morphogen.rl.policy import PolicyConfig

SHAPE: dict[str, Any] = {"num_envs": 2, "rollout_steps": 16, "epochs": 1, "minibatch_size": 16, "schedule_steps": 640}


def member(seed: int, **changes: Any) -> PPOMember:
    policy = PolicyConfig(hidden=(8,), memory="lstm", memory_width=4)
    config = PPOConfig(**{**SHAPE, "policy": policy, "normalize_observations": True, "seed": seed, **changes})
    return PPOMember(PPO("CartPole-v1", config))


def weights(one: PPOMember) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in one.agent.policy.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_trains_up_to_a_step_in_whole_rollouts() -> None:
    one = member(0)
    one.train(33)
    assert one.agent.num_steps == 64
    one.train(64)
    assert one.agent.num_steps == 64


@pytest.mark.parametrize("strategy", ["reset", "copy", "rescale", "adaptive", ("exp_avg_sq", "step")])
def test_weights_normaliser_and_progress_travel_and_episodes_begin_anew(strategy: Any) -> None:
    source, target = member(1), member(2)
    source.train(96)
    target.train(64)
    values = source.get_parameters(include_optimizer=True)
    target.adopt(values, strategy, seed=7)
    assert same(weights(target), weights(source)) and target.agent.num_steps == 96
    ours, theirs = (each.agent.portable_snapshot() for each in (target, source))
    assert ours.meta["extras"] == theirs.meta["extras"] != member(3).agent.portable_snapshot().meta["extras"]
    extras = [name for name in theirs.loose if name.startswith("extras.")]
    assert extras and all(torch.equal(ours.loose[name], theirs.loose[name]) for name in extras)
    assert len(ours.table("optimizer")) == (0 if strategy == "reset" else len(theirs.table("optimizer")))
    memory = target.agent.memory_state
    assert memory is not None and memory.shape[2] == 2 and not memory.any()  # a row for each environment
    assert target.agent.num_episodes == 0
    before = weights(source)
    target.train(160)
    assert same(weights(source), before) and not same(weights(target), before)


def test_children_of_one_source_play_other_episodes_and_the_same_seed_the_same() -> None:
    source = member(1)
    source.train(64)
    values = source.get_parameters(include_optimizer=True)
    trained = []
    for number, seed in enumerate((7, 8, 7)):
        child = member(10 + number)
        child.train(64)
        child.adopt(values, "copy", seed=seed)
        bind(child, {"learning_rate": 0.001}, "child")
        child.train(128)
        trained.append(weights(child))
    assert not same(trained[0], trained[1]) and same(trained[0], trained[2])
    bind(source, {"learning_rate": 0.001}, "source")
    source.train(128)
    assert not any(same(weights(source), each) for each in trained)


HYPERPARAMETERS: dict[str, Any] = {
    "learning_rate": 0.0123,
    "gamma": 0.9,
    "gae_lambda": 0.5,
    "entropy_coef": 0.05,
    "clip_range": 0.0005,
    "value_coef": 2.0,
    "max_grad_norm": 0.01,
    "epochs": 3,
}


@pytest.mark.parametrize("name", [name for name in HYPERPARAMETERS if name in PPOConfig.model_fields])
def test_what_was_applied_acts_and_stays_for_three_updates(name: str) -> None:
    value = HYPERPARAMETERS[name]
    source, plain, target = (member(seed, epochs=4, learning_rate=0.003) for seed in (1, 2, 2))
    source.train(64)
    for each in (plain, target):
        each.adopt(source.get_parameters(), "reset", seed=7)
    bind(target, {name: value}, "target")
    for update in range(1, 4):
        for each in (plain, target):
            each.train(64 + 32 * update)
        assert getattr(target.agent.config, name) == value
    assert not same(weights(plain), weights(target))
    if name == "learning_rate":
        assert [*target.agent.state.learning_rates().values()] == [value]


def test_a_scheduled_rate_is_read_back_as_what_it_starts_from() -> None:
    one = member(0)
    one.train(64)
    assert one.apply_hyperparameters({"learning_rate": 0.002}) == {"learning_rate": 0.002}


def test_unknown_and_structural_names_are_refused() -> None:
    one = member(0)
    for name, says in (("learning_rte", "learning_rate"), ("num_envs", "must stay as it was built")):
        with pytest.raises(ValueError, match=says):
            one.apply_hyperparameters({name: 3})


def test_one_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    one, other = member(1), member(2)
    one.apply_hyperparameters({"learning_rate": 0.01, "gamma": 0.9})
    one.train(96)
    state = from_bytes(to_bytes(one.state_dict()))
    other.load_state_dict(state)
    assert other.agent.config == one.agent.config and other.agent.num_steps == 96
    assert one.train(192) == other.train(192)
    assert same(weights(one), weights(other))


def test_evaluation_scores_whole_episodes_and_changes_nothing() -> None:
    plain, scored = member(3), member(3)
    judged = PPOMember(scored.agent, score="evaluation", evaluation_episodes=3)
    plain.train(64)
    result = judged.train(64)
    assert len(result.scores) == 3 and result.score == pytest.approx(sum(result.scores) / 3)
    plain.train(128)
    judged.train(128)
    assert same(weights(plain), weights(judged))
    with pytest.raises(ValueError, match="`score` must be training or evaluation"):
        PPOMember(scored.agent, score="test")  # type: ignore[arg-type]
