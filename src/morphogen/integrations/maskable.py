"""Growth for agents that know a single list of actions and a mask over it, such as MaskablePPO of sb3-contrib.

Legend: N environments, K entries of the list, H choices of an action. Needs no extra: the agent's library does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import NDArray

from morphogen.control import Op
from morphogen.envs import GrowthEnv, GrowthEnvConfig
from morphogen.envs.choices import ALPHA_CURVES, ALPHA_SPEEDS_TICKS, ALPHA_TARGETS, HEADS, STYLES, TEMPOS_TICKS, Choices, Menu
from morphogen.envs.masks import BoolArray, which_possible
from morphogen.envs.vector import Floats
from morphogen.tasks import Task

_STANDARD = {
    "style": STYLES.index(("add", "sigmoid")),
    "tempo": TEMPOS_TICKS.index(3),
    "alpha_target": ALPHA_TARGETS.index(1.0),
    "alpha_speed": ALPHA_SPEEDS_TICKS.index(3),
    "alpha_curve": ALPHA_CURVES.index(("sigmoid", 12.0)),
}


class FlatActions:
    """The actions of an environment as one list.

    WAIT, and for each slot: GERMINATE with each blueprint, SET_ALPHA_TARGET with each target, ADVANCE, PRUNE, FOSSILIZE. All
    else is standard: seeds add, with a sigmoid ramp of 3 ticks to 1.0; later ramps and removals take 3 ticks.

    Args:
        menu: Of the environment; its empty places are left out.

    Attributes:
        choices_KH: The list, as the environment takes it.

    Example:
        >>> from morphogen.envs import GrowthVectorEnv
        >>> actions = FlatActions(GrowthVectorEnv("digits").menu)
        >>> len(actions), actions.names[0], actions.names[2]
        (21, 'wait', 'germinate block1 mlp')
    """

    def __init__(self, menu: Menu) -> None:
        """List them."""
        rows = [(0, 0, 0, 0, "wait")]
        targets = [(place, f"{target:g}") for place, target in enumerate(ALPHA_TARGETS)]
        blueprints = [(place, sowing.blueprint) for place, sowing in enumerate(menu.blueprints)]
        standard = _STANDARD["alpha_target"]
        for slot, name in enumerate(menu.slots):
            rows += [(int(Op.GERMINATE), slot, place, standard, f"germinate {name} {word}") for place, word in blueprints]
            rows += [(int(Op.SET_ALPHA_TARGET), slot, 0, place, f"set alpha of {name} to {word}") for place, word in targets]
            rows += [(int(op), slot, 0, standard, f"{op.name.lower()} {name}") for op in (Op.ADVANCE, Op.PRUNE, Op.FOSSILIZE)]
        self.names = tuple(name for *_, name in rows)
        found = [dict.fromkeys(HEADS, 0) | _STANDARD for _ in rows]
        for row, (op, slot, blueprint, target, _) in zip(found, rows, strict=True):
            row |= {"op": op, "slot": slot, "blueprint": blueprint, "alpha_target": target}
        self.choices_KH = np.array([[row[head] for head in HEADS] for row in found])

    def __len__(self) -> int:
        """K."""
        return len(self.choices_KH)

    def choices(self, action: int) -> Choices:
        """Return what the environment takes for an entry of the list.

        Raises:
            ValueError: There is no such entry.
        """
        if not 0 <= action < len(self):
            raise ValueError(f"`action` must be in [0, {len(self)}), got {action}. Ask the mask first.")
        return self.choices_KH[action].copy()

    def masks(self, masks: Mapping[str, BoolArray]) -> BoolArray:
        """Return which entries ``info["action_mask"]`` of a vector environment allows, mask_NK."""
        return which_possible(self.choices_KH, masks)


class MaskableGrowthEnv(gym.Env[Floats, np.int64]):
    """Growth with a ``Discrete`` action space and the method ``action_masks``, by which MaskablePPO finds the mask.

    As :class:`~morphogen.envs.GrowthEnv` but for the actions; several in a ``DummyVecEnv`` or ``SubprocVecEnv`` play what a
    :class:`~morphogen.envs.GrowthVectorEnv` plays. A masked action raises SlotError.

    Args:
        task: A task, or the name of one.
        config: As for :class:`~morphogen.envs.GrowthEnv`.
        **settings: Fields of the config to set otherwise.

    Attributes:
        actions: What the numbers mean.
        growth: The environment underneath.

    Example:
        >>> env = MaskableGrowthEnv("digits", total_steps=4, tick_steps=2)
        >>> observation, info = env.reset(seed=0)
        >>> [env.actions.names[action] for action in np.flatnonzero(env.action_masks())][:3]
        ['wait', 'germinate block1 conv3x3', 'germinate block1 mlp']
        >>> observation, reward, terminated, truncated, info = env.step(np.int64(1))
        >>> env.close()
    """

    metadata = {"render_modes": []}

    def __init__(self, task: str | Task = "mnist1d", *, config: GrowthEnvConfig | None = None, **settings: Any) -> None:
        """Check everything; nothing is built before the first reset."""
        self.growth = GrowthEnv(task, config=config, invalid_actions="error", **settings)
        self.actions = FlatActions(self.growth.vector.menu)
        self.observation_space = self.growth.observation_space
        self.action_space = Discrete(len(self.actions))
        self.render_mode = self.growth.render_mode
        self._mask_K: NDArray[np.bool_] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin an episode; see :meth:`GrowthEnv.reset`."""
        super().reset(seed=seed)
        observation, info = self.growth.reset(seed=seed, options=options)
        return observation, self._flat(info)

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Execute an entry of the list; see :meth:`GrowthEnv.step`."""
        observation, reward, terminated, truncated, info = self.growth.step(self.actions.choices(int(action)))
        return observation, reward, terminated, truncated, self._flat(info)

    def action_masks(self) -> BoolArray:
        """Return which entries are possible now, mask_K.

        Raises:
            ValueError: Nothing was reset.
        """
        if self._mask_K is None:
            raise ValueError("the environment must be reset before it has a mask, and was not. Call reset first.")
        return self._mask_K.copy()

    def close(self) -> None:
        """Give back what is held; twice does no harm."""
        self.growth.close()

    def _flat(self, info: dict[str, Any]) -> dict[str, Any]:
        """Remember the mask of the list, and put it in the place of the masks of the heads."""
        mask_K = self.actions.masks({head: mask[None] for head, mask in info["action_mask"].items()})[0]
        self._mask_K = mask_K
        return {**info, "action_mask": mask_K.copy()}
