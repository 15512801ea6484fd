"""Cutting a rollout into minibatches: single rows without memory, whole sequences with it.

Shapes: B rows, L steps of the longest sequence, G sequences, D observation, M mask, A outputs of the actor, H heads, Q critics,
K outputs of a critic, Z target samples, T steps, N environments, S parts of the memory's state, C towers, W its width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.rl.advantages import normalize_advantages
from morphogen.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the loss compares the network's outputs with, one row for each step that was experienced.

    Attributes:
        mask_BM: Allowed actions, or None.
        action_B: Actions taken.
        log_prob_BH: Log-probabilities when they were taken.
        actor_BA: The actor's outputs then, or None where nothing needs them.
        critic_BQK: The critics' outputs then, or None where nothing needs them.
        advantage_B: Advantages.
        target_BZ: Samples of the return to predict, in the critics' frame.
    """

    mask_BM: Tensor | None
    action_B: Tensor
    log_prob_BH: Tensor
    actor_BA: Tensor | None
    critic_BQK: Tensor | None
    advantage_B: Tensor
    target_BZ: Tensor

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.advantage_B)

    def take(self, rows_B: Tensor) -> Rows:
        """Return the rows at ``rows_B``, in that order."""
        taken: dict[str, Any] = {name: None if value is None else value[rows_B] for name, value in vars(self).items()}
        return Rows(**taken)


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """The network's inputs, and the rows its outputs answer to.

    Attributes:
        observation: [B, D], or [L, G, D] with memory, sequences padded at the end.
        state_SCGW: The memory's state before each sequence, or None.
        places_B: Where the rows are in the flattened [L, G]; None: the rows are [B] themselves.
        rows: The rows.
    """

    observation: Tensor
    state_SCGW: Tensor | None
    places_B: Tensor | None
    rows: Rows

    @functools.cached_property
    def normalized_advantage_B(self) -> Tensor:
        """Advantages with mean 0 and deviation 1 over this minibatch."""
        return normalize_advantages(self.rows.advantage_B)


