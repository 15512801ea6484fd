"""The config of the train job: what it fills in, what it writes, and what it refuses."""

from __future__ import annotations

import pytest
import yaml

from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.rewards import RewardConfig
from morphogen.recipes.overrides import with_flags, with_settings
from morphogen.recipes.train_config import AGENT, TrainConfig


def written(config: TrainConfig) -> TrainConfig:
    """The config, written to a file and read again."""
    return TrainConfig(**yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))


def test_a_rollout_is_an_episode_unless_it_is_said_otherwise() -> None:
    config = TrainConfig(task="digits", env=GrowthEnvConfig(total_steps=11, tick_steps=2))
    assert config.agent().rollout_steps == config.episode_steps == 6
    assert with_settings(config, {"env.total_steps": 20}).agent().rollout_steps == 10, "it goes along"
    for said in (3, 128):  # 128 is the default of PPO: it counts all the same where it is said
        other = with_settings(config, {"ppo.rollout_steps": said})
        assert other.agent().rollout_steps == written(other).agent().rollout_steps == said
    assert TrainConfig(task="digits").agent().rollout_steps == 48


def test_the_discount_is_that_of_the_reward() -> None:
    config = TrainConfig(env=GrowthEnvConfig(reward=RewardConfig(gamma=0.9)))
    assert config.agent().gamma == written(config).agent().gamma == 0.9
    assert "gamma" not in config.model_dump(mode="json")["ppo"], "one copy"
    both = with_settings(config, {"ppo.gamma": 0.8, "env.reward.gamma": 0.8})
    assert both.agent().gamma == written(both).agent().gamma == 0.8
    with pytest.raises(ValueError, match=r"gamma.* 0\.9.*0\.5"):
        with_settings(config, {"ppo.gamma": 0.5})


def test_what_ppo_leaves_out_is_that_of_this_job() -> None:
    config = TrainConfig(ppo={"epochs": 3, "policy": {"memory_width": 16}})  # pyright: ignore[reportArgumentType]
    assert (config.ppo.epochs, config.ppo.policy.memory_width) == (3, 16)
    assert (config.ppo.policy.memory, config.ppo.policy.hidden, config.ppo.action) == ("lstm", (64,), AGENT.action)
    assert config.agent().rollout_steps == config.episode_steps


def test_a_kind_takes_the_whole_place_of_another() -> None:
    steps = {"learning_rate": {"kind": "points", "points": [[0.0, 1e-3]]}, "critic": {"kind": "quantile", "num_quantiles": 8}}
    config = TrainConfig(ppo=steps)  # pyright: ignore[reportArgumentType]
    assert config.ppo.critic.num_quantiles == 8
    assert written(config) == config


def test_what_is_written_is_read_again() -> None:
    for config in (TrainConfig(), TrainConfig(task="digits", ppo=AGENT.replace(seed=4, num_envs=3, target_kl=None))):
        assert written(config) == config
        assert written(config).agent() == config.agent()


def test_schedules_end_with_the_job() -> None:
    assert TrainConfig(total_steps=77).agent().schedule_steps == 77
    assert with_settings(TrainConfig(), {"ppo.schedule_steps": 5}).agent().schedule_steps == 5


def test_flags_are_settings_given_once() -> None:
    config = with_flags(TrainConfig(), {"task": "digits", "ppo.num_envs": 2, "ppo.seed": None}, {"ppo.epochs": 1})
    assert (config.task, config.num_envs, config.seed, config.ppo.epochs) == ("digits", 2, 0, 1)
    with pytest.raises(ValueError, match=r"`ppo\.seed` must be given once"):
        with_flags(TrainConfig(), {"ppo.seed": 1}, {"ppo.seed": 2})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "digts"}, "Did you mean 'digits'"),
        ({"env.reward.preset": "shapd"}, "Did you mean 'shaped'"),
        ({"env.measure_test": True}, "`env.measure_test` must be False"),
        ({"env.num_workers": 2}, "`num_workers` must be left out"),
        ({"env.tick_stepps": 2}, "Did you mean `env.tick_steps`"),
        ({"total_steps": 0}, "`total_steps` must be"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_settings(TrainConfig(), settings)
