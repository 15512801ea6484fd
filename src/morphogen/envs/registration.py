"""The name under which Gymnasium makes the environment."""

from __future__ import annotations

import gymnasium as gym

ENV_ID = "morphogen/Growth-v0"
"""Known to Gymnasium once ``morphogen.envs`` was imported; ``"morphogen.envs:morphogen/Growth-v0"`` imports it first."""


def register() -> None:
    """Make the environment known to Gymnasium; a second time does nothing."""
    if ENV_ID not in gym.registry:
        gym.register(ENV_ID, entry_point="morphogen.envs:GrowthEnv", vector_entry_point="morphogen.envs:GrowthVectorEnv")
