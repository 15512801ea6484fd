"""Every setting that is wrong or would have no effect is a ValueError that says why."""

from __future__ import annotations

from typing import Any

import pytest

from morphogen.pbt import PBTConfig
from morphogen.pbt.config import OURS

LR = {"lr": {"kind": "log_float", "low": 1e-4, "high": 1e-1}}


def config(**changes: Any) -> PBTConfig:
    return PBTConfig(**{"total_steps": 100, "perturbation_interval": 10, "hyperparameters": LR, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"population_size": 1}, "population_size"),
        ({"population_size": 4}, "`truncation_ratio` must be at least 0.25 with 4 members"),
        ({"population_size": 9, "truncation_ratio": 0.1}, "it would exploit nobody"),
        ({"truncation_ratio": 0.6}, "truncation_ratio"),
        ({"truncation_ratio": 0.0}, "truncation_ratio"),
        ({"total_steps": 0}, "total_steps"),
        ({"perturbation_interval": 0}, "perturbation_interval"),
        ({"perturbation_interval": 100}, "nothing would ever be decided"),
        ({"hyperparameters": {}}, "hyperparameters"),
        ({"exploit_method": "truncate"}, "exploit_method"),
        ({"exploit_method": "t_test", "truncation_ratio": 0.2}, "`truncation_ratio` must be left out"),
        ({"exploit_method": "truncation", "significance": 0.1}, "`significance` must be left out"),
        ({"exploit_method": "t_test", "significance": 1.0}, "significance"),
        ({"exploit_method": "none"}, "nobody would explore"),
        ({"exploit_method": "none", "explore_method": "none", "min_gap": 1.0}, "`min_gap` must be left out"),
        ({"exploit_method": "none", "explore_method": "none", "burn_in": 1}, "`burn_in` must be left out"),
        (
            {"exploit_method": "none", "explore_method": "none", "optimizer_exploit_strategy": "copy"},
            "`optimizer_exploit_strategy` must be left out",
        ),
        ({"exploit_method": "none", "explore_method": "none", "ready_fraction": 0.5}, "`ready_fraction` must be left out"),
        ({"explore_method": "none", "explore_all": True}, "`explore_all` must be left out"),
        ({"explore_method": "perturb", "resample_probability": 0.5}, "`resample_probability` must be left out"),
        ({"resample_probability": 1.5}, "resample_probability"),
        ({"min_gap": -1.0}, "min_gap"),
        ({"burn_in": 100}, "`burn_in` must be below total_steps"),
        ({"burn_in": -1}, "burn_in"),
        ({"synchronous": True, "ready_fraction": 0.5}, "`ready_fraction` must be left out"),
        ({"ready_fraction": 0.0}, "ready_fraction"),
        ({"straggler_deadline": 0.0}, "straggler_deadline"),
        ({"optimizer_exploit_strategy": ()}, "must name moments to copy, got none"),
        ({"optimizer_exploit_strategy": "rescaled"}, "optimizer_exploit_strategy"),
        ({"elite": 8}, "`elite` must be below population_size"),
        ({"elite": 2}, "`elite` must be left out here"),
        ({"elite": 1, "exploit_method": "binary_tournament"}, "`elite` must be left out here"),
        ({"mode": "maximum"}, "mode"),
        ({"metric": ""}, "metric"),
        ({"seed": -1}, "seed"),
        ({"min_gap": float("nan")}, "min_gap"),
        ({"populationsize": 8}, "Did you mean `population_size`?"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_or_without_effect_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as error:
        config(**changes)
    assert says in str(error.value)


@pytest.mark.parametrize("theirs", OURS)
def test_names_of_ray_tune_are_answered_with_ours(theirs: str) -> None:
    with pytest.raises(ValueError, match=f"`{theirs}` is not a setting of PBTConfig: it is called `{OURS[theirs]}` here."):
        config(**{theirs: 1})
    assert OURS[theirs].split(".")[0] in PBTConfig.model_fields


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"population_size": 2, "truncation_ratio": 0.5},
        {"exploit_method": "t_test", "significance": 0.1},
        {"exploit_method": "binary_tournament", "elite": 2},
        {"exploit_method": "none", "explore_method": "none"},
        {"exploit_method": "none", "explore_all": True},
        {"explore_all": True, "elite": 1},
        {"elite": 0, "exploit_method": "t_test"},
        {"optimizer_exploit_strategy": ("exp_avg_sq", "step")},
        {"straggler_deadline": 5.0, "synchronous": True},
        {"perturbation_interval": 7, "burn_in": 50, "min_gap": 0.5},
    ],
    ids=str,
)
def test_what_makes_sense_is_taken_and_survives_a_file(changes: dict[str, Any]) -> None:
    made = config(**changes)
    again = PBTConfig(**made.model_dump(mode="json", exclude_unset=True))
    assert again == made
    assert PBTConfig.model_validate_json(made.model_dump_json(exclude_unset=True)) == made


def test_every_field_is_documented() -> None:
    text = PBTConfig.__doc__ or ""
    assert [name for name in PBTConfig.model_fields if f"        {name}: " not in text] == []


def test_intervals_cover_all_steps() -> None:
    assert config().num_intervals == 10
    assert config(perturbation_interval=30).num_intervals == 4
    assert config(population_size=10, truncation_ratio=0.25).num_exploited == 2


@pytest.mark.parametrize(
    ("population", "ratio", "exploited"),
    [(5, 0.2, 1), (10, 0.3, 3), (3, 1 / 3, 1), (7, 1 / 7, 1), (10, 0.1, 1), (100, 0.29, 29), (20, 0.15, 3), (30, 0.1, 3)],
)
def test_a_share_of_the_population_is_not_lost_to_rounding(population: int, ratio: float, exploited: int) -> None:
    assert config(population_size=population, truncation_ratio=ratio).num_exploited == exploited


def test_values_are_checked_by_name_and_bounds() -> None:
    made = config()
    made.check_values({"lr": 0.01}, "here")
    for values, says in (
        ({}, "`lr` must be given"),
        ({"lr": 1.0}, "`lr` must be a number in"),
        ({"lr": 0.01, "lrr": 1}, "Did you mean `lr`?"),
    ):
        with pytest.raises(ValueError, match=r"(?s).") as error:
            made.check_values(values, "member 3")
        assert says in str(error.value) and "member 3" in str(error.value)
