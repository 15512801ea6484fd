"""What the conformance suite of distributions over actions is run on: spaces, settings, outputs and masks.

Shapes: B rows, A outputs of the policy's last layer, M mask width (0 or A).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete, Space
from torch import Tensor

from morphogen.rl.actions import ActionConfig, ActionDistribution, HeadConfig, make

TIE = 1e-5
_TREE = (
    HeadConfig(name="op"),
    HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2)}),
    HeadConfig(name="kind", given=("op", "slot"), relevant_when={"op": (1,)}),
)


@dataclasses.dataclass(frozen=True)
class ActionCase:
    """A distribution over the actions of one space.

    Attributes:
        name: Of messages, and the id of a test.
        space: The action space of a single environment.
        make: Returns a new distribution, equal each time.
        density: Of continuous actions: whether a log-probability is the density of what is "stored" or of what the
            environment gets ("env", where that is another scale). No effect on finite spaces.
    """

    name: str
    space: Space[Any]
    make: Callable[[], ActionDistribution]
    density: Literal["stored", "env"] = "stored"

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def outputs(self, num_rows: int, seed: int = 0) -> Tensor:
        """Return random outputs, [B, A]; equal for equal seeds."""
        return torch.randn(num_rows, self.make().num_outputs, generator=chance(seed))

    def mask(self, num_rows: int, share: float = 0.5, seed: int = 0) -> Tensor | None:
        """Return a random mask [B, M] that ``check_mask`` accepts, or None if no mask is taken.

        Entries are forbidden in random order, each with the chance ``share``; where that leaves a choice with nothing allowed,
        not. At ``share`` 1 a single action remains.
        """
        actions, rng = self.make(), np.random.default_rng(seed)
        if not actions.mask_width:
            return None
        mask_BM = np.ones((num_rows, actions.mask_width), np.bool_)
        for row in range(num_rows):
            for column in rng.permutation(actions.mask_width)[rng.random(actions.mask_width) < share]:
                mask_BM[row, column] = False
                mask_BM[row, column] = refused(functools.partial(actions.check_mask, mask_BM[row : row + 1]))
        return torch.from_numpy(mask_BM)

    def masks(self, num_rows: int) -> list[Tensor | None]:
        """Return no mask, and a random one if one is taken."""
        mask_BM = self.mask(num_rows)
        return [None] if mask_BM is None else [None, mask_BM]


def action_cases() -> tuple[ActionCase, ...]:
    """Return cases with which every distribution of :func:`morphogen.rl.actions.make`, and every setting, is covered.

    Example:
        >>> [str(case) for case in action_cases() if case.density == "env"]
        ['squashed', 'squashed-uneven']
    """
    uneven = Box(np.array([-2.0, 1.0]), np.array([2.0, 11.0]), dtype=np.float64)
    cases: dict[str, tuple[Space[Any], ActionConfig]] = {
        "discrete": (Discrete(5), ActionConfig()),
        "discrete-explored": (Discrete(4, start=-3), ActionConfig(exploration=0.2)),
        "several": (MultiDiscrete([3, 2, 4], start=[1, 0, -2]), ActionConfig()),
        "several-2d": (MultiDiscrete(np.array([[3, 2], [2, 2]])), ActionConfig()),
        "tree": (MultiDiscrete([3, 2, 4]), ActionConfig(heads=_TREE)),
        "tree-explored": (MultiDiscrete([3, 2, 4]), ActionConfig(heads=_TREE, exploration=0.2)),
        "box": (Box(-1.0, 1.0, (2,)), ActionConfig()),
        "box-2d": (Box(-np.inf, np.inf, (2, 2), np.float64), ActionConfig(log_std_init=-1.0)),
        "squashed": (Box(-2.0, 3.0, (2,)), ActionConfig(squash=True)),
        "squashed-uneven": (uneven, ActionConfig(squash=True, log_std_init=-0.5)),
    }
    return tuple(
        ActionCase(name, space, functools.partial(make, space, config), "env" if config.squash else "stored")
        for name, (space, config) in cases.items()
    )


def close(found: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors have one shape and, but for rounding, the same values."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=TIE)


def refused(call: Callable[[], object]) -> bool:
    """Return whether ``call`` raises ValueError."""
    try:
        call()
    except ValueError:
        return True
    return False


def chance(seed: int = 0) -> torch.Generator:
    """Return a new generator, equal for equal seeds."""
    return torch.Generator().manual_seed(seed)
