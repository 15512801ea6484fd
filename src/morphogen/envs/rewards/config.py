"""Knobs of the reward. One point is ten percentage points of the metric, unless said otherwise: ``metric_weight`` is 10."""

from __future__ import annotations

import difflib
import math
from itertools import pairwise
from typing import Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from morphogen.config import Config

Preset = Literal["shaped", "simplified", "basic", "basic_plus", "sparse", "minimal", "escrow", "loss"]
PRESETS: tuple[Preset, ...] = get_args(Preset)


class RentConfig(Config):
    """What parameters cost. A host of 562 that carries 2,400 more from start to end pays 0.33 in all.

    Attributes:
        weight: Paid over a whole episode for ln(1 + grown / host) = 1, so whatever the number of ticks.
        host_floor: The host counts as at least so many parameters: one of 20 is not multiplied by a seed of 200.
        incubation_share: Share of its parameters for which a seed pays at alpha 0, in [0, 1]: it is trained already.
    """

    weight: float = Field(default=0.2, ge=0)
    host_floor: int = Field(default=200, ge=1)
    incubation_share: float = Field(default=0.5, ge=0, le=1)


class StageConfig(Config):
    """The potential of a slot: how far its seed has come. Shaping by it leaves the best policy what it is.

    Attributes:
        weight: Points for each unit of potential.
        potentials: Of GERMINATED, TRAINING, BLENDING, HOLDING, FOSSILIZED; rising. All other stages have 0.
        dwell_per_tick: Added for each tick in a stage but the last, as gates ask for time.
        dwell_cap: At most so much is added; not more than the least rise, so that advancing never costs potential.
    """

    weight: float = Field(default=0.05, ge=0)
    potentials: tuple[float, float, float, float, float] = (1.0, 2.0, 3.5, 5.5, 6.0)
    dwell_per_tick: float = Field(default=0.1, ge=0)
    dwell_cap: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        least = min(after - before for before, after in pairwise((0.0, *self.potentials)))
        if least <= 0:
            raise ValueError(f"`potentials` must rise from above 0, got {self.potentials}. Later stages are worth more.")
        if self.dwell_cap > least:
            raise ValueError(
                f"`dwell_cap` must be <= {least:g}, the least rise of `potentials`, got {self.dwell_cap}. Lower it."
            )
        return self


class CreditConfig(Config):
    """What a seed is given credit for (see ``credited``), in units of the metric, and what credit is worth.

    Attributes:
        weight: Points for a seed beyond doubt: weight * tanh(credit / scale).
        scale: Credit at which three quarters of them are paid.
        error_z: Standard errors by which a contribution counts as less than measured.
        maturity_ticks: Ticks in HOLDING from which all is paid for fossilising; before, in proportion.
    """

    weight: float = Field(default=0.2, ge=0)
    scale: float = Field(default=0.05, gt=0)
    error_z: float = Field(default=1.0, ge=0)
    maturity_ticks: int = Field(default=3, ge=1)


class DripConfig(Config):
    """How what a fossil earned is paid out.

    Attributes:
        share: Of the payment for a fossil, what goes into its pool; the rest is paid at once.
        min_ticks: A pool is spread over the ticks left, and at least over so many.
    """

    share: float = Field(default=0.7, ge=0, le=1)
    min_ticks: int = Field(default=5, ge=1)


class ChurnConfig(Config):
    """What single actions cost, in points.

    Attributes:
        germinate: For GERMINATE.
        prune: For PRUNE.
        retarget: For SET_ALPHA_TARGET.
    """

    germinate: float = Field(default=0.03, ge=0)
    prune: float = Field(default=0.03, ge=0)
    retarget: float = Field(default=0.02, ge=0)


class HastyPruneConfig(Config):
    """What it costs to prune a seed before it could show anything.

    Attributes:
        cost: Points.
        ticks: Age from which it is free.
    """

    cost: float = Field(default=0.1, ge=0)
    ticks: int = Field(default=5, ge=0)


class LossConfig(Config):
    """How the training loss is paid.

    Attributes:
        weight: Points for going from ``baseline`` to ``target``.
        baseline: Loss of a model that knows nothing, in the loss's units: ln(number of classes) for a classifier.
        target: Loss that counts as all there is to reach; below ``baseline``.
        max_step: At most so much of that way is paid for one tick, either way.
    """

    weight: float = Field(default=10.0, ge=0)
    baseline: float = math.log(10)
    target: float = 0.0
    max_step: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.target >= self.baseline:
            raise ValueError(f"`target` must be below `baseline`, {self.baseline:g}, got {self.target}. Losses fall.")
        return self


class RewardConfig(Config):
    """What is paid: a preset, and the constants of its terms (``morphogen.envs.rewards.describe()`` shows which it has).

    Attributes:
        preset: Which terms are summed.
        gamma: Discount; shaping is neutral for an agent with this very discount alone (:func:`require_same_gamma`). Episodes
            have an end that is observed coming, so none is needed: at 1, what an episode pays is what it is compared by.
        metric_weight: Points for a metric that goes up by 1, paid where it stands at the end. For a metric in other units
            than shares, choose it so that an episode comes to about ten points.
        progress_share: Share of them that shaping pays ahead as the metric moves, in [0, 1]; it is settled at the end.
        rent: What parameters cost.
        stages: What progress of seeds is worth to shaping.
        credit: What a seed that helps is worth when it is fossilised.
        escrow_max_step: Points by which the credit held for a seed moves in a tick, at most.
        drip: How what a fossil earned is paid out.
        churn: What single actions cost.
        activity_cost: What any action but WAIT costs, where that is all that actions cost.
        hasty_prune: What it costs to prune young seeds.
        alpha_shock: Points for a seed as large as 1.7 times the host that is set from alpha 0 to 1 in a single tick.
        fault_penalty: Points lost where an episode ends by a fault.
        quarantine_penalty: Points lost for a seed that the governor had to take out.
        loss: How the training loss is paid.

    Example:
        >>> RewardConfig(preset="basic", rent=RentConfig(weight=0.1)).rent.host_floor
        200
    """

    preset: Preset = "shaped"
    gamma: float = Field(default=1.0, gt=0, le=1)
    metric_weight: float = Field(default=10.0, gt=0)
    progress_share: float = Field(default=1.0, ge=0, le=1)
    rent: RentConfig = RentConfig()
    stages: StageConfig = StageConfig()
    credit: CreditConfig = CreditConfig()
    escrow_max_step: float = Field(default=0.05, gt=0)
    drip: DripConfig = DripConfig()
    churn: ChurnConfig = ChurnConfig()
    activity_cost: float = Field(default=0.01, ge=0)
    hasty_prune: HastyPruneConfig = HastyPruneConfig()
    alpha_shock: float = Field(default=0.05, ge=0)
    fault_penalty: float = Field(default=1.5, ge=0)
    quarantine_penalty: float = Field(default=0.1, ge=0)
    loss: LossConfig = LossConfig()

    @field_validator("preset", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> object:
        if value not in PRESETS:
            near = difflib.get_close_matches(str(value), PRESETS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {value!r}.{hint}")
        return value


def require_same_gamma(config: RewardConfig, gamma: float) -> None:
    """Check that an agent discounts as its reward does, without which shaping changes what is best.

    Args:
        config: Of the reward.
        gamma: The agent's discount.

    Raises:
        ValueError: They differ.

    Example:
        >>> require_same_gamma(RewardConfig(gamma=0.99), gamma=0.99)
    """
    if gamma != config.gamma:
        raise ValueError(
            f"`gamma` must be {config.gamma}, the discount of the reward's shaping, got {gamma}. Give both the same."
        )
