"""Settings by name: every one of them, and nothing that is not one."""

from __future__ import annotations

import pytest

from morphogen.recipes.overrides import parse_settings, with_settings
from morphogen.rl.config import PPOConfig
from morphogen.rl.schedules import Linear


def changed(*texts: str) -> PPOConfig:
    return with_settings(PPOConfig(), parse_settings(texts))


def test_values_are_yaml_and_names_may_lead_inside() -> None:
    config = changed(
        "learning_rate=1e-3",
        "gamma=0.98",
        "policy.hidden=[32, 16]",
        "target_kl=null",
        "normalize_values=true",
        "clip_range={kind: linear, start: 0.2, end: 0}",
    )
    assert (config.learning_rate, config.gamma, config.policy.hidden) == (0.001, 0.98, (32, 16))
    assert config.normalize_values and config.clip_range == Linear(start=0.2, end=0.0)
    assert config == PPOConfig().replace(
        **{name: getattr(config, name) for name in ("learning_rate", "gamma", "policy", "normalize_values", "clip_range")}
    )


def test_a_setting_inside_a_part_that_is_off_turns_it_on() -> None:
    config = changed("kl_penalty.target=0.02", "kl_penalty.kind=adaptive")
    assert config.kl_penalty is not None and config.kl_penalty.target == 0.02


def test_no_settings_change_nothing() -> None:
    assert changed() == PPOConfig()


@pytest.mark.parametrize("name", list(PPOConfig.model_fields))
def test_every_field_can_be_set_to_what_it_is(name: str) -> None:
    value = PPOConfig().model_dump(mode="json")[name]
    assert with_settings(PPOConfig(), {name: value}) == PPOConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat=1", "`learning_rat` is not a setting of PPOConfig. Did you mean `learning_rate`"),
        ("policy.hiden=[3]", "`policy.hiden` is not a setting of PPOConfig. Did you mean `policy.hidden`"),
        ("zzz=1", "Known names: num_envs, "),
        ("gamma.x=1", "Set `gamma` as a whole"),
        ("learning_rate.end=0", "Set `learning_rate` as a whole"),
        ("gamma", "`--set` must be given name=value, got 'gamma'"),
        ("=3", "`--set` must be given name=value"),
        ("gamma=[", r"`gamma` must be given a YAML value, got '\['"),
        ("gamma=2", "`gamma` must be less than or equal to 1, got 2"),
        ("policy.memory=lsmt", "`memory` must be 'none', 'lstm' or 'gru', got 'lsmt'"),
        ("sequence_steps=8", "would have no effect"),
    ],
)
def test_a_mistake_names_the_setting(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        changed(text)


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="`gamma` must be set once"):
        changed("gamma=0.9", "gamma=0.8")
