"""Players: who decides in an evaluation. A trained policy and the built-in ones play in the same environments.

Legend: N environments, H choices of an action, D numbers of an observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from morphogen import control
from morphogen.control import Observation, Policy, SlotView
from morphogen.envs.choices import Menu
from morphogen.envs.frames import Frames
from morphogen.envs.learned import LearnedPolicy
from morphogen.envs.vector import Floats, GrowthVectorEnv
from morphogen.growth import Stage
from morphogen.growth.gates import Check
from morphogen.state import RandomStreams

_CHECKS = tuple(Check)
_T = TypeVar("_T")


class Player(Protocol):
    """Decides about N environments at once.

    What it does in one of them hangs on that environment's seed and on what was observed there alone: not on N, not on the
    others.

    Attributes:
        name: What it is called in tables.
    """

    name: str

    def begin(self, seeds: Sequence[int]) -> None:
        """Forget everything, and be ready for environments that were reset with ``seeds``."""
        ...

    def choose(self, env: GrowthVectorEnv, observation_ND: Floats, info: Mapping[str, Any]) -> NDArray[np.int64]:
        """Return choices_NH, which the masks allow, for what ``env`` gave last."""
        ...


class PolicyPlayer:
    """A built-in policy as a player.

    It sees what it sees in the grow job, read out of the frames; its chance comes from the environment's seed.

    Args:
        name: Of the policy; see :func:`morphogen.control.names`.
        menu: Of the environments: what it may sow.

    Raises:
        ValueError: There is no such policy.

    Example:
        >>> env = GrowthVectorEnv("digits", total_steps=4, tick_steps=2)
        >>> player = PolicyPlayer("periodic", env.menu)
        >>> observation, info = env.reset(seed=[3])
        >>> player.begin([3])
        >>> player.choose(env, observation, info).tolist()  # germinate in the first slot, with a ramp of 3 ticks to 1.0
        [[1, 0, 0, 0, 1, 2, 0, 0]]
        >>> env.close()
    """

    def __init__(self, name: str, menu: Menu) -> None:
        """Make the policy."""
        self.name = name
        self._policy: Policy = control.make(name, menu.blueprints)
        self._generators: list[np.random.Generator] = []

    def begin(self, seeds: Sequence[int]) -> None:
        """Start the chance of each environment."""
        self._generators = [RandomStreams(seed).numpy("player", self.name) for seed in seeds]

    def choose(self, env: GrowthVectorEnv, observation_ND: Floats, info: Mapping[str, Any]) -> NDArray[np.int64]:
        """Return what the policy does in each environment."""
        chosen: list[NDArray[np.int64]] = []
        for row, generator in enumerate(self._generators):
            seen = control_observation(env.frames, row, env.menu)
            action = self._policy.act(seen, control.action_mask(seen.slots), generator)
            chosen.append(env.menu.choices(action))
        return np.stack(chosen)


class LearnedPlayer:
    """A trained policy as a player.

    Each environment is observed by itself: in a batch, rounding would differ with N.

    Args:
        policy: Not changed; its memory is not touched.
        name: What to call it.
        deterministic: Take the most probable choices instead of drawing them, as in training, from the environment's seed.
    """

    def __init__(self, policy: LearnedPolicy, name: str = "learned", *, deterministic: bool = False) -> None:
        """Play nothing yet."""
        self.name = name
        self._policy, self._deterministic = policy, deterministic
        self._rows: list[tuple[LearnedPolicy, torch.Generator | None]] = []

    def begin(self, seeds: Sequence[int]) -> None:
        """Forget everything, and start the chance of each environment."""
        streams = [None if self._deterministic else RandomStreams(seed).torch("player", "learned") for seed in seeds]
        self._rows = [(self._policy.twin(), stream) for stream in streams]

    def choose(self, env: GrowthVectorEnv, observation_ND: Floats, info: Mapping[str, Any]) -> NDArray[np.int64]:
        """Return what the policy does in each environment."""
        chosen: list[NDArray[np.int64]] = []
        for row, (policy, generator) in enumerate(self._rows):
            here = slice(row, row + 1)
            masks = {head: mask[here] for head, mask in info["action_mask"].items()}
            chosen.append(policy.choose(observation_ND[here], masks, generator=generator))
        return np.concatenate(chosen)


def control_observation(frames: Frames, row: int, menu: Menu) -> Observation:
    """Return one row of ``frames`` as built-in policies see it.

    It is what they see of the model itself, with two exceptions that none of them looks at: a slot that cools down does not
    name its last blueprint, and ``tried`` is in the order of the menu.
    """
    run = {name: float(frames.run(name)[row]) for name in ("tick", "total_ticks", "metric")}
    views = tuple(_view(frames, row, place, name, menu) for place, name in enumerate(menu.slots))
    return Observation(tick=int(run["tick"]), total_ticks=int(run["total_ticks"]), metric=run["metric"], slots=views)


def _view(frames: Frames, row: int, place: int, name: str, menu: Menu) -> SlotView:
    def number(of: str) -> float:
        return float(frames.slot(of)[row, place])

    blueprints = [sowing.blueprint for sowing in menu.blueprints]
    blueprint, is_fresh = number("blueprint"), number("contribution_tick") == frames.run("tick")[row]
    return SlotView(
        name=name,
        stage=Stage(int(number("stage"))),
        ticks_in_stage=int(number("ticks_in_stage")),
        alpha=number("alpha"),
        at_rest=number("ramp_ticks_left") == 0,
        is_pruning=number("is_pruning") == 1.0,
        gate_open=number("gate_open") == 1.0,
        blueprint=None if np.isnan(blueprint) else blueprints[int(blueprint)],
        tried=tuple(_bits(number("tried"), blueprints)),
        contribution=number("contribution") if is_fresh else None,
        contribution_error=number("contribution_error") if is_fresh else None,
        refusals=tuple(_bits(number("refusals"), _CHECKS)),
    )


def _bits(total: float, items: Sequence[_T]) -> list[_T]:
    """Return the items whose ``2 ** place`` is in ``total``."""
    return [item for place, item in enumerate(items) if int(total) >> place & 1]
