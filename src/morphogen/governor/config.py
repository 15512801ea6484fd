"""Knobs of the governor, each declared once."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from morphogen.config import Config

Strategy = Literal["auto", "restore", "reset", "zero_momentum"]


class ExplosionConfig(Config):
    """When a loss or gradient norm counts as exploded: one-sided, without units, for losses of any scale and sign.

    Of the last ``window_steps`` clean values before the newest ``lag_steps``, take the median and
    spread = max(highest - median, floor). A value is flagged when it exceeds median + spike * spread, or when it is the last of
    ``run_steps`` in a row above median + ``sustained`` * spread. The floor is ``loss_floor`` * |median| for the loss and
    ``log_norm_floor`` for the natural logarithm of the gradient norm.

    Attributes:
        window_steps: Clean values that set the limits.
        lag_steps: Newest clean values, which are judged and do not yet set limits, so that growth is not learned as normal.
        min_steps: Clean values seen before anything is judged, newest ones included.
        run_steps: Values in a row above the lower limit that are an explosion.
        sustained: The lower limit, in spreads above the median.
        loss_spike: The limit for a single loss, in spreads above the median.
        loss_floor: Least spread of the loss, as a share of its median's size.
        log_norm_spike: The limit for a single logarithm of the gradient norm.
        log_norm_floor: Least spread of that logarithm.
    """

    window_steps: int = Field(default=128, ge=8)
    lag_steps: int = Field(default=16, ge=1)
    min_steps: int = Field(default=64, ge=4)
    run_steps: int = Field(default=2, ge=1)
    sustained: float = Field(default=1.5, gt=0)
    loss_spike: float = Field(default=10.0, gt=0)
    loss_floor: float = Field(default=0.25, gt=0)
    log_norm_spike: float = Field(default=3.0, gt=0)
    log_norm_floor: float = Field(default=0.6, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lag_steps < self.min_steps <= self.window_steps + self.lag_steps:
            raise ValueError(
                f"`min_steps` must be above `lag_steps` = {self.lag_steps} and at most `window_steps` + `lag_steps` = "
                f"{self.window_steps + self.lag_steps}, got {self.min_steps}. Else nothing is ever judged."
            )
        if self.run_steps > self.lag_steps:
            raise ValueError(
                f"`run_steps` must be at most `lag_steps` = {self.lag_steps}, got {self.run_steps}. Else the run sets the "
                "limit it is judged by."
            )
        return self


class GovernorConfig(Config):
    """How a run is watched and rewound. Times are calls of ``observe``.

    Attributes:
        check_every: Read loss and gradient norm from the device every so many steps, in one transfer. Above 1 a fault is seen
            after up to that many steps were taken, and then always rewound. While anything is suspicious, and just after a
            rewind, every step is checked.
        snapshot_every: Steps between snapshots, at least; a new one is taken when the one before has passed its probation.
        probation_steps: Clean steps after which a snapshot becomes last-known-good.
        generations: Good snapshots kept.
        patience: Alarms within ``alarm_window_steps`` that turn skipping into rewinding; one more after each rewind that did
            not help, up to the whole window.
        alarm_window_steps: See ``patience``.
        max_rewinds: Rewinds without getting past the fault in between, after which training has collapsed.
        optimizer: What a rewind does to moments. "auto" restores them where the snapshot has them, else resets.
        learning_rate_penalty: Factor on every learning rate with the second such rewind and each one after it.
        penalty: Carried by the ``Rollback`` event for whoever trains a policy.
        explosion: The explosion detector.
    """

    check_every: int = Field(default=1, ge=1)
    snapshot_every: int = Field(default=25, ge=1)
    probation_steps: int = Field(default=50, ge=0)
    generations: int = Field(default=2, ge=2)
    patience: int = Field(default=3, ge=1)
    alarm_window_steps: int = Field(default=6, ge=1)
    max_rewinds: int = Field(default=4, ge=1)
    optimizer: Strategy = "auto"
    learning_rate_penalty: float = Field(default=0.5, gt=0, le=1)
    penalty: float = 10.0
    explosion: ExplosionConfig = ExplosionConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patience > self.alarm_window_steps:
            raise ValueError(
                f"`patience` must be at most `alarm_window_steps` = {self.alarm_window_steps}, got {self.patience}. Else no "
                "number of alarms leads to a rewind."
            )
        return self
