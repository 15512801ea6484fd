"""Knobs of a population: defaults by kind of member, what is written, and one clear sentence for each mistake."""

from __future__ import annotations

from typing import Any

import pytest

from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.train_config import AGENT

CARTPOLE: dict[str, Any] = {"env": "CartPole-v1"}
DIGITS: dict[str, Any] = {"member": "growth", "task": "digits", "growth_env": {"total_steps": 12, "tick_steps": 2}}
RATE = {"learning_rate": {"kind": "log_float", "low": 1e-4, "high": 1e-2}}


@pytest.mark.parametrize(
    "given",
    [
        CARTPOLE,
        DIGITS,
        {**CARTPOLE, "pbt": {"exploit_method": "t_test", "significance": 0.1, "synchronous": False, "ready_fraction": 0.5}},
        {**CARTPOLE, "pbt": {"optimizer_exploit_strategy": ["exp_avg_sq", "step"], "elite": 1, "explore_all": True}},
        {**CARTPOLE, "score": "evaluation", "evaluation_episodes": 3, "engine": "processes", "num_workers": 2},
        {**DIGITS, "pbt": {"hyperparameters": {**RATE, "epochs": {"kind": "int", "low": 1, "high": 8}}}},
    ],
)
def test_what_is_written_is_read_back(given: dict[str, Any]) -> None:
    config = PBTJobConfig(**given)
    assert PBTJobConfig(**config.model_dump(mode="json")) == config
    assert config.replace(engine="processes").engine == "processes"


def test_defaults_are_those_of_the_kind_of_member() -> None:
    agent, growth = PBTJobConfig(**CARTPOLE), PBTJobConfig(**DIGITS)
    assert (agent.pbt.total_steps, growth.pbt.total_steps) == (100_000, 40_000)
    assert agent.pbt.synchronous and growth.pbt.synchronous
    built = growth.agent(seed=5)
    assert (built.policy, built.rollout_steps, built.seed) == (AGENT.policy, 6, 5)
    assert growth.growth_env is not None and built.gamma == growth.growth_env.reward.gamma
    assert agent.agent().schedule_steps == 100_000
    assert agent.replace(ppo={"schedule_steps": 7}).agent().schedule_steps == 7


def test_what_is_searched_or_without_effect_is_not_written() -> None:
    written = PBTJobConfig(**DIGITS, pbt={"hyperparameters": RATE}).model_dump(mode="json")  # pyright: ignore[reportArgumentType]
    assert not {"learning_rate", "seed", "num_threads", "gamma", "rollout_steps"} & written["ppo"].keys()
    assert "entropy_coef" in written["ppo"], "it is not searched here"
    assert not {"significance", "ready_fraction"} & written["pbt"].keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, '`env` must be given with the member "ppo"'),
        ({"member": "growth"}, '`task` must be given with the member "growth"'),
        ({"member": "grwth"}, "Did you mean 'growth'?"),
        ({**CARTPOLE, "task": "digits"}, '`task` must be left out with the member "ppo"'),
        ({**CARTPOLE, "growth_env": {}}, '`growth_env` must be left out with the member "ppo"'),
        ({**DIGITS, "env": "CartPole-v1"}, '`env` must be left out with the member "growth"'),
        ({**DIGITS, "env_kwargs": {"g": 1}}, '`env_kwargs` must be left out with the member "growth"'),
        ({**DIGITS, "task": "digit"}, "Did you mean 'digits'?"),
        ({**CARTPOLE, "engine": "proceses"}, "Did you mean 'processes'?"),
        ({**CARTPOLE, "num_workers": 2}, '`num_workers` must be left out with the engine "inline"'),
        ({**CARTPOLE, "engine_options": {"address": "x"}}, '`engine_options` must be left out with the engine "inline"'),
        ({**CARTPOLE, "engine": "ray", "engine_options": {"num_workers": 2}}, "must not hold `num_workers`"),
        (
            {**DIGITS, "engine": "processes", "growth_env": {"executor": "processes"}},
            '`growth_env.executor` must be "inline" with the engine "processes"',
        ),
        ({**CARTPOLE, "evaluation_episodes": 3}, '`evaluation_episodes` must be left out with the score "training"'),
        ({**CARTPOLE, "pbt": {"metric": "return"}}, "`pbt.metric` must be left out"),
        ({**CARTPOLE, "pbt": {"population_size": 1}}, "`population_size` must be greater than or equal to 2, got 1"),
        ({**CARTPOLE, "pbt": {"population_size": 4}}, "`truncation_ratio` must be at least 0.25 with 4 members"),
        ({**CARTPOLE, "pbt": {"total_steps": 4000}}, "`perturbation_interval` must be below total_steps, 4000, got 5000"),
        ({**CARTPOLE, "pbt": {"perturbation_interval": 99}}, "`pbt.perturbation_interval` must be at least a rollout"),
        ({**CARTPOLE, "pbt": {"quantile_fraction": 0.2}}, "it is called `truncation_ratio` here"),
        ({**CARTPOLE, "pbt": {"popultion_size": 4}}, "Did you mean `population_size`?"),
        ({**CARTPOLE, "ppo": {"learning_rate": 1e-3}}, "`ppo.learning_rate` must be left out, got 0.001: it is searched"),
        ({**DIGITS, "ppo": {"entropy_coef": 0.5}}, "`ppo.entropy_coef` must be left out, got 0.5: it is searched"),
        ({**CARTPOLE, "ppo": {"seed": 3}}, "`ppo.seed` must be left out, got 3: chance comes from `pbt.seed`"),
        ({**CARTPOLE, "ppo": {"num_threads": 4}}, "`ppo.num_threads` must be left out, got 4: each member uses one"),
    ],
)
def test_a_mistake_is_said_in_one_sentence(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="must|not a setting") as caught:
        PBTJobConfig(**given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "space", "said"),
    [
        ("learning_rat", RATE["learning_rate"], "Did you mean `learning_rate`?"),
        ("zzz", RATE["learning_rate"], "Known: "),
        ("num_envs", {"kind": "int", "low": 1, "high": 4}, "`pbt.hyperparameters.num_envs` must be left out: what is built"),
        ("schedule_steps", {"kind": "int", "low": 1, "high": 4}, "must be a live setting"),
        ("epochs", {"kind": "float", "low": 1, "high": 4}, "`epochs` must be a valid integer"),
        ("gamma", {"kind": "float", "low": 0.9, "high": 1.1}, "`gamma` must be less than or equal to 1, got 1.1"),
        ("ratio", {"kind": "categorical", "values": ["joint", "per_hed"]}, "got 'per_hed'"),
        ("sequence_steps", {"kind": "int", "low": 4, "high": 8}, "must be None without memory"),
        ("rollout_steps", {"kind": "int", "low": 4, "high": 900}, "must be at least a rollout, 900 steps of 8"),
    ],
)
def test_what_an_agent_cannot_take_is_not_searched(name: str, space: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        PBTJobConfig(**CARTPOLE, pbt={"hyperparameters": {name: space}})  # pyright: ignore[reportArgumentType]
    assert said in str(caught.value)


def test_the_discount_of_growth_is_not_searched() -> None:
    space = {"gamma": {"kind": "logit", "low": 0.9, "high": 0.99}}
    with pytest.raises(ValueError, match="there the discount is `growth_env.reward.gamma`"):
        PBTJobConfig(**DIGITS, pbt={"hyperparameters": space})  # pyright: ignore[reportArgumentType]
