"""Episodes under way as data: what began them and what was done since, so that they can be played again to the same point.

Shape letters: N environments, L steps since an episode began.
"""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Iterable
from typing import Any, TypeAlias, final

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray

ActionArray: TypeAlias = NDArray[Any]
RandomState: TypeAlias = "dict[str, Any] | None"


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What an episode began with.

    Attributes:
        seed: As given to ``reset``.
        options: As given to ``reset``; None also for empty ones.
        random_state: The state of the environment's ``np_random`` before a reset without a seed; None if a seed was given,
            or if the environment has no NumPy generator.
    """

    seed: int | None
    options: dict[str, Any] | None
    random_state: RandomState


@final
class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that remembers how its episode began.

    Attributes:
        beginning: Of the episode under way; None before the first reset.

    Example:
        >>> env = EpisodeRecorder(gym.make("CartPole-v1"))
        >>> _ = env.reset(seed=3)
        >>> env.beginning
        Beginning(seed=3, options=None, random_state=None)
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.step = env.step  # one call less in each step
        self._base = env.unwrapped
        self.beginning: Beginning | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment, remembering what is needed to do the same again."""
        state = None if seed is not None else read_random_state(self._base)
        self.beginning = Beginning(seed, copy.deepcopy(options) if options else None, state)
        return self.env.reset(seed=seed, options=options)


def read_random_state(env: gym.Env[Any, Any]) -> RandomState:
    """Return a copy of the state of the environment's ``np_random``, or None if it is no NumPy generator."""
    generator = env.unwrapped.np_random
    return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None  # pyright: ignore[reportUnnecessaryIsInstance]


def write_random_state(env: gym.Env[Any, Any], state: dict[str, Any]) -> bool:
    """Give the environment's ``np_random`` a state; False if its generator is of another kind than the state's."""
    own = read_random_state(env)
    if own is None or own["bit_generator"] != state["bit_generator"]:
        return False
    env.unwrapped.np_random.bit_generator.state = state
    return True


@dataclasses.dataclass(frozen=True)
class Replayed:
    """Where the playing again of one episode led.

    Attributes:
        observation: The last one.
        total_reward: Sum of the rewards, in the order of the steps.
        problem: Why this cannot be the saved episode; empty if nothing speaks against it.
    """

    observation: Any
    total_reward: float
    problem: str = ""


@final
class EpisodeLog:
    """Records the episodes under way in every sub-environment of a ``SyncVectorEnv``, and plays them again.

    Each sub-environment is wrapped where it stands by an :class:`EpisodeRecorder`; :meth:`detach` puts the originals back.
    The actions are kept by the vector, one array a step, back to the beginning of the oldest episode under way.

    Args:
        env: Its list ``envs`` is replaced.
    """

    def __init__(self, env: SyncVectorEnv[Any, Any]) -> None:
        self._env = env
        self._originals = env.envs
        self._recorders = [EpisodeRecorder(sub_env) for sub_env in env.envs]
        env.envs = [*self._recorders]
        self._beginnings: list[Beginning | None] = [None] * len(self._recorders)
        self._first_steps = [0] * len(self._recorders)  # of each episode, counted from the first step ever kept
        self._actions: list[ActionArray] = []
        self._num_dropped = 0

    def detach(self) -> None:
        """Put the sub-environments back as they were before this log."""
        self._env.envs = self._originals

    def culprit(self, error: BaseException) -> int | None:
        """Return the index of the environment inside which ``error`` was raised; None if it was in none of them."""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for index, env in enumerate(self._originals):
                if frame.f_locals.get("self") is env:
                    return index
        return None

    def append(self, actions: ActionArray) -> None:
        """Keep the actions [N, ...] of one vector step; the array becomes the log's."""
        self._actions.append(actions)

    def begin(self, rows: Iterable[int]) -> None:
        """Take note that these environments have begun an episode."""
        now = self._num_dropped + len(self._actions)
        for row in rows:
            self._beginnings[row] = self._recorders[row].beginning
            self._first_steps[row] = now
        unused = min(self._first_steps) - self._num_dropped
        if 2 * unused >= len(self._actions):  # dropping is then cheaper than what filled it
            del self._actions[:unused]
            self._num_dropped += unused

    def state_dict(self, settled: bool = True) -> list[dict[str, Any]] | None:
        """Return what :meth:`replay` needs for each environment as plain data, or None if it cannot be enough.

        Args:
            settled: Whether the environments stand where the kept actions led; False after a step that failed.
        """
        episodes: list[dict[str, Any]] = []
        for row, beginning in enumerate(self._beginnings):
            if beginning is None or (beginning.seed is None and beginning.random_state is None):
                return None
            actions = [batch[row] for batch in self._actions[self._first_steps[row] - self._num_dropped :]]
            episodes.append(
                {
                    **dataclasses.asdict(beginning),
                    "actions": np.array(actions),
                    "random_state_now": read_random_state(self._recorders[row]) if settled else None,
                }
            )
        return episodes

    def replay(self, row: int, episode: dict[str, Any]) -> Replayed:
        """Reset environment ``row`` as the episode began and repeat its actions."""
        env = self._recorders[row]
        state = episode["random_state"]
        if state is not None and not write_random_state(env, state):
            return Replayed(None, 0.0, "its random generator is of another kind")
        observation, _ = env.reset(seed=episode["seed"], options=copy.deepcopy(episode["options"]))
        total_reward = 0.0
        for done, action in enumerate(episode["actions"], start=1):
            observation, reward, terminated, truncated, _ = env.step(action)
            total_reward += float(reward)
            if terminated or truncated:
                return Replayed(observation, total_reward, f"it ended at step {done} of {len(episode['actions'])}")
        now = episode["random_state_now"]
        if now is not None and not _equal(read_random_state(env), now):
            return Replayed(observation, total_reward, "it drew other random numbers")
        return Replayed(observation, total_reward)

    def resume(self, episodes: list[dict[str, Any]]) -> None:
        """Go on recording from episodes that were replayed."""
        lengths = [len(episode["actions"]) for episode in episodes]
        longest = max(lengths)
        self._num_dropped = 0
        self._first_steps = [longest - length for length in lengths]
        self._beginnings = [Beginning(**{key: episode[key] for key in _BEGINNING}) for episode in episodes]
        self._actions = []
        if longest:
            example = episodes[lengths.index(longest)]["actions"]
            actions_LN = np.zeros((longest, len(episodes), *example.shape[1:]), dtype=example.dtype)
            for row, episode in enumerate(episodes):
                if lengths[row]:
                    actions_LN[longest - lengths[row] :, row] = episode["actions"]
            self._actions = list(actions_LN)


_BEGINNING = tuple(field.name for field in dataclasses.fields(Beginning))


def _equal(one: Any, other: Any) -> bool:
    """Whether two states of generators agree; some hold arrays."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other))
