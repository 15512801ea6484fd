"""From an action space and a config to the distribution over its actions."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pydantic import Field

from morphogen.config import Config
from morphogen.rl.actions.base import ActionDistribution
from morphogen.rl.actions.factored import FactoredDistribution
from morphogen.rl.actions.gaussian import GaussianDistribution, SquashedGaussianDistribution
from morphogen.rl.actions.heads import HeadConfig, lay_out


class ActionConfig(Config):
    """How actions are drawn. A setting that has no effect on the action space is a ValueError of :func:`make`.

    Attributes:
        heads: Names and dependencies of the choices of a discrete action, one for each and in order; None: independent heads
            called ``action`` (one choice) or ``action_0``, ``action_1``, ... Discrete and MultiDiscrete only.
        squash: Squash continuous actions into the box with tanh instead of clipping them. Box only.
        log_std_init: Log of the standard deviation of continuous actions at the start. Box only.
        exploration: Share, in [0, 1), of a uniform distribution over the allowed choices that is mixed into each head's.
            Discrete and MultiDiscrete only.
    """

    heads: tuple[HeadConfig, ...] | None = None
    squash: bool = False
    log_std_init: float = 0.0
    exploration: float = Field(default=0.0, ge=0, lt=1)


def make(space: spaces.Space[Any], config: ActionConfig | None = None) -> ActionDistribution:
    """Return the distribution over the actions of ``space``, the space of a single environment.

    Args:
        space: Discrete, MultiDiscrete, or Box of floats.
        config: Default: ``ActionConfig()``.

    Raises:
        ValueError: A setting has no effect on this space, or does not fit it.
        TypeError: Actions of this space are not supported.

    Example:
        >>> make(spaces.Discrete(3)).num_outputs
        3
    """
    config = config or ActionConfig()
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return _continuous(space, config)
    if isinstance(space, spaces.Discrete):
        return _discrete(space, [int(space.n)], np.array(int(space.start)), ["action"], config)
    if isinstance(space, spaces.MultiDiscrete):
        sizes = [int(size) for size in space.nvec.ravel()]
        names = [f"action_{place}" for place in range(len(sizes))]
        return _discrete(space, sizes, space.start.ravel().astype(np.int64), names, config)
    raise TypeError(
        f"the action space must be Discrete, MultiDiscrete or a Box of floats, got {space}. Wrap the environment, for example "
        "in gymnasium.wrappers.TransformAction."
    )


def _discrete(
    space: spaces.Space[Any], sizes: list[int], start: Any, names: list[str], config: ActionConfig
) -> FactoredDistribution:
    _refuse_without_effect(config, ("squash", "log_std_init"), space)
    heads = config.heads if config.heads is not None else tuple(HeadConfig(name=name) for name in names)
    return FactoredDistribution(lay_out(sizes, heads), config.exploration, start, space.shape or (), np.dtype(space.dtype))


def _continuous(space: spaces.Box, config: ActionConfig) -> ActionDistribution:
    _refuse_without_effect(config, ("heads", "exploration"), space)
    if not config.squash:
        return GaussianDistribution(space, config.log_std_init)
    if not space.is_bounded("both"):
        raise ValueError(
            f"`squash` must be False for an unbounded box, got True for {space}. Clip the space, or do not squash."
        )
    return SquashedGaussianDistribution(space, config.log_std_init)


def _refuse_without_effect(config: ActionConfig, fields: tuple[str, ...], space: spaces.Space[Any]) -> None:
    for field in fields:
        default, value = ActionConfig.model_fields[field].default, getattr(config, field)
        if value != default:
            raise ValueError(f"`{field}` must be {default} for {space}, where it has no effect, got {value!r}. Remove it.")
