"""What PPO reports."""

from __future__ import annotations

import dataclasses

from morphogen.telemetry.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updated(Event):
    """One update was done; ``step`` counts environment steps. Means are over the minibatches that were not skipped.

    Attributes:
        update: Number of the update, from 1.
        mean_return: Mean undiscounted return of the last 100 episodes; NaN before the first ends.
        mean_length: Their mean length, in steps.
        episodes: Episodes that ended so far.
        policy_loss: Clipped surrogate, to be minimised.
        value_loss: Mean loss of the critics.
        entropy: Mean entropy of the actions, in nats.
        kl: Mean of (ratio - 1) - log ratio, an unbiased estimate of KL(old || new) (Schulman 2020, k3).
        clip_fraction: Share of ratios outside the clip range.
        gradient_norm: Before clipping.
        explained_variance: Of the returns, by the critic before the update.
        explained_variance_after: By the critic after it.
        epochs: Epochs done, fewer than configured where the KL stopped them.
        skipped_minibatches: Minibatches that were not finite and changed nothing.
        learning_rate: Of this update.
        clip_range: Of this update.
        entropy_coef: Of this update.
        kl_coefficient: Weight of the KL penalty in this update; 0 without.
        gradient_factor: Mean factor of gradient-variance scaling; 1 without.
        robust_kl: Mean KL between clean and perturbed observations; 0 without.
        steps_per_second: Environment steps per second of wall time in this update and its rollout.
    """

    update: int
    mean_return: float
    mean_length: float
    episodes: int
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_fraction: float
    gradient_norm: float
    explained_variance: float
    explained_variance_after: float
    epochs: int
    skipped_minibatches: int
    learning_rate: float
    clip_range: float
    entropy_coef: float
    kl_coefficient: float = 0.0
    gradient_factor: float = 1.0
    robust_kl: float = 0.0
    steps_per_second: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodesRestarted(Event):
    """Episodes under way could not be taken up again after loading; new ones were started.

    Attributes:
        reason: Why.
    """

    reason: str
