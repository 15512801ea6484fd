"""Putting an agent together from its environments and its config."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from gymnasium.vector import VectorEnv
from torch import nn

from morphogen.rl import actions, critics
from morphogen.rl.config import PPOConfig
from morphogen.rl.critics import Critic
from morphogen.rl.gradient_variance import GradientVarianceScaling
from morphogen.rl.kl_penalty import KLPenalty
from morphogen.rl.normalizers import ObservationNormalizer, RewardNormalizer, ValueNormalizer
from morphogen.rl.policy import ActorCritic
from morphogen.rl.precision import autocast_dtype
from morphogen.rl.vector import Stepper
from morphogen.state import RandomStreams


@dataclasses.dataclass(frozen=True)
class Streams:
    """The agent's chance, apart for each use.

    Attributes:
        acting: Drawn actions in training.
        updating: Order of minibatches and chance within them.
        targets: Sampled returns.
        predicting: Drawn actions outside training.
        environments: Seed of the first reset.
    """

    acting: torch.Generator
    updating: torch.Generator
    targets: torch.Generator
    predicting: torch.Generator
    environments: int


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The parts of an agent; None where the config leaves one out."""

    stepper: Stepper
    critic: Critic
    policy: ActorCritic
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    observation_normalizer: ObservationNormalizer | None
    reward_normalizer: RewardNormalizer | None
    value_normalizer: ValueNormalizer | None
    kl_penalty: KLPenalty | None
    gradient_variance: GradientVarianceScaling | None
    streams: Streams

    def travelling(self) -> dict[str, Any]:
        """Return the parts besides weights and moments that travel to another agent, by name."""
        names = ("observation_normalizer", "reward_normalizer", "value_normalizer", "kl_penalty", "gradient_variance")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def chance(self) -> dict[str, torch.Generator]:
        """Return the random streams that training draws from, by name."""
        return {name: getattr(self.streams, name) for name in ("acting", "updating", "targets")}


def assemble(env: VectorEnv[Any, Any, Any], config: PPOConfig) -> Assembly:
    """Build every part under the config's seed; no environment is touched.

    Raises:
        ValueError: The config does not fit the environment's spaces; the message names the setting.
    """
    device, streams = torch.device(config.device), RandomStreams(config.seed)
    distribution = actions.make(env.single_action_space, config.action)
    stepper = Stepper(env, distribution.read_mask if distribution.mask_width else None)
    encoder, critic = stepper.encoder, critics.make(config.critic).to(device)
    policy = ActorCritic(
        config.policy,
        observation_width=encoder.width,
        image_shape=encoder.image_shape,
        distribution=distribution,
        num_critics=2 if config.critic.twin else 1,
        num_critic_outputs=critic.num_outputs,
        generator=streams.torch("policy"),
    )
    for head in policy.critics:
        cast("nn.Linear", head).bias.data.copy_(critic.initial_bias())
    policy.to(device)
    scales = config.gradient_variance
    return Assembly(
        stepper=stepper,
        critic=critic,
        policy=policy,
        # Its learning rate is set before each update.
        optimizer=torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True),
        scaler=_scaler(config, policy, device),
        observation_normalizer=_observations(stepper) if config.normalize_observations else None,
        reward_normalizer=RewardNormalizer(env.num_envs) if config.normalize_rewards else None,
        value_normalizer=ValueNormalizer(device=device) if config.normalize_values else None,
        kl_penalty=KLPenalty(config.kl_penalty) if config.kl_penalty else None,
        gradient_variance=GradientVarianceScaling(scales, dict(policy.named_parameters())) if scales else None,
        streams=Streams(
            *(streams.torch(name) for name in ("acting", "updating", "targets", "predicting")),
            environments=streams.integer("environments") % 2**31,
        ),
    )


def _observations(stepper: Stepper) -> ObservationNormalizer:
    return ObservationNormalizer(stepper.encoder.width, stepper.encoder.normalizable)


def _scaler(config: PPOConfig, policy: ActorCritic, device: torch.device) -> torch.amp.GradScaler | None:
    if autocast_dtype(config, policy.width, device) is not torch.float16:
        return None
    return torch.amp.GradScaler(device.type, init_scale=2.0**12)
