"""Growth environments in small, played by actions that depend on an environment's own seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.masks import sample_choices

Arrays = dict[str, NDArray[Any]]


class Game:
    """Plays an environment on; what comes of it, as arrays [T, N, ...] by name."""

    def __init__(self, env: GrowthVectorEnv, info: dict[str, Any], seeds: Sequence[int]) -> None:
        self.env, self.info = env, info
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def actions(self) -> NDArray[np.int64]:
        masks = self.info["action_mask"]
        rows = ({head: mask[[row]] for head, mask in masks.items()} for row in range(self.env.num_envs))
        return np.concatenate([sample_choices(mask, chance) for mask, chance in zip(rows, self.generators, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        generators = [chance.bit_generator.state for chance in self.generators]
        return {"env": self.env.state_dict(), "info": self.info, "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.info = state["info"]
        for chance, saved in zip(self.generators, state["generators"], strict=True):
            chance.bit_generator.state = saved

    def play(self, num_steps: int) -> Arrays:
        played: list[Arrays] = []
        for _ in range(num_steps):
            action = self.actions()
            observation, reward, terminated, _, self.info = self.env.step(action)
            frames = self.env.frames.copy()
            new = {"action": action, "observation": observation, "reward": reward, "terminated": terminated}
            played.append(new | {"runs": frames.runs_NG, "slots": frames.slots_NSR})
        return {name: np.stack([step[name] for step in played]) for name in played[0]}


@pytest.fixture(scope="session")
def game_on() -> Callable[..., Game]:
    """Begin to play an environment, by default with the seeds 0, 1, ..."""

    def begun(env: GrowthVectorEnv, seeds: Sequence[int] | None = None, inject: Any = None) -> Game:
        chosen = list(range(env.num_envs)) if seeds is None else list(seeds)
        _, info = env.reset(seed=chosen, options={"inject": inject} if inject else None)
        return Game(env, info, chosen)

    return begun


@pytest.fixture
def begin(game_on: Callable[..., Game]) -> Iterator[Callable[..., Game]]:
    """Make an environment for digits, three ticks of two steps an episode, and begin; all are closed in the end."""
    made: list[GrowthVectorEnv] = []

    def make(num_envs: int = 2, *, seeds: Sequence[int] | None = None, inject: Any = None, **settings: Any) -> Game:
        env = GrowthVectorEnv("digits", num_envs, **{"total_steps": 6, "tick_steps": 2, **settings})
        made.append(env)
        return game_on(env, seeds, inject)

    yield make
    for env in made:
        env.close()


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Assert that what was played is the same in every bit; of some rows, where they are given."""

    def check(left: Arrays, right: Arrays, left_rows: Any = slice(None), right_rows: Any = slice(None)) -> None:
        for name, values in left.items():
            np.testing.assert_array_equal(values[:, left_rows], right[name][:, right_rows], err_msg=name, strict=True)

    return check
