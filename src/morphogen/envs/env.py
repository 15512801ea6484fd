"""Growing as a single Gymnasium environment."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from morphogen.envs.config import GrowthEnvConfig
from morphogen.envs.frames import Frames
from morphogen.envs.masks import BoolArray, action_masks, is_possible
from morphogen.envs.vector import Floats, GrowthVectorEnv
from morphogen.tasks import Task

InvalidActions = Literal["wait", "error"]


class GrowthEnv(gym.Env[Floats, NDArray[np.int64]]):
    """One run of a task, as :class:`GrowthVectorEnv` with ``num_envs=1`` plays it, with the interface of a single environment.

    Nothing resets itself: after the step that ends an episode, call ``reset``. With a seed it begins the first episode of the
    environment with that seed; without one, the next episode, or, where the present one is not over, the first one of a seed
    drawn from ``np_random``. The arrays of ``info`` have no axis for environments: ``info["action_mask"]["slot"]`` is
    [op, slot]. Where the episode ends, ``info["final_info"]`` has what it came to, and nothing but WAIT is possible.

    Agents that know no masks, and Gymnasium's own checker, sample ``action_space``: by default an action that is not possible
    is executed as WAIT, and ``info["was_masked"]`` is True then.

    Args:
        task: A task, or the name of one.
        config: How; by default a ``GrowthEnvConfig`` with its defaults.
        invalid_actions: What to do with a masked action: "wait", or "error" to raise SlotError.
        render_mode: None: there is nothing to be seen but numbers.
        **settings: Fields of the config to set otherwise.

    Attributes:
        vector: The environment underneath: its ``frames`` and ``menu``.

    Raises:
        ValueError: A setting is wrong, or the task does not fit it.

    Example:
        Pruning where nothing grows:

        >>> env = GrowthEnv("digits", total_steps=4, tick_steps=2)
        >>> observation, info = env.reset(seed=0)
        >>> observation, reward, terminated, truncated, info = env.step(np.array([4, 0, 0, 0, 0, 0, 0, 0]))
        >>> info["was_masked"], terminated
        (True, False)
        >>> env.close()
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        task: str | Task = "mnist1d",
        *,
        config: GrowthEnvConfig | None = None,
        invalid_actions: InvalidActions = "wait",
        render_mode: None = None,
        **settings: Any,
    ) -> None:
        """Check everything; nothing is built before the first reset."""
        if invalid_actions not in get_args(InvalidActions):
            near = difflib.get_close_matches(str(invalid_actions), get_args(InvalidActions), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "Choose one of them."
            raise ValueError(f"`invalid_actions` must be 'wait' or 'error', got {invalid_actions!r}. {hint}")
        if render_mode is not None:
            raise ValueError(f"`render_mode` must be None, got {render_mode!r}. There is nothing to be seen but numbers.")
        self.vector = GrowthVectorEnv(task, 1, config=config, **settings)
        self.invalid_actions = invalid_actions
        self.render_mode = render_mode
        self.action_space = self.vector.single_action_space
        self.observation_space = self.vector.single_observation_space
        self._next: tuple[Floats, dict[str, Any]] | None = None
        self._is_over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Begin the first episode of the environment with this seed.
            options: ``inject``: faults for the episode, each ``kind@step``.

        Raises:
            ValueError: An option is unknown, or a fault.
        """
        super().reset(seed=seed)
        begun, self._next = self._next, None
        if seed is not None or options or begun is None:
            first = int(self.np_random.integers(2**31)) if seed is None else seed
            rows = {name: {0: tuple(value)} if name == "inject" else value for name, value in (options or {}).items()}
            observation_1D, info = self.vector.reset(seed=first, options=rows)
            begun = observation_1D[0], _row(info)
        self._is_over = False
        return begun

    def step(self, action: NDArray[np.int64]) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Execute an action, train up to the next decision, and say what came of it.

        Raises:
            SlotError: The action is masked, and ``invalid_actions`` is "error"; nothing was done.
            ValueError: It is not of the action space, or no episode is under way.
        """
        if self._is_over:
            raise ValueError(
                "the environment must be reset before `step`, and is not. Call reset first, and after each episode."
            )
        choices_1H = np.asarray(action, dtype=np.int64)[None]
        was_masked = False
        if self.invalid_actions == "wait" and self.action_space.contains(choices_1H[0]):
            was_masked = not is_possible(choices_1H, self.vector.frames, self.vector.menu)[0]
        observation_1D, reward_1, terminated_1, truncated_1, info = self.vector.step(choices_1H * (not was_masked))
        own: dict[str, Any] = {**_row(info), "was_masked": was_masked}
        observation = observation_1D[0]
        self._is_over = bool(terminated_1[0] or truncated_1[0])
        if self._is_over:
            self._next = observation, {"action_mask": own["action_mask"]}
            observation = own.pop("final_obs")
            own["action_mask"] = self._only_wait()
        return observation, float(reward_1[0]), bool(terminated_1[0]), bool(truncated_1[0]), own

    def _only_wait(self) -> dict[str, BoolArray]:
        """Return the masks of an episode that is over: of slots of which nothing is known."""
        nothing = Frames.empty(1, self.vector.menu.layout.num_slots)
        return {head: mask[0] for head, mask in action_masks(nothing, self.vector.menu).items()}

    def close(self) -> None:
        """Give back what is held; twice does no harm."""
        self.vector.close()


def _row(info: dict[str, Any]) -> dict[str, Any]:
    """Return the info of the one environment, without the flags of a vector environment's."""
    own: dict[str, Any] = {}
    for name, value in info.items():
        if name.startswith("_"):
            continue
        own[name] = _row(value) if isinstance(value, dict) else value[0]
    return own
