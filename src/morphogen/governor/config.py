"""Knobs of the governor, each declared once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from morphogen.config import Config

Strategy = Literal["auto", "restore", "reset", "zero_momentum"]


class HistoryConfig(Config):
    """What of a quantity's past sets its limits: one-sided, without units, for quantities of any scale and sign.

    Of the last ``window_steps`` clean values before the newest ``lag_steps``, take the median and
    spread = max(highest - median, floor). A value is flagged when it exceeds median + spike * spread, or when it is the last of
    ``run_steps`` in a row above median + ``sustained`` * spread. What spike and floor are, each detector says.

    Attributes:
        window_steps: Clean values that set the limits.
        lag_steps: Newest clean values, which are judged and do not yet set limits, so that growth is not learned as normal.
        min_steps: Clean values seen before anything is judged, newest ones included.
        run_steps: Values in a row above the lower limit that are flagged.
        sustained: The lower limit, in spreads above the median.
    """

    window_steps: int = Field(default=128, ge=8)
    lag_steps: int = Field(default=16, ge=1)
    min_steps: int = Field(default=64, ge=4)
    run_steps: int = Field(default=2, ge=1)
    sustained: float = Field(default=1.5, gt=0)

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


class ExplosionConfig(HistoryConfig):
    """When a loss or gradient norm counts as exploded; the rule is that of :class:`HistoryConfig`.

    The floor is ``loss_floor`` * |median| for the loss and ``log_norm_floor`` for the natural logarithm of the gradient norm.

    Attributes:
        loss_spike: The limit for a single loss, in spreads above the median.
        loss_floor: Least spread of the loss, as a share of its median's size.
        witness: How high the logarithm of the gradient norm must be in a run of high losses, in spreads above its median.
        lone_run_steps: Length of a run of high losses that is an explosion whatever the gradient norm; of ``lag_steps`` where
            that is less, as later ones set the limit.
        log_norm_spike: The limit for a single logarithm of the gradient norm.
        log_norm_sustained: The limit for a run of them, in place of ``sustained``.
        log_norm_floor: Least spread of that logarithm.
    """

    loss_spike: float = Field(default=15.0, gt=0)
    loss_floor: float = Field(default=0.25, gt=0)
    witness: float = Field(default=1.25, ge=0)
    lone_run_steps: int = Field(default=12, ge=1)
    log_norm_spike: float = Field(default=3.0, gt=0)
    log_norm_sustained: float = Field(default=2.0, gt=0)
    log_norm_floor: float = Field(default=0.6, gt=0)


class LevelConfig(HistoryConfig):
    """When the logarithm of a positive quantity counts as out of bounds; the rule is that of :class:`HistoryConfig`.

    Attributes:
        spike: The limit for a single value, in spreads above the median.
        floor: Least spread.
    """

    spike: float = Field(default=3.0, gt=0)
    floor: float = Field(default=0.6, gt=0)


class CollapseConfig(HistoryConfig):
    """When the outputs count as collapsed; see :class:`~morphogen.governor.detectors.Collapse`.

    Attributes:
        spike: The limit for a single fall of the logarithm of the outputs' spread, in spreads of that logarithm.
        floor: Least spread of that logarithm.
        entropy_spike: The limit for a single fall of the entropy of the mean prediction.
        entropy_floor: Least spread of that entropy, in nats.
    """

    sustained: float = Field(default=2.5, gt=0)
    spike: float = Field(default=4.0, gt=0)
    floor: float = Field(default=0.3, gt=0)
    entropy_spike: float = Field(default=4.0, gt=0)
    entropy_floor: float = Field(default=0.15, gt=0)


class ProbeConfig(HistoryConfig):
    """When the loss of the probe counts as risen; the rule is that of :class:`HistoryConfig`, with every number in probes.

    Attributes:
        spike: The limit for a single loss, in spreads above the median.
        floor: Least spread, as a share of the median's size.
    """

    window_steps: int = Field(default=16, ge=8)
    lag_steps: int = Field(default=1, ge=1)
    min_steps: int = Field(default=4, ge=4)
    run_steps: int = Field(default=1, ge=1)
    spike: float = Field(default=3.0, gt=0)
    floor: float = Field(default=0.25, gt=0)


class SensorConfig(Config):
    """What is measured of a run, beside loss and gradient norm.

    Attributes:
        state_check_every: Steps between looks at all weights, and at single gradients where only their norm is given.
        max_buffer_size: Buffers with up to so many values (running statistics) are watched, and put back when a step is
            skipped; larger ones (masks, tables) are put back by rewinds alone.
        probe_every: Steps between calls of the probe, where there is one.
        sample_size: Values of each weight tensor that are looked at in every step.
    """

    state_check_every: int = Field(default=10, ge=1)
    max_buffer_size: int = Field(default=65536, ge=0)
    probe_every: int = Field(default=25, ge=1)
    sample_size: int = Field(default=256, ge=1)


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
        skip_window_steps: Batches before a fault that are passed over when it came back after a rewind; see
            :func:`~morphogen.governor.verdicts.is_in_bad_window`. 0 for none, where the data comes in another order then.
        max_rewinds: Rewinds without getting past the fault in between, after which training has collapsed.
        optimizer: What a rewind does to moments, for all or by owner (a parameter group, as named by
            ``TrainingState.learning_rates``); see :func:`~morphogen.governor.recovery.put_back`.
        learning_rate_penalty: Factor on every learning rate with the second such rewind and each one after it.
        penalty: Amount of the ``Penalty`` of a rewind, for whoever trains a policy.
        quarantine_penalty: The same for a part of the model that was taken out without a rewind.
        sensors: What is measured.
        explosion: The detector of loss and gradient norm.
        update: The detector of the size of updates.
        running_statistics: The detector of changes of buffers.
        collapse: The detector of collapsed outputs.
        dead_gradient: The detector of missing gradients; its floor is a share of the parameter tensors.
        probe: The detector of the probe's loss.
    """

    check_every: int = Field(default=1, ge=1)
    snapshot_every: int = Field(default=25, ge=1)
    probation_steps: int = Field(default=50, ge=0)
    generations: int = Field(default=2, ge=2)
    patience: int = Field(default=3, ge=1)
    alarm_window_steps: int = Field(default=6, ge=1)
    skip_window_steps: int = Field(default=16, ge=0)
    max_rewinds: int = Field(default=4, ge=1)
    optimizer: Strategy | Mapping[str, Strategy] = "auto"
    learning_rate_penalty: float = Field(default=0.5, gt=0, le=1)
    penalty: float = 10.0
    quarantine_penalty: float = 1.0
    sensors: SensorConfig = SensorConfig()
    explosion: ExplosionConfig = ExplosionConfig()
    update: LevelConfig = LevelConfig(spike=6.0, sustained=3.0)
    running_statistics: LevelConfig = LevelConfig(spike=6.0, sustained=2.5)
    collapse: CollapseConfig = CollapseConfig()
    dead_gradient: LevelConfig = LevelConfig(spike=4.0, sustained=2.5, floor=0.1)
    probe: ProbeConfig = ProbeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.patience > self.alarm_window_steps:
            raise ValueError(
                f"`patience` must be at most `alarm_window_steps` = {self.alarm_window_steps}, got {self.patience}. Else no "
                "number of alarms leads to a rewind."
            )
        return self
