"""The update: several epochs of minibatches, each a step of Adam or nothing at all.

Nothing is read from the device within an epoch. A minibatch whose loss or gradient is not finite is skipped whole, on
the device: the fused optimizer is told so and leaves parameters, moments and step alone.

Shapes: B rows, Q critics, K outputs of a critic, Z target samples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from morphogen.errors import UpdateDiverged
from morphogen.rl import losses
from morphogen.rl.adversarial import AdversarialConfig, perturb, starting_noise
from morphogen.rl.assembly import Assembly
from morphogen.rl.config import PPOConfig
from morphogen.rl.critics import choose_samples
from morphogen.rl.minibatches import Batches, Minibatch
from morphogen.rl.policy import NetworkOutputs
from morphogen.rl.precision import autocast_dtype
from morphogen.rl.schedules import resolve

MAX_SKIPPED_IN_A_ROW = 3
MAX_OVERFLOWS_IN_A_ROW = 20
"""In fp16 a gradient may overflow until the scaler, which halves its scale each time, has come down far enough."""
_WATCHED = ("policy_loss", "value_loss", "entropy", "kl", "clip_fraction", "gradient_norm", "gradient_factor", "robust_kl")


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The live settings as plain numbers, at one moment of training; see :class:`PPOConfig` for each."""

    config: PPOConfig
    learning_rate: float
    clip_range: float
    entropy_coef: float
    adversarial_epsilon: float = 0.0
    adversarial_coefficient: float = 0.0

    @classmethod
    def at(cls, config: PPOConfig, fraction: float) -> Hyperparameters:
        """Return what ``config`` says when ``fraction`` of training is done."""
        adversarial = config.adversarial
        return cls(
            config=config,
            learning_rate=resolve(config.learning_rate, fraction, field="learning_rate", minimum=0.0),
            clip_range=resolve(config.clip_range, fraction, field="clip_range", minimum=0.0),
            entropy_coef=resolve(config.entropy_coef, fraction, field="entropy_coef"),
            adversarial_epsilon=0.0 if adversarial is None else adversarial.epsilon_at(fraction),
            adversarial_coefficient=0.0 if adversarial is None else adversarial.coefficient_at(fraction),
        )


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """Means over the minibatches that were not skipped (NaN if all were), and how many of each there were; see ``Updated``."""

    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_fraction: float
    gradient_norm: float
    gradient_factor: float
    robust_kl: float
    epochs: int
    minibatches: int
    skipped_minibatches: int