class Batches(Protocol):
    """A rollout that can be gone through any number of times."""

    def epoch(self, minibatch_size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield every row once, in an order drawn from ``generator``."""
        ...

    def whole(self) -> Minibatch:
        """Return all rows at once, in their order."""
        ...


def batches_of(rollout: Rollout, rows: Rows, sequence_steps: int | None) -> Batches:
    """Return the batches of a rollout; ``rows`` are its valid rows, step by step."""
    valid = torch.from_numpy(np.flatnonzero(rollout.valid_TN)).to(rollout.observation_TND.device)
    if rollout.state_TSCNW is not None:
        return SequenceBatches(rollout, rows, sequence_steps)
    observation_BD = rollout.observation_TND.flatten(0, 1)
    return RowBatches(observation_BD if rollout.valid_TN.all() else observation_BD[valid], rows)


class RowBatches:
    """Rows that do not depend on each other.

    Args:
        observation_BD: What the policy saw.
        rows: The rows.
    """

    def __init__(self, observation_BD: Tensor, rows: Rows) -> None:
        """Keep both, without a copy."""
        self._observation_BD, self._rows = observation_BD, rows
        self._whole = Minibatch(observation_BD, None, None, rows)

    def epoch(self, minibatch_size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield minibatches of equal size, as near to ``minibatch_size`` as can be."""
        parts = max(1, round(len(self._rows) / minibatch_size))
        if parts == 1:
            yield self.whole()  # a mean has no order
            return
        order = torch.randperm(len(self._rows), generator=generator).to(self._observation_BD.device)
        for chosen_B in order.tensor_split(parts):
            yield Minibatch(self._observation_BD[chosen_B], None, None, self._rows.take(chosen_B))

    def whole(self) -> Minibatch:
        """Return all rows."""
        return self._whole


class SequenceBatches:
    """Sequences of rows within one episode, each with the memory's state before it.

    Sequences are cut where episodes start, and every ``sequence_steps`` steps of the rollout where that is given. A minibatch
    sorts its sequences by length, pads them to the longest, and is one call of the memory; the loss never sees the padding.

    Args:
        rollout: Where observations and states are.
        rows: Its valid rows, step by step.
        sequence_steps: Longest sequence, or None.
    """

    def __init__(self, rollout: Rollout, rows: Rows, sequence_steps: int | None) -> None:
        """Find the sequences."""
        self._rollout, self._rows = rollout, rows
        self._first_G, self._env_G, self._length_G = find_sequences(rollout.start_TN, rollout.valid_TN, sequence_steps)
        self._row_of_TN = np.cumsum(rollout.valid_TN.ravel()).reshape(rollout.valid_TN.shape) - 1
        self._whole: Minibatch | None = None

    def epoch(self, minibatch_size: int, generator: torch.Generator) -> Iterator[Minibatch]:
        """Yield minibatches of whole sequences with about ``minibatch_size`` rows each."""
        parts = max(1, round(len(self._rows) / minibatch_size))
        if parts == 1:
            yield self.whole()
            return
        order_G = torch.randperm(len(self._first_G), generator=generator).numpy()
        middle_G = np.cumsum(self._length_G[order_G]) - self._length_G[order_G] / 2
        part_G = np.minimum((middle_G * parts / len(self._rows)).astype(int), parts - 1)
        for part in np.unique(part_G):
            yield self._minibatch(order_G[part_G == part])

    def whole(self) -> Minibatch:
        """Return all sequences; built once."""
        if self._whole is None:
            self._whole = self._minibatch(np.arange(len(self._first_G)))
        return self._whole

    def _minibatch(self, chosen_G: NDArray[np.intp]) -> Minibatch:
        chosen_G = chosen_G[np.argsort(-self._length_G[chosen_G], kind="stable")]
        first_G, env_G, length_G = self._first_G[chosen_G], self._env_G[chosen_G], self._length_G[chosen_G]
        offset_L1 = np.arange(length_G[0])[:, None]
        step_LG = first_G + np.minimum(offset_L1, length_G - 1)  # padding repeats the last row, so it is never garbage
        places_B = np.flatnonzero(offset_L1 < length_G)
        rows_B = self._row_of_TN[step_LG, env_G].ravel()[places_B]
        device = self._rollout.observation_TND.device
        step, env = torch.from_numpy(step_LG).to(device), torch.from_numpy(env_G).to(device)
        assert self._rollout.state_TSCNW is not None
        state_GSCW = self._rollout.state_TSCNW[torch.from_numpy(first_G).to(device), :, :, env]
        return Minibatch(
            observation=self._rollout.observation_TND[step, env],
            state_SCGW=state_GSCW.permute(1, 2, 0, 3),
            places_B=torch.from_numpy(places_B).to(device),
            rows=self._rows.take(torch.from_numpy(rows_B).to(device)),
        )


def find_sequences(
    start_TN: NDArray[np.bool_], valid_TN: NDArray[np.bool_], sequence_steps: int | None
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return the first step, the environment and the number of valid rows of each sequence.

    Example:
        >>> start = np.array([[True], [False], [True]])
        >>> find_sequences(start, np.ones_like(start), None)
        (array([0, 2]), array([0, 0]), array([2, 1]))
    """
    steps = len(start_TN)
    heads_TN = start_TN.copy()
    heads_TN[0] = True
    if sequence_steps is not None:
        heads_TN[::sequence_steps] = True
    env_G, first_G = np.nonzero(heads_TN.T)
    last_G = np.append(first_G[1:], steps)
    last_G[np.append(env_G[1:], -1) != env_G] = steps
    counted_TN = np.cumsum(np.vstack((np.zeros_like(valid_TN[:1], dtype=int), valid_TN)), axis=0)
    length_G = counted_TN[last_G, env_G] - counted_TN[first_G, env_G]
    kept_G = length_G > 0
    return first_G[kept_G], env_G[kept_G], length_G[kept_G]
