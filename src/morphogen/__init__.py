"""morphogen: train PyTorch networks that change while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from morphogen.version import __version__ as __version__

if TYPE_CHECKING:
    from morphogen.envs import GrowthVectorEnv as GrowthVectorEnv
    from morphogen.governor import Governor as Governor, GovernorConfig as GovernorConfig
    from morphogen.growth import GrowableModel as GrowableModel, Stage as Stage
    from morphogen.pbt import PBTConfig as PBTConfig, PBTScheduler as PBTScheduler, PopulationTrainer as PopulationTrainer
    from morphogen.rl import PPO as PPO, PPOConfig as PPOConfig
    from morphogen.state import Snapshot as Snapshot, TrainingState as TrainingState

_HOMES = {
    "Governor": "morphogen.governor",
    "GovernorConfig": "morphogen.governor",
    "GrowableModel": "morphogen.growth",
    "GrowthVectorEnv": "morphogen.envs",
    "PBTConfig": "morphogen.pbt",
    "PBTScheduler": "morphogen.pbt",
    "PopulationTrainer": "morphogen.pbt",
    "Stage": "morphogen.growth",
    "PPO": "morphogen.rl",
    "PPOConfig": "morphogen.rl",
    "Snapshot": "morphogen.state",
    "TrainingState": "morphogen.state",
}
"""Public name -> its package, imported when first asked for: `import morphogen` alone does not import torch."""

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Import a public name from its package when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'morphogen' has no attribute {name!r}. Public names: {', '.join(_HOMES)}.")
    return getattr(importlib.import_module(_HOMES[name]), name)
