"""What a policy is, and the table of the built-in ones: one file and one row for each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from morphogen.control.actions import Action
from morphogen.control.baselines import Periodic, Random, Wait
from morphogen.control.heuristic import Heuristic
from morphogen.control.masks import ActionMask
from morphogen.control.observation import Observation
from morphogen.growth import Sowing


class Policy(Protocol):
    """Decides what to do with the slots, one action at a time. Holds no evolving state: chance comes from ``generator``."""

    def act(self, observation: Observation, mask: ActionMask, generator: np.random.Generator) -> Action:
        """Return an action that ``mask`` allows."""
        ...


PolicyMaker = Callable[[Sequence[Sowing]], Policy]
"""Makes a policy that sows from these blueprints, best first."""


def names() -> tuple[str, ...]:
    """Return the names of the built-in policies."""
    return tuple(_MAKERS)


def make(name: str, blueprints: Sequence[Sowing]) -> Policy:
    """Return the policy called ``name``, sowing from ``blueprints``, best first.

    Raises:
        ValueError: There is none of this name, or no blueprint.
    """
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`policy` must be one of {', '.join(_MAKERS)}, got {name!r}.{hint}")
    if not blueprints:
        raise ValueError("`blueprints` must hold at least one, got none. Give the task's.")
    return _MAKERS[name](blueprints)


_MAKERS: dict[str, PolicyMaker] = {
    "wait": Wait,
    "random": Random,
    "periodic": Periodic,
    "heuristic": Heuristic,
}
