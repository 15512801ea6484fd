"""Knobs of growth, each declared once."""

from __future__ import annotations

from pydantic import Field

from morphogen.config import Config


class GateConfig(Config):
    """What a seed must show before it moves on. Times are clock ticks, contributions are in units of the task's metric.

    Attributes:
        min_training_ticks: Ticks in TRAINING before BLENDING.
        min_blending_ticks: Ticks in BLENDING before HOLDING.
        min_holding_ticks: Ticks in HOLDING before FOSSILIZED.
        min_contribution: Contribution below which a seed is not fossilised (metric with the slot minus metric without).
        max_reading_age_ticks: A sensor reading older than this counts as not measured.
    """

    min_training_ticks: int = Field(default=2, ge=0)
    min_blending_ticks: int = Field(default=3, ge=0)
    min_holding_ticks: int = Field(default=1, ge=0)
    min_contribution: float = 0.0
    max_reading_age_ticks: int = Field(default=1, ge=0)


class GrowthConfig(Config):
    """How slots behave.

    Attributes:
        pruned_ticks: Ticks a removed seed's slot stays PRUNED; at least one, so that a removal is seen.
        embargo_ticks: Ticks it then stays EMBARGOED.
        resetting_ticks: Ticks it then stays RESETTING; after the sum of the three it is DORMANT again.
        incubation_ratio: Size the incubating residual settles at, relative to the host's feature (see ``incubation.py``).
        freeze_fossils: Freeze a seed's parameters when it is fossilised (they then leave the optimizer).
        gates: What a seed must show before it moves on.
    """

    pruned_ticks: int = Field(default=1, ge=1)
    embargo_ticks: int = Field(default=5, ge=0)
    resetting_ticks: int = Field(default=1, ge=0)
    incubation_ratio: float = Field(default=0.3, gt=0)
    freeze_fossils: bool = False
    gates: GateConfig = GateConfig()
