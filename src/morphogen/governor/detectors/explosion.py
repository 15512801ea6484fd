"""Explosion: loss or gradient norm far above its own recent past, by one one-sided rule that knows no units."""

from __future__ import annotations

from morphogen.governor.config import ExplosionConfig
from morphogen.governor.detectors.levels import LevelDetector, Rule, exponential, log_of


class Explosion(LevelDetector):
    """Finds a loss or a log gradient norm above its limits; see :class:`ExplosionConfig` for the rule.

    One rule serves losses of any scale and sign. A damaged run has large gradients: a loss that is moderately high while the
    gradient norm is not is taken for unusual data unless it lasts. Exact zeros (hinge and triplet losses, units at rest) say
    nothing about scale and are not remembered.
    """

    def __init__(self, config: ExplosionConfig) -> None:
        """Start with no past."""
        loss = Rule(
            "loss",
            lambda observation: observation.loss,
            spike=config.loss_spike,
            scale=lambda loss: loss or None,
            relative_floor=config.loss_floor,
            witness="log_norm",
            witness_factor=config.witness,
            lone_run_steps=min(config.lone_run_steps, config.lag_steps),
        )
        log_norm = Rule(
            "gradient norm",
            lambda observation: observation.grad_norm,
            spike=config.log_norm_spike,
            scale=log_of,
            absolute_floor=config.log_norm_floor,
            sustained=config.log_norm_sustained,
            undo=exponential,
        )
        super().__init__("explosion", {"loss": loss, "log_norm": log_norm}, config)
