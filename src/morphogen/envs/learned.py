"""A trained policy at work: a batch of observations and masks in, choices out, memory kept between the two.

Legend: N environments, H choices of an action, D numbers of an observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from morphogen.envs.choices import Layout, Menu
from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.frames import Frames
from morphogen.envs.masks import BoolArray
from morphogen.envs.observation import feature_names, observe
from morphogen.envs.rewards import RewardConfig, Rewards
from morphogen.errors import CheckpointError
from morphogen.rl.normalizers import ObservationNormalizer
from morphogen.rl.policy import ActorCritic
from morphogen.rl.prediction import Predictor
from morphogen.rl.spaces import ObservationEncoder


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a policy comes from.

    Attributes:
        task: What it was trained on.
        slots: Growth points of that task, in the order of its places.
        blueprints: What it could sow there, likewise.
        env: The environments it was trained in.
        gamma: The discount it was trained with.
        version: Of morphogen.
        facts: Whatever else was noted: the command, the steps, what it reached.
    """

    task: str
    slots: tuple[str, ...]
    blueprints: tuple[str, ...]
    env: GrowthEnvConfig
    gamma: float
    version: str
    facts: Mapping[str, Any]


class LearnedPolicy:
    """A trained policy; what evolves is its memory alone, which ``state_dict`` holds.

    Args:
        network: Network and action distribution; not changed.
        normalizer: Of observations, frozen; None: they are taken as they are.
        origin: Where it comes from.

    Attributes:
        origin: As given.
    """

    def __init__(self, network: ActorCritic, normalizer: ObservationNormalizer | None, origin: Origin) -> None:
        """Start with nothing to remember, for one environment."""
        self.origin = origin
        self._parts = network, normalizer
        space = Box(-1.0, 1.0, (len(feature_names(origin.env.layout)),), np.float32)
        # Draws come with each call; the predictor's own stream is never used.
        self._predictor = Predictor(network.eval(), ObservationEncoder(space), normalizer, torch.Generator(), space)
        self.start(1)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the network by name, copied."""
        return {name: tensor.detach().clone() for name, tensor in self._parts[0].state_dict().items()}

    def twin(self) -> LearnedPolicy:
        """Return one with the same network that remembers nothing."""
        return LearnedPolicy(*self._parts, self.origin)

    def on(self, task: str) -> LearnedPolicy:
        """Return one with the same network, for ``task``: on another than that of training, slots and length are its own."""
        if task == self.origin.task:
            return self.twin()
        env = self.origin.env.replace(slots=None, total_steps=None, tick_steps=None)
        return LearnedPolicy(*self._parts, dataclasses.replace(self.origin, env=env))

    def fit(self, menu: Menu, source: str = "the policy") -> None:
        """Check that the policy can decide about ``menu``.

        Args:
            menu: Of an environment or a job.
            source: What the policy is called in the message.

        Raises:
            CheckpointError: It was trained for another layout; the message says what to do.
        """
        layout = self.origin.env.layout
        if menu.layout != layout:
            raise CheckpointError(
                f"{source}: was trained with num_slots={layout.num_slots} and num_blueprints={layout.num_blueprints}, got "
                f"{menu.layout.num_slots} and {menu.layout.num_blueprints}. Give the environment as many places."
            )

    def start(self, num_envs: int) -> None:
        """Forget everything, and be ready for ``num_envs`` environments at the beginning of their episodes."""
        if num_envs < 1:
            raise ValueError(f"`num_envs` must be at least 1, got {num_envs}. Give as many as are observed.")
        self._num_envs = num_envs
        self._memory: Tensor | None = self._predictor.policy.initial_state(num_envs)

    def choose(
        self,
        observation_ND: NDArray[np.float32],
        masks: Mapping[str, BoolArray],
        starts_N: BoolArray | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> NDArray[np.int64]:
        """Return choices_NH, which ``masks`` allow, and remember what was observed.

        Args:
            observation_ND: As the environment gives it; neither normalised nor changed.
            masks: As in ``info["action_mask"]``.
            starts_N: Which rows begin an episode: what is remembered there is forgotten first. None: none of them.
            generator: Draws the choices; None takes the most probable ones.

        Raises:
            ValueError: There are not as many rows as :meth:`start` was told.
        """
        if len(observation_ND) != self._num_envs:
            raise ValueError(
                f"`observation_ND` must have {self._num_envs} rows, got {len(observation_ND)}. Call `start` with the number."
            )
        rows_ND = self._predictor.encoder.encode(observation_ND)
        mask_NM = self._predictor.policy.distribution.read_mask(dict(masks), self._num_envs)
        chosen_NH, self._memory = self._predictor.act(rows_ND, self._memory, starts_N, mask_NM, generator)
        return chosen_NH.astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered, copied."""
        return {"num_envs": self._num_envs, "memory": None if self._memory is None else self._memory.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what :meth:`state_dict` returned."""
        memory = state["memory"]
        self.start(int(state["num_envs"]))
        self._memory = None if memory is None else memory.clone()


def sample_observations(layout: Layout) -> NDArray[np.float32]:
    """Return what some made-up frames look like to an agent, [8, D]: two tables of features are the same if these are."""
    generator = np.random.Generator(np.random.PCG64(0))
    frames = Frames.empty(8, layout.num_slots)
    scale_N = np.array([0.03, 0.3, 1.0, 1.0, 2.0, 4.0, 8.0, 50.0])
    frames.runs_NG[:] = generator.uniform(0.0, scale_N[:, None], frames.runs_NG.shape)
    frames.slots_NSR[:] = generator.uniform(0.0, scale_N[:, None, None], frames.slots_NSR.shape)
    for whole in (frames.runs_NG[3:], frames.slots_NSR[3:]):  # stages, ops, flags
        np.round(whole, out=whole)
    return observe(frames, Rewards(RewardConfig(), 8, layout.num_slots).ledger, Menu((), (), layout))
