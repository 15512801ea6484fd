"""Knobs of the governor, each declared once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from morphogen.config import Config

Strategy = Literal["auto", "restore", "reset", "zero_momentum"]


class ExplosionConfig(Config):
    """When a loss or gradient norm counts as exploded: one-sided, robust, free of units.

    A value x is flagged when x > median + sigmas * spread over the last ``window_steps`` clean values, where
    spread = max(1.4826 * MAD, floor). The floor is ``loss_floor`` * |median| for the loss, which may be near or below zero,
    and ``log_norm_floor`` for the logarithm of the gradient norm.

    Attributes:
        window_steps: Clean values remembered.
        min_steps: Values seen before anything is judged.
        loss_sigmas: For the loss.
        loss_floor: Least spread of the loss, as a share of its median's size.
        log_norm_sigmas: For the natural logarithm of the gradient norm.
        log_norm_floor: Least spread of that logarithm.
    """

    window_steps: int = Field(default=128, ge=8)
    min_steps: int = Field(default=20, ge=4)
    loss_sigmas: float = Field(default=10.0, gt=0)
    loss_floor: float = Field(default=0.08, ge=0)
    log_norm_sigmas: float = Field(default=8.0, gt=0)
    log_norm_floor: float = Field(default=0.3, gt=0)


class GovernorConfig(Config):
    """How a run is watched and rewound. Times are calls of ``observe``.

    Attributes:
        check_every: Read loss and gradient norm from the device every so many steps, in one transfer. Above 1 a fault is seen
            after up to that many steps were taken, and then always rewound.
        snapshot_every: Steps between snapshots, at least; a new one is taken when the one before has passed its probation.
        probation_steps: Clean steps after which a snapshot becomes last-known-good.
        generations: Good snapshots kept.
        patience: Alarms within ``alarm_window_steps`` that turn skipping into rewinding.
        alarm_window_steps: See ``patience``.
        max_rewinds: Rewinds without a new good generation in between, after which training has collapsed.
        optimizer: What a rewind does to moments. "auto" restores them where the snapshot has them, else resets.
        learning_rate_penalty: Factor on every learning rate from the second such rewind on.
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
