"""Knobs of population-based training."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from morphogen.config import Config
from morphogen.pbt.spaces import Hyperparameter, Value

ExploitMethod = Literal["truncation", "binary_tournament", "t_test", "none"]
ExploreMethod = Literal["perturb", "resample", "both", "none"]

OURS = {
    "quantile_fraction": "truncation_ratio",
    "synch": "synchronous",
    "burn_in_period": "burn_in",
    "hyperparam_mutations": "hyperparameters",
    "hyperparam_bounds": "hyperparameters",
    "perturbation_factors": "hyperparameters.NAME.factor",
    "custom_explore_fn": "hyperparameters",
    "time_attr": "perturbation_interval",
    "resample_prob": "resample_probability",
    "num_samples": "population_size",
    "stop": "total_steps",
    "max_t": "total_steps",
}
"""What names of Ray Tune are called here."""


class PBTConfig(Config):
    """How a population trains. Everything counted in steps is in the steps that members count.

    Attributes:
        population_size: Members, >= 2.
        total_steps: Steps of each member, whatever it takes over on the way.
        perturbation_interval: Steps between two decisions about a member.
        hyperparameters: What is searched, by the name that members know.
        exploit_method: Who takes over whom. "truncation": the worst ``truncation_ratio`` of the population take over one of the
            best as many. "binary_tournament": each draws an opponent, and takes it over if that is better. "t_test": likewise,
            if it is better by Welch's test on the scores of its last episodes. "none": nobody, a control.
        truncation_ratio: For "truncation", in (0, 0.5]; times the population size it must give at least 1.
        significance: For "t_test": greatest p-value, in (0, 1).
        explore_method: What becomes of hyperparameters taken over. "perturb": all move a step; "resample": all are drawn anew;
            "both": each is drawn anew with ``resample_probability``, else moves a step; "none": nothing, a control.
        resample_probability: For "both".
        explore_all: Members that took nobody over explore, too.
        metric: What the score is called: where a member returns several numbers, the one to look at.
        mode: Whether "max" or "min" is better.
        min_gap: By how much a source must be better, on the scale of the metric; more than 0 in any case.
        burn_in: Steps before which nobody is exploited, unless its score is no number.
        ready_fraction: When asynchronous: which part of the population must have reported for the first exploit.
        straggler_deadline: Seconds after which a member that has not come back is replaced; None to wait for ever.
        optimizer_exploit_strategy: What becomes of optimizer state: "reset", "copy", "rescale", "adaptive", or the names of the
            moments to copy, such as ("exp_avg_sq", "step"), the others being zero.
        synchronous: Decide about all members at once, when all are there: such a run can be repeated exactly.
        elite: As many of the best are neither exploited nor explored.
        seed: Root of all chance.

    Raises:
        ValueError: A setting is out of range, or would have no effect.

    Example:
        >>> config = PBTConfig(total_steps=100, perturbation_interval=10, hyperparameters={"lr": {"kind": "log_float",
        ...     "low": 1e-4, "high": 1e-1}})
        >>> config.num_exploited
        1
    """

    population_size: int = Field(default=8, ge=2)
    total_steps: int = Field(ge=1)
    perturbation_interval: int = Field(ge=1)
    hyperparameters: dict[str, Hyperparameter] = Field(min_length=1)
    exploit_method: ExploitMethod = "truncation"
    truncation_ratio: float = Field(default=0.2, gt=0.0, le=0.5)
    significance: float = Field(default=0.05, gt=0.0, lt=1.0)
    explore_method: ExploreMethod = "both"
    resample_probability: float = Field(default=0.25, ge=0.0, le=1.0)
    explore_all: bool = False
    metric: str = Field(default="score", min_length=1)
    mode: Literal["max", "min"] = "max"
    min_gap: float = Field(default=0.0, ge=0.0)
    burn_in: int = Field(default=0, ge=0)
    ready_fraction: float = Field(default=0.8, gt=0.0, le=1.0)
    straggler_deadline: float | None = Field(default=None, gt=0.0)
    optimizer_exploit_strategy: Literal["reset", "copy", "rescale", "adaptive"] | tuple[str, ...] = "reset"
    synchronous: bool = False
    elite: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            """Check ``values``; a name of Ray Tune is answered with ours."""
            theirs = [name for name in values if name in OURS and name not in type(self).model_fields]
            if theirs:
                raise ValueError(f"`{theirs[0]}` is not a setting of PBTConfig: it is called `{OURS[theirs[0]]}` here.")
            super().__init__(**values)

    @property
    def num_exploited(self) -> int:
        """How many members "truncation" exploits at most."""
        return self.exploited_of(self.population_size)

    def exploited_of(self, num_members: int) -> int:
        """Return how many of so many members "truncation" exploits at most; 0.29 of 100 are 29, whatever floats say."""
        return int(num_members * self.truncation_ratio + 1e-9)

    @property
    def num_intervals(self) -> int:
        """Intervals of each member; the last may be shorter."""
        return -(-self.total_steps // self.perturbation_interval)

    def check_values(self, values: dict[str, Value], where: str) -> None:
        """Check values of all hyperparameters.

        Raises:
            ValueError: One is missing, unknown or out of bounds.
        """
        for name in values.keys() - self.hyperparameters.keys():
            near = difflib.get_close_matches(name, self.hyperparameters, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`{name}` must be a name in `hyperparameters`, which has none of it ({where}).{hint}")
        for name, space in self.hyperparameters.items():
            if name not in values:
                raise ValueError(f"`{name}` must be given ({where}). It is in `hyperparameters`.")
            problem = space.problem(values[name])
            if problem:
                raise ValueError(f"`{name}` must be {problem}, got {values[name]!r} ({where}). Change it or its bounds.")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        for problem in (self._exploiting(), self._exploring(), self._timing()):
            if problem:
                raise ValueError(problem)
        return self

    def _given(self, name: str) -> bool:
        return name in self.model_fields_set

    def _exploiting(self) -> str:
        method = self.exploit_method
        if method == "truncation" and self.num_exploited < 1:
            return (
                f"`truncation_ratio` must be at least {1 / self.population_size:.3g} with {self.population_size} members, got "
                f"{self.truncation_ratio}: it would exploit nobody. Raise it, or the population."
            )
        belongs = {"truncation_ratio": "truncation", "significance": "t_test"}
        for name, owner in belongs.items():
            if self._given(name) and method != owner:
                return f'`{name}` must be left out with exploit_method "{method}": it would have no effect.'
        if method == "none":
            of_exploits = ("min_gap", "burn_in", "optimizer_exploit_strategy", "ready_fraction")
            idle = [name for name in of_exploits if self._given(name)]
            if idle:
                return f'`{idle[0]}` must be left out with exploit_method "none": it would have no effect.'
        if self.optimizer_exploit_strategy == ():
            return '`optimizer_exploit_strategy` must name moments to copy, got none. Write "reset" for none.'
        if self.elite >= self.population_size:
            return f"`elite` must be below population_size, {self.population_size}, got {self.elite}. Somebody must move."
        return self._elite_without_effect()

    def _elite_without_effect(self) -> str:
        if not self._given("elite") or self.elite == 0 or self.explore_all:
            return ""
        safe = {"truncation": self.population_size - self.num_exploited, "none": self.population_size}
        if self.elite <= safe.get(self.exploit_method, 1):
            return (
                f"`elite` must be left out here, got {self.elite}: the best {self.elite} are never exploited by "
                f'"{self.exploit_method}", and without `explore_all` never explored.'
            )
        return ""

    def _exploring(self) -> str:
        if self.exploit_method == "none" and not self.explore_all and self.explore_method != "none":
            return (
                f'`explore_method` must be "none" with exploit_method "none", got "{self.explore_method}": nobody would '
                "explore. Or set `explore_all`."
            )
        if self.explore_method == "none" and self.explore_all:
            return '`explore_all` must be left out with explore_method "none": it would have no effect.'
        if self.explore_method != "both" and self._given("resample_probability"):
            return (
                f'`resample_probability` must be left out with explore_method "{self.explore_method}": it would have no effect.'
            )
        return ""

    def _timing(self) -> str:
        decisions = self.num_intervals - 1
        if decisions < 1 and (self.exploit_method, self.explore_all) != ("none", False):
            return (
                f"`perturbation_interval` must be below total_steps, {self.total_steps}, got {self.perturbation_interval}: "
                "nothing would ever be decided. Make it shorter, or train longer."
            )
        if self.burn_in >= self.total_steps:
            return f"`burn_in` must be below total_steps, {self.total_steps}, got {self.burn_in}: nobody would be exploited."
        if self.synchronous and self._given("ready_fraction"):
            return "`ready_fraction` must be left out when synchronous: all members are waited for."
        return ""
