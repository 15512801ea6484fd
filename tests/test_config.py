"""Configs: frozen, strict about names, one clear line for each mistake, checked again at every change."""

from __future__ import annotations

import copy

import pytest
from pydantic import Field

from morphogen.config import Config
from morphogen.governor import ExplosionConfig, GovernorConfig
from morphogen.growth import GateConfig, GrowthConfig
from morphogen.rl.critics import CriticConfig


class Inner(Config):
    """A config inside another."""

    width: int = Field(default=3, ge=1)
    curve: str = "linear"


class Outer(Config):
    """A config with one inside, a field without default, and a tuple."""

    name: str
    ratio: float = Field(default=0.5, gt=0, le=1)
    steps: tuple[int, ...] = Field(default=(1,), min_length=1)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratoi": 0.3}, "`ratoi` is not a setting of Outer. Did you mean `ratio`?"),
        ({"xyzzy": 1}, "`xyzzy` is not a setting of Outer. Known names: name, ratio, steps, inner."),
        ({"ratio": 0.0}, "`ratio` must be greater than 0, got 0.0. Change it in Outer."),
        ({"ratio": 1.5}, "`ratio` must be less than or equal to 1, got 1.5. Change it in Outer."),
        ({"ratio": float("nan")}, "`ratio` must be a finite number, got nan. Change it in Outer."),
        ({"ratio": float("inf")}, "`ratio` must be a finite number, got inf. Change it in Outer."),
        ({"ratio": "much"}, "`ratio` must be a valid number, unable to parse string as a number, got 'much'."),
        ({"ratio": None}, "`ratio` must be a valid number, got None. Change it in Outer."),
        ({"steps": ()}, "`steps` must have at least 1 item after validation, not 0, got (). Change it in Outer."),
        ({"steps": ("a",)}, "`steps.0` must be a valid integer, unable to parse string as an integer, got 'a'."),
        ({"inner": {"widht": 2}}, "`widht` is not a setting of Inner. Did you mean `width`?"),
        ({"inner": {"width": 0}}, "`width` must be greater than or equal to 1, got 0. Change it in Inner."),
        ({"inner": 3}, "`inner` must be a valid dictionary or instance of Inner, got 3. Change it in Outer."),
        ({"inner": GateConfig()}, "`inner` must be a valid dictionary or instance of Inner, got GateConfig("),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_write(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Outer(**{"name": "n", **given})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ValueError, match="`name` must be given, it has no default. Pass it to Outer."):
        Outer()


def test_every_mistake_is_listed_once() -> None:
    with pytest.raises(ValueError) as caught:
        Outer(name="n", ratio=7, steps=["x"], extra=1)
    text = str(caught.value)
    assert [text.count(f"`{field}`") for field in ("ratio", "steps.0", "extra", "steps")] == [1, 1, 1, 0]


def test_arguments_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        Outer("n")


def test_a_config_cannot_be_changed() -> None:
    config = Outer(name="n")
    with pytest.raises(AttributeError, match=r"`ratio` of a Outer cannot be set. Use replace\(ratio=0.1\)."):
        config.ratio = 0.1
    with pytest.raises(AttributeError):
        config.anything = 1
    assert config == Outer(name="n") and hash(config) == hash(Outer(name="n"))


def test_replace_makes_another_and_checks_it() -> None:
    config = Outer(name="n", inner=Inner(width=7))
    other = config.replace(ratio=0.25)
    assert (other.ratio, other.inner.width, config.ratio) == (0.25, 7, 0.5) and type(other) is Outer
    assert config.replace() == config and config.replace() is not config
    with pytest.raises(ValueError, match="`ratio` must be greater than 0, got -1"):
        config.replace(ratio=-1)
    with pytest.raises(ValueError, match="`ratoi` is not a setting of Outer. Did you mean `ratio`"):
        config.replace(ratoi=0.1)


def test_replace_leaves_what_was_not_given_not_given() -> None:
    changed = Outer(name="n", ratio=0.25).replace(name="m")
    assert changed.model_fields_set == {"name", "ratio"} and changed == Outer(name="m", ratio=0.25)


def test_the_nearest_of_the_named_values_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"`kind` must be .*'quantile'.*, got 'quantil'\. Did you mean 'quantile'\?"):
        CriticConfig(kind="quantil")


def test_replace_checks_what_ties_fields_together() -> None:
    with pytest.raises(ValueError, match=r"`patience` must be at most `alarm_window_steps` = 6, got 7\."):
        GovernorConfig().replace(patience=7)
    assert GovernorConfig().replace(patience=7, alarm_window_steps=9).patience == 7


def test_nested_configs_are_given_as_configs_or_as_plain_data() -> None:
    given = Outer(name="n", inner=Inner(width=2, curve="cosine"))
    assert Outer(name="n", inner={"width": 2, "curve": "cosine"}) == given
    assert Outer(**given.model_dump()) == given
    assert Outer(**given.model_dump(mode="json")) == given
    with pytest.raises(ValueError, match="`windw_steps` is not a setting of ExplosionConfig. Did you mean `window_steps`"):
        GovernorConfig(explosion={"windw_steps": 99})


def test_copies_are_equal_and_apart() -> None:
    config = GrowthConfig(gates=GateConfig(min_training_ticks=9))
    assert copy.deepcopy(config) == config and copy.copy(config) == config


@pytest.mark.parametrize("config", [GovernorConfig, ExplosionConfig, GrowthConfig, GateConfig])
def test_every_field_is_documented_and_has_a_default(config: type[Config]) -> None:
    assert config() == config()
    documented = "".join(base.__doc__ or "" for base in config.__mro__ if issubclass(base, Config))
    for name in config.model_fields:
        assert f"        {name}: " in documented, f"{config.__name__}.{name} is not in the docstring"