class Updater:
    """Improves a policy from batches; owns nothing that evolves but a count of skipped minibatches.

    Args:
        parts: Policy, optimizer, critic, scaler and controllers, all of which it changes in place.
        config: What is structural in it: precision and compilation.
    """

    def __init__(self, parts: Assembly, config: PPOConfig) -> None:
        """Compile the network if asked to; nothing runs yet."""
        self._policy, self._critic, self._optimizer, self._scaler = parts.policy, parts.critic, parts.optimizer, parts.scaler
        self._kl_penalty, self._gradient_variance = parts.kl_penalty, parts.gradient_variance
        self._generator, policy = parts.streams.updating, parts.policy
        self._parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._device = self._parameters[0].device
        self._autocast_dtype = autocast_dtype(config, policy.width, self._device)
        self._network: Any = torch.compile(policy) if config.compile else policy
        self._zero, self._one = (torch.full((), value, device=self._device) for value in (0.0, 1.0))
        self._spread: Tensor | None = None
        self.skipped_in_a_row = 0

    @property
    def kl_coefficient(self) -> float:
        """Weight of the KL penalty; 0 without."""
        return 0.0 if self._kl_penalty is None else self._kl_penalty.coefficient

    def update(self, batches: Batches, now: Hyperparameters) -> UpdateResult:
        """Change the policy's parameters, in place.

        Raises:
            UpdateDiverged: Three minibatches in a row were not finite; none of them changed anything.
        """
        config, tables, epochs = now.config, list[Tensor](), 0
        self._spread = self._policy.distribution.snapshot()
        for _ in range(config.epochs):
            epochs += 1
            steps = [self._step(batch, now) for batch in batches.epoch(config.minibatch_size, self._generator)]
            table = torch.stack(steps).cpu()
            tables.append(table)
            self._count_skipped(table[:, -1])
            if config.target_kl is not None and _means(table)[_WATCHED.index("kl")] > 1.5 * config.target_kl:
                break
        table = torch.cat(tables)
        watched = dict(zip(_WATCHED, _means(table), strict=True))
        if self._kl_penalty is not None and math.isfinite(watched["kl"]):
            self._kl_penalty.update(watched["kl"])
        return UpdateResult(**watched, epochs=epochs, minibatches=len(table), skipped_minibatches=int(table[:, -1].sum()))

    @torch.no_grad()
    def evaluate(self, batch: Minibatch) -> NetworkOutputs:
        """Return what the network says now about all rows of ``batch``, in fp32 and without gradient."""
        return _at_rows(self._policy(batch.observation, batch.state_SCGW)[0], batch.places_B)

    # -- one minibatch ----------------------------------------------------------------------------------------------

    def _step(self, batch: Minibatch, now: Hyperparameters) -> Tensor:
        """Take one step, or none if it is not finite; return what is watched, and last whether it was skipped."""
        for parameter in self._parameters:
            parameter.grad = None
        loss, watched = self._loss(batch, now)
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()  # pyright: ignore[reportUnknownMemberType]
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = _norm(gradients)
        skipped = torch.isnan((norm + loss.detach()) * 0.0)  # 0 times what is not finite is NaN
        factor = self._one
        if self._gradient_variance is not None:
            self._gradient_variance.update(gradients, ~skipped)
            factor = self._gradient_variance.scale_(gradients)
        if now.config.max_grad_norm is not None:
            scaled_norm = norm if self._gradient_variance is None else _norm(gradients)
            torch._foreach_mul_(gradients, (now.config.max_grad_norm / (scaled_norm + 1e-6)).clamp(max=1.0))  # pyright: ignore
        skipped = skipped.float()
        if self._scaler is None:
            self._optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        policy_loss, value_loss, entropy, kl, clip_fraction, robust_kl = watched
        return torch.stack((policy_loss, value_loss, entropy, kl, clip_fraction, norm, factor, robust_kl, skipped))

    def _loss(self, batch: Minibatch, now: Hyperparameters) -> tuple[Tensor, tuple[Tensor, ...]]:
        config, rows = now.config, batch.rows
        outputs = self._outputs(batch, batch.observation)
        evaluation = self._policy.distribution.evaluate(outputs.actor, rows.action_B, rows.mask_BM)
        advantage_B = batch.normalized_advantage_B if config.normalize_advantages else rows.advantage_B
        surrogate = losses.policy_loss(evaluation, rows, advantage_B, now.clip_range, config.ratio)
        value = losses.value_loss(
            self._critic, outputs.critic, rows, self._targets(rows.target_BZ, config), config.value_clip_range
        )
        loss = surrogate.loss + config.value_coef * value
        if now.entropy_coef != 0.0:
            loss = loss - now.entropy_coef * evaluation.entropy_BH.sum(1).mean()
        if self._kl_penalty is not None and rows.actor_BA is not None:
            kl_B = self._policy.distribution.kl(rows.actor_BA, outputs.actor, rows.mask_BM, self._spread)
            loss = loss + self._kl_penalty.coefficient * kl_B.mean()
        robust_kl = self._zero
        if config.adversarial is not None:
            robust_kl = self._robust_kl(batch, outputs, config.adversarial, now.adversarial_epsilon)
            loss = loss + now.adversarial_coefficient * robust_kl
        entropy = evaluation.entropy_B.detach().mean()
        watched = (surrogate.value, value.detach(), entropy, surrogate.kl, surrogate.clip_fraction, robust_kl.detach())
        return loss, watched

    def _robust_kl(self, batch: Minibatch, clean: NetworkOutputs, config: AdversarialConfig, epsilon: float) -> Tensor:
        """Return the mean KL between what the policy does and what it would do at the worst observation near each."""
        distribution, mask_BM = self._policy.distribution, batch.rows.mask_BM
        anchor_BA = clean.actor.detach()

        def divergence(observation: Tensor) -> Tensor:
            kl_B = distribution.kl(anchor_BA, self._outputs(batch, observation).actor, mask_BM)
            if batch.places_B is None:
                return kl_B
            rows = observation.shape[:-1]
            return kl_B.new_zeros(rows.numel()).index_copy(0, batch.places_B, kl_B).view(rows)

        noise = starting_noise(batch.observation, self._generator)
        perturbed = perturb(divergence, batch.observation, epsilon, config, noise)
        return distribution.kl(clean.actor, self._outputs(batch, perturbed).actor, mask_BM).mean()

    def _outputs(self, batch: Minibatch, observation: Tensor) -> NetworkOutputs:
        """Return the network's outputs at the batch's rows, in fp32 whatever the network computes in."""
        if self._autocast_dtype is None:
            return _at_rows(self._network(observation, batch.state_SCGW)[0], batch.places_B)
        with torch.autocast(self._device.type, self._autocast_dtype):
            outputs = _at_rows(self._network(observation, batch.state_SCGW)[0], batch.places_B)
        return NetworkOutputs(outputs.actor.float(), outputs.critic.float())

    def _targets(self, target_BZ: Tensor, config: PPOConfig) -> Tensor:
        """Return as many target samples as a minibatch uses, others each time."""
        used = config.critic.samples_per_minibatch
        if target_BZ.shape[1] <= used:
            return target_BZ
        noise_BM = torch.rand(len(target_BZ), used, generator=self._generator)
        return choose_samples(target_BZ, noise_BM.to(self._device))

    def _count_skipped(self, skipped: Tensor) -> None:
        for flag in skipped.tolist():
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if flag else 0
            if self.skipped_in_a_row >= (MAX_SKIPPED_IN_A_ROW if self._scaler is None else MAX_OVERFLOWS_IN_A_ROW):
                raise UpdateDiverged(
                    f"{self.skipped_in_a_row} minibatches in a row had a loss or gradient that is not finite. They "
                    "changed nothing: save the agent, then look at rewards and observations, or lower the learning rate."
                )


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _at_rows(outputs: NetworkOutputs, places_B: Tensor | None) -> NetworkOutputs:
    if places_B is None:
        return outputs
    return NetworkOutputs(outputs.actor.flatten(0, 1)[places_B], outputs.critic.flatten(1, 2)[:, places_B])


def _means(table: Tensor) -> list[float]:
    """Return the mean of each watched column over the minibatches that were taken."""
    taken: Any = table[table[:, -1] == 0, :-1]
    return taken.mean(0).tolist()
