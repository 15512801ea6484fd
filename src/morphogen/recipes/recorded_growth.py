"""Growth environments that keep what finished episodes came to, which an agent that learns in them does not look at.

Legend: N environments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from morphogen.control import Op
from morphogen.envs.frames import FloatArray
from morphogen.envs.vector import Floats, GrowthVectorEnv


@dataclasses.dataclass(frozen=True)
class FinishedEpisode:
    """What an episode came to.

    Attributes:
        env: Place of its environment.
        ticks: Decisions.
        total_reward: Undiscounted.
        metric: At its end, on the decision split.
        parameters: Of the network then.
        relative_flops: Training so far, over the FLOPs of the host alone.
        rolled_back: Whether the governor ended it.
        terms: What each term of the reward gave, summed over the episode.
        ops: How often each op was chosen.
    """

    env: int
    ticks: int
    total_reward: float
    metric: float
    parameters: int
    relative_flops: float
    rolled_back: bool
    terms: dict[str, float]
    ops: dict[str, int]


class RecordedGrowth(GrowthVectorEnv):
    """A :class:`~morphogen.envs.GrowthVectorEnv` that keeps its finished episodes until they are taken.

    No wrapper, so that whoever saves the environments' state finds it here, sums of episodes under way included.

    Example:
        >>> env = RecordedGrowth("digits", num_envs=1, total_steps=2, tick_steps=2)
        >>> _ = env.reset(seed=0)
        >>> _ = env.step(np.zeros((1, 8), dtype=int))
        >>> [episode.ops["wait"] for episode in env.take_finished()], env.take_finished()
        ([1], ())
    """

    _terms: dict[str, FloatArray]
    _ops: NDArray[np.int64]
    _finished: list[FinishedEpisode]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Begin the first episode of each environment, and forget those before."""
        begun = super().reset(seed=seed, options=options)
        self._terms, self._finished = {}, []
        self._ops = np.zeros((self.num_envs, len(Op)), dtype=np.int64)
        return begun

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Step, and keep the episodes that ended."""
        given = super().step(actions)
        info = given[-1]
        self._ops[np.arange(self.num_envs), np.asarray(actions)[:, 0]] += 1
        for name, value_N in info["reward_terms"].items():
            self._terms[name] = self._terms.get(name, np.zeros(self.num_envs)) + value_N
        if "final_info" in info:
            ended_N = info["_final_info"]
            self._finished += [self._came_to(int(row), info["final_info"]) for row in np.flatnonzero(ended_N)]
            self._ops[ended_N] = 0
            for sum_N in self._terms.values():
                sum_N[ended_N] = 0.0
        return given

    def take_finished(self) -> tuple[FinishedEpisode, ...]:
        """Return the episodes that ended since the last call, and keep them no longer."""
        finished, self._finished = tuple(self._finished), []
        return finished

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves as plain data."""
        sums = {"terms": {name: sum_N.copy() for name, sum_N in self._terms.items()}, "ops": self._ops.copy()}
        return {**super().state_dict(), **sums, "finished": [dataclasses.asdict(episode) for episode in self._finished]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on a CPU bit-identically.

        Raises:
            ValueError: It is of another number of environments.
        """
        super().load_state_dict(state)
        self._terms = {name: np.array(sum_N) for name, sum_N in state["terms"].items()}
        self._ops = np.array(state["ops"])
        self._finished = [FinishedEpisode(**episode) for episode in state["finished"]]

    def _came_to(self, row: int, facts: Mapping[str, Any]) -> FinishedEpisode:
        return FinishedEpisode(
            env=row,
            ticks=int(facts["tick"][row]),
            total_reward=float(facts["return"][row]),
            metric=float(facts["metric"][row]),
            parameters=int(facts["parameters"][row]),
            relative_flops=float(facts["relative_flops"][row]),
            rolled_back=bool(facts["rolled_back"][row]),
            terms={name: float(sum_N[row]) for name, sum_N in self._terms.items()},
            ops={op.name.lower(): int(self._ops[row, op]) for op in Op},
        )
