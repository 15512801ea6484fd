"""Knobs of growth, each declared once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from morphogen.config import Config

Incubator = Literal["straight_through", "shadow"]


class GateConfig(Config):
    """What a seed must show before it moves on. Times are clock ticks, contributions are in units of the task's metric.

    Attributes:
        min_training_ticks: Ticks in TRAINING before BLENDING.
        min_blending_ticks: Ticks in BLENDING before HOLDING.
        min_holding_ticks: Ticks in HOLDING before FOSSILIZED.
        min_gradient_ratio: Gradient of a seed, per element and relative to the host's, below which it does not go on to
            BLENDING. At 0 any gradient will do, and a host that has none.
        min_contribution: Contribution below which a seed is not fossilised (metric with the slot minus metric without).
        contribution_z: How many standard errors below its measured value a contribution is taken to be: fossilising asks for
            contribution - contribution_z * contribution_error >= min_contribution, so 1.64 asks for one-sided 95 %. Above 0, a
            contribution whose error is not known does not do.
        max_reading_age_ticks: A sensor reading older than this counts as not measured.
    """

    min_training_ticks: int = Field(default=2, ge=0)
    min_blending_ticks: int = Field(default=3, ge=0)
    min_holding_ticks: int = Field(default=1, ge=0)
    min_gradient_ratio: float = Field(default=0.0, ge=0)
    min_contribution: float = 0.0
    contribution_z: float = Field(default=0.0, ge=0)
    max_reading_age_ticks: int = Field(default=1, ge=0)


class GrowthConfig(Config):
    """How slots behave.

    Attributes:
        pruned_ticks: Ticks a removed seed's slot stays PRUNED; at least one, so that a removal is seen.
        embargo_ticks: Ticks it then stays EMBARGOED.
        resetting_ticks: Ticks it then stays RESETTING; after the sum of the three it is DORMANT again.
        incubator: How a seed in TRAINING learns without the host feeling it. "straight_through": from the gradient at the
            host's output, in the ordinary pass. "shadow": from a second pass in which it acts (``GrowableModel.shadow``).
        incubation_ratio: Size the incubating residual settles at, relative to the host's feature (see ``incubation.py``);
            "straight_through" alone reads it.
        freeze_fossils: Freeze a seed's parameters when it is fossilised (they then leave the optimizer).
        gates: What a seed must show before it moves on.
    """

    pruned_ticks: int = Field(default=1, ge=1)
    embargo_ticks: int = Field(default=5, ge=0)
    resetting_ticks: int = Field(default=1, ge=0)
    incubator: Incubator = "straight_through"
    incubation_ratio: float = Field(default=0.3, gt=0)
    freeze_fossils: bool = False
    gates: GateConfig = GateConfig()
