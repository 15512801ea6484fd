"""The network of an agent: torso, memory, and the last layers of actor and critics, composed.

    observation -> torso -> memory (or none) -> layers after it -> outputs of the actor, outputs of the critics

Shapes: C towers, L steps of a sequence, B rows, D observation, F features, A outputs of the actor, Q critics, K outputs of a
critic, S parts of the memory's state, H its width. Without memory, leading dimensions are B alone; with memory, L and B.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from morphogen.config import Config
from morphogen.rl.actions import ActionDistribution
from morphogen.rl.memory import Memory, MemoryKind
from morphogen.rl.networks import CNN, MLP, Activation, linear


class PolicyConfig(Config):
    """The network.

    Attributes:
        torso: "mlp", "cnn" for images, or "auto": a CNN where the only observation is an image.
        hidden: Widths of the torso's layers; () passes the observation on as it is.
        channels: Channels of each convolution of a CNN.
        activation: What follows each layer.
        memory: "none", "lstm" or "gru".
        memory_width: Width of the memory.
        memory_layer_norm: Normalise the memory's inputs and outputs.
        head_hidden: Widths of layers after the torso and memory.
        shared: Actor and critics share one torso and memory instead of having their own.
        action_gain: Scale of the actor's last layer at the start; small, so that all actions start about equally likely.
    """

    torso: Literal["auto", "mlp", "cnn"] = "auto"
    hidden: tuple[int, ...] = (64, 64)
    channels: tuple[int, ...] = (32, 64, 64)
    activation: Activation = "tanh"
    memory: MemoryKind = "none"
    memory_width: int = Field(default=64, ge=1)
    memory_layer_norm: bool = False
    head_hidden: tuple[int, ...] = ()
    shared: bool = False
    action_gain: float = Field(default=0.01, gt=0)


class NetworkOutputs(NamedTuple):
    """What the last layers say: ``actor`` [..., A] and ``critic`` [Q, ..., K]."""

    actor: Tensor
    critic: Tensor


class ActorCritic(nn.Module):
    """Actor and critics for flat observations.

    Args:
        config: The network.
        observation_width: D.
        image_shape: Channels, height, width of an observation that is an image, else None.
        distribution: What the actor's outputs mean; its parameters, if it has any, become part of the policy.
        num_critics: Q; each has a tower of its own unless shared.
        num_critic_outputs: K.
        generator: Draws the weights.

    Raises:
        ValueError: A CNN is asked for and the observation is not an image, or a setting would have no effect.
    """

    def __init__(
        self,
        config: PolicyConfig,
        *,
        observation_width: int,
        image_shape: tuple[int, int, int] | None,
        distribution: ActionDistribution,
        num_critics: int,
        num_critic_outputs: int,
        generator: torch.Generator,
    ) -> None:
        """Draw all weights."""
        super().__init__()
        _check(config, image_shape)
        self.distribution = distribution
        self.num_towers = towers = 1 if config.shared else 1 + num_critics
        convolves = config.torso == "cnn" or (config.torso == "auto" and image_shape is not None)
        if convolves and image_shape is not None:
            self.torso: MLP | CNN = CNN(
                towers, image_shape, config.channels, config.hidden, config.activation, generator=generator
            )
        else:
            self.torso = MLP(towers, observation_width, config.hidden, config.activation, generator)
        width, self.memory = self.torso.out_features, None
        if config.memory != "none":
            self.memory = Memory(
                config.memory, towers, width, config.memory_width, layer_norm=config.memory_layer_norm, generator=generator
            )
            width = config.memory_width
        self.body = None
        if config.head_hidden:
            self.body = MLP(towers, width, config.head_hidden, config.activation, generator)
            width = config.head_hidden[-1]
        self.actor = linear(width, distribution.num_outputs, config.action_gain, generator)
        with torch.no_grad():
            self.actor.bias.copy_(distribution.initial_outputs())
        self.critics = nn.ModuleList(linear(width, num_critic_outputs, 1.0, generator) for _ in range(num_critics))

    @property
    def width(self) -> int:
        """The widest layer."""
        return max(parameter.shape[-1] for parameter in self.parameters())

    def initial_state(self, rows: int) -> Tensor | None:
        """Return the memory's state before an episode, zeros [S, C, rows, H]; None without memory."""
        return None if self.memory is None else self.memory.initial_state(rows, next(self.parameters()).device)

    def act(self, observation_BD: Tensor) -> Tensor:
        """Return the actor's outputs alone, [B, A]; for policies without memory.

        Equal to those of :meth:`forward` up to rounding, at less than half its cost for a few rows.
        """
        features_BF = self.torso.tower(0, observation_BD)
        return self.actor(features_BF if self.body is None else self.body.tower(0, features_BF))

    def forward(self, observation: Tensor, state_SCBH: Tensor | None = None) -> tuple[NetworkOutputs, Tensor | None]:
        """Return outputs and the memory's state afterwards.

        Args:
            observation: [B, D] without memory, [L, B, D] with.
            state_SCBH: The memory's state before the first step.
        """
        rows = observation.shape[:-1]
        features_CBF = self.torso(observation.reshape(1, -1, observation.shape[-1]).expand(self.num_towers, -1, -1))
        if self.memory is not None:
            features, state_SCBH = self.memory(features_CBF.unflatten(1, rows), state_SCBH)
            features_CBF = features.flatten(1, 2)
        if self.body is not None:
            features_CBF = self.body(features_CBF)
        towers = features_CBF.unbind(0)  # slices would each fill a whole gradient with zeros on the way back
        actor_BA = self.actor(towers[0])
        behind = towers[:1] * len(self.critics) if len(towers) == 1 else towers[1:]
        outputs = [critic(features_BF) for critic, features_BF in zip(self.critics, behind, strict=True)]
        critic_QBK = outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
        if self.memory is not None:
            return NetworkOutputs(actor_BA.unflatten(0, rows), critic_QBK.unflatten(1, rows)), state_SCBH
        return NetworkOutputs(actor_BA, critic_QBK), None


def _check(config: PolicyConfig, image_shape: tuple[int, int, int] | None) -> None:
    if config.torso == "cnn" and image_shape is None:
        raise ValueError('`torso` must be "mlp" where the observation is not one image, got "cnn". Leave it at "auto".')
    if config.memory == "none" and config.memory_layer_norm:
        raise ValueError('`memory_layer_norm` must be False with memory="none": it would have no effect. Set memory="lstm".')
