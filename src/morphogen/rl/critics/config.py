"""Which critic, as a setting."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from morphogen.config import Config
from morphogen.rl.critics.base import Critic
from morphogen.rl.critics.categorical import CategoricalCritic
from morphogen.rl.critics.quantile import QuantileCritic
from morphogen.rl.critics.scalar import ScalarCritic

_KINDS: dict[str, tuple[type[Critic], tuple[str, ...]]] = {
    "scalar": (ScalarCritic, ()),
    "quantile": (QuantileCritic, ("num_quantiles", "kappa", "monotone")),
    "categorical": (CategoricalCritic, ("low", "high", "bins", "sigma")),
}
"""Of each kind, the class and the settings that it takes by the same names."""

_SAMPLING = ("target_samples", "samples_per_minibatch")


class CriticConfig(Config):
    """What the critic predicts. A setting changed from its default where it has no effect is a ValueError.

    Settings in the unit of returns mean the frame of the critic; their defaults are for returns normalised to deviation 1.

    Attributes:
        kind: "scalar" predicts the expected return, "quantile" its quantiles, "categorical" probabilities of fixed returns.
        twin: Two critics with networks of their own; the lower of their values counts.
        num_quantiles: Outputs of a quantile critic.
        kappa: Errors of a quantile below this are squared; larger is smoother, and narrows what is learned.
        monotone: Quantiles are made so that they never cross.
        low: Lowest return that a categorical critic knows; lower targets count as this.
        high: Highest return that it knows.
        bins: Outputs of a categorical critic: returns from ``low`` to ``high``.
        sigma: Smoothing of its targets, in spacings of those returns; 0 shares each target between its two neighbours.
        target_samples: Returns drawn for each row of a rollout, as targets of quantile and categorical critics.
        samples_per_minibatch: How many of those a row gives to each minibatch, drawn anew each time.
    """

    kind: Literal["scalar", "quantile", "categorical"] = "scalar"
    twin: bool = False
    num_quantiles: int = Field(default=32, ge=2)
    kappa: float = Field(default=0.02, ge=0)
    monotone: bool = False
    low: float = -10.0
    high: float = 10.0
    bins: int = Field(default=51, ge=2)
    sigma: float = Field(default=0.75, ge=0)
    target_samples: int = Field(default=32, ge=1)
    samples_per_minibatch: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high` = {self.high}, got {self.low}. Returns from low to high are known.")
        if 0 < self.sigma < 0.5:
            raise ValueError(
                f"`sigma` must be 0 or at least 0.5, got {self.sigma}. In between, the mean of a smoothed target is off."
            )
        if self.samples_per_minibatch > self.target_samples:
            raise ValueError(
                f"`samples_per_minibatch` must be at most `target_samples` = {self.target_samples}, got "
                f"{self.samples_per_minibatch}. A row has no more."
            )
        return self

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        effective = {"kind", "twin", *_settings(self.kind)}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in effective and value != field.default:
                kinds = " or ".join(f'"{kind}"' for kind in _KINDS if name in _settings(kind))
                raise ValueError(
                    f'`{name}` must be left out for a "{self.kind}" critic, got {value!r}. It has an effect with kind={kinds}.'
                )
        return self


def make(config: CriticConfig) -> Critic:
    """Return the critic that ``config`` names; with ``twin`` it serves both networks, as it has no weights.

    Example:
        >>> make(CriticConfig(kind="quantile", num_quantiles=8)).num_outputs
        8
    """
    kind, settings = _KINDS[config.kind]
    return kind(**{name: getattr(config, name) for name in settings})


def _settings(kind: str) -> tuple[str, ...]:
    critic, settings = _KINDS[kind]
    return (*settings, *_SAMPLING) if critic.is_distributional else settings
