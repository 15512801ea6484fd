"""Any Gymnasium vector environment under one contract, whatever its autoreset mode, masks and observations.

Shape letters: N environments, D flat observation, M mask width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, final

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from morphogen.errors import EnvironmentFault, StateMismatch
from morphogen.rl.autoreset import AnyVectorEnv, handling_of, reset_options_for, state_holder, statistics_of
from morphogen.rl.episodes import EpisodeLog
from morphogen.rl.masks import MaskOf, MaskReader
from morphogen.rl.spaces import BoolArray, FloatArray, ObservationEncoder

Resumed: TypeAlias = Literal["replayed", "own_state", "fresh"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Episode:
    """An episode that ended.

    Attributes:
        env: Index of its environment.
        total_reward: Sum of its rewards, undiscounted and in float64.
        length: Its steps.
    """

    env: int
    total_reward: float
    length: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one vector step led to. All arrays are the receiver's own, but ``final_ND`` may be ``observation_ND``.

    Attributes:
        observation_ND: To act on next; of a new episode where one has ended (with filler rows: a step later).
        mask_NM: Actions allowed there, all True where no action will be taken; None if the environment has no masks.
        reward_N: Of the action, float32.
        terminated_N: The episode ended in a terminal state.
        truncated_N: The episode was cut off.
        valid_N: False where no action was taken: after a reset, and in filler rows.
        final_ND: What the action led to, before any reset; the same array as ``observation_ND`` if nothing was reset.
        start_N: The row of ``observation_ND`` is the first of an episode.
        episodes: Those that ended, by environment.
    """

    observation_ND: FloatArray
    mask_NM: BoolArray | None
    reward_N: FloatArray
    terminated_N: BoolArray
    truncated_N: BoolArray
    valid_N: BoolArray
    final_ND: FloatArray
    start_N: BoolArray
    episodes: tuple[Episode, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Ends:
    """A step in which episodes ended, as the environment gave it."""

    batch: Any
    infos: Mapping[str, Any]
    observation_ND: FloatArray
    ended_N: BoolArray
    rows: list[int]
    actions: NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Next:
    """Where it goes on after a step: what to act on, what the step led to, and the rows whose next step is filler."""

    observation_ND: FloatArray
    mask_NM: BoolArray | None
    final_ND: FloatArray
    start_N: BoolArray
    filler_N: BoolArray | None = None


def make_vector(env_id: str, num_envs: int, **kwargs: Any) -> AnyVectorEnv:
    """Return ``num_envs`` environments in one process that reset within the step that ends an episode.

    Args:
        env_id: A registered environment.
        num_envs: N, >= 1.
        kwargs: To each environment; ``wrappers`` is a sequence of functions applied to each.

    Example:
        >>> make_vector("CartPole-v1", 2).metadata["autoreset_mode"]
        <AutoresetMode.SAME_STEP: 'SameStep'>
    """
    if num_envs < 1:
        raise ValueError(f"`num_envs` must be >= 1, got {num_envs}. Ask for at least one environment.")
    options = {"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False}  # the stepper copies what it keeps
    return gym.make_vec(env_id, num_envs=num_envs, vectorization_mode="sync", vector_kwargs=options, **kwargs)


@final
class Stepper:
    """Steps a vector environment and tells what happened in one form, the same for every autoreset mode.

    Ended environments are reset at once: by themselves (SAME_STEP), or by ``reset(options={"reset_mask": ended})``
    (DISABLED, and NEXT_STEP where the environment is Gymnasium's own ``SyncVectorEnv`` or ``AsyncVectorEnv``, which honour
    the mask in every mode): the trajectories are identical. Other NEXT_STEP environments, and those under vector wrappers
    that keep count of episodes themselves, spend a step on the reset, in which the action is ignored: a filler row, which
    comes out with ``valid_N`` False, no reward and no end, whatever the environment says. A step in which every row would be
    filler is taken inside the step before.

    Sub-environments of a ``SyncVectorEnv`` are wrapped where they stand until :meth:`close` or :meth:`detach`.

    Args:
        env: Its ``metadata["autoreset_mode"]`` says how it resets.
        mask_of: Called with the masks as the environment gives them (bool [N, ...], or a dict of such by head) and N, it
            returns them as [N, M]. None if actions take no mask; one that returns None leaves them unused on purpose.

    Attributes:
        env: As given.
        num_envs: N.
        encoder: Of the observations.
        resumed: How :meth:`load_state_dict` went on: "replayed" (the episodes under way were played again to the same
            point), "own_state" (the environment saves its state itself), "fresh" (new episodes); None before.
        resumed_reason: Why it had to be "fresh"; else empty.

    Raises:
        ValueError: The autoreset mode is missing or unknown.
        TypeError: ``env`` is no vector environment, or observes something unsupported.

    Example:
        >>> stepper = Stepper(make_vector("CartPole-v1", 2))
        >>> step = stepper.reset(seed=0)
        >>> stepper.step(np.array([0, 1])).reward_N
        array([1., 1.], dtype=float32)
        >>> stepper.close()
    """

    def __init__(self, env: AnyVectorEnv, mask_of: MaskOf | None = None) -> None:
        self._after_ends = {
            "same step": self._after_same_step,
            "masked reset": self._after_masked_reset,
            "filler rows": self._before_filler_rows,
        }[handling_of(env)]
        self.env = env
        self.num_envs = env.num_envs
        self.encoder = ObservationEncoder(env.single_observation_space)
        self.resumed: Resumed | None = None
        self.resumed_reason = ""
        self._masks = MaskReader(self.encoder.has_mask, mask_of, self.num_envs)
        self._reset_options = reset_options_for(env)
        self._own_state, self._obstacle = state_holder(env)
        base = env.unwrapped
        self._log = EpisodeLog(base) if isinstance(base, SyncVectorEnv) else None
        self._keeps_actions = self._own_state is None and not self._obstacle
        self._current: Step | None = None
        self._unfit = ""  # why no step can be taken: set during each call, so that it stays when the call fails
        self._filler_N: BoolArray | None = None  # rows whose next step is filler
        self._total_reward_N = np.zeros(self.num_envs)
        self._length_N = np.zeros(self.num_envs, dtype=np.int64)
        self._num_steps = 0
        self._root_seed = 0

    def reset(self, seed: int | None = None) -> Step:
        """Begin new episodes everywhere; environment i is seeded with ``seed + i``, or not at all.

        Raises:
            EnvironmentFault: The environment raised, or its observation or mask is of no use.
            ValueError: The environment gives masks, but the actions take none.
        """
        self._unfit = "the environment has failed"
        batch, infos = self._call("reset", self.env.reset, seed=seed)
        self._masks.settle(infos)
        mask_NM = self._masks.read(batch, infos)
        observation_ND = self.encoder.encode(batch)
        none_N = np.zeros(self.num_envs, dtype=bool)
        self._filler_N = None
        self._total_reward_N = np.zeros(self.num_envs)
        self._length_N = np.zeros(self.num_envs, dtype=np.int64)
        self._num_steps = 0
        self._root_seed = seed if seed is not None else int(np.random.SeedSequence().generate_state(1)[0])
        if self._log is not None:
            self._log.begin(range(self.num_envs))
        self._current = Step(
            observation_ND=observation_ND,
            mask_NM=mask_NM,
            reward_N=np.zeros(self.num_envs, dtype=np.float32),
            terminated_N=none_N,
            truncated_N=none_N.copy(),
            valid_N=none_N.copy(),
            final_ND=observation_ND,
            start_N=~none_N,
            episodes=(),
        )
        self._unfit = ""
        return self._current

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one step in every environment.

        Args:
            actions: [N, ...] as the environment takes them; not kept.

        Raises:
            EnvironmentFault: The environment raised, or gave a reward, observation or mask that is of no use. What was
                before this step can still be saved.
            ValueError: There was no :meth:`reset`, or none after an :class:`EnvironmentFault`.
        """
        if self._current is None or self._unfit:
            why = self._unfit or "nothing was reset yet"
            raise ValueError(f"`step` must follow a reset, but {why}. Call reset or load_state_dict first.")
        kept = np.array(actions) if self._keeps_actions else None
        self._unfit = "the environment has failed"
        batch, reward, terminated, truncated, infos = self._call("step", self.env.step, actions)
        reward_N, terminated_N, truncated_N = self._outcome(reward, terminated, truncated)
        observation_ND = self.encoder.encode(batch)
        start_N = np.zeros(self.num_envs, dtype=bool) if self._filler_N is None else self._filler_N
        valid_N = ~start_N  # only a filler row begins an episode here
        total_N, length_N = self._total_reward_N + reward_N, self._length_N + valid_N
        ended_N = terminated_N | truncated_N
        episodes, rows, filler_N, final_ND = (), [], None, observation_ND
        if np.count_nonzero(ended_N):
            rows = ended_N.nonzero()[0].tolist()
            after = self._after_ends(_Ends(batch, infos, observation_ND, ended_N, rows, actions))
            observation_ND, mask_NM, final_ND, filler_N = after.observation_ND, after.mask_NM, after.final_ND, after.filler_N
            start_N = start_N | after.start_N
            episodes = tuple(Episode(row, float(total_N[row]), int(length_N[row])) for row in rows)
            for row in rows:  # a list of few is dear as an index
                total_N[row], length_N[row] = 0.0, 0
        else:
            mask_NM = self._masks.read(batch, infos)
        reward_N = reward_N.astype(np.float32)
        self._current = Step(observation_ND, mask_NM, reward_N, terminated_N, truncated_N, valid_N, final_ND, start_N, episodes)
        self._total_reward_N, self._length_N, self._filler_N = total_N, length_N, filler_N
        self._num_steps += 1
        if kept is not None:
            self._record(kept, rows)
        self._unfit = ""
        return self._current

    def detach(self) -> None:
        """Leave the environment as it was given, open; this stepper is of no use afterwards."""
        if self._log is not None:
            self._log.detach()
        self._unfit = "the stepper was detached"

    def close(self) -> None:
        """Detach from the environment and close it."""
        self.detach()
        self.env.close()

    # -- parts of a step --------------------------------------------------------------------------------------------

    def _call(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # border: an environment may raise anything, and the learner must outlive it
            env = self._culprit(error)
            who = "the environments" if env is None else f"environment {env}"
            raise EnvironmentFault(
                f"{who} raised {type(error).__name__} in {what} after {self._num_steps:,} steps: {error}\n"
                "The learner's state is whole: save it, repair the environment, load it and go on.",
                env,
            ) from error

    def _culprit(self, error: Exception) -> int | None:
        """Return the index of the sub-environment that raised, if that can be known."""
        if isinstance(error, EnvironmentFault):
            return error.env_index
        base = self.env.unwrapped
        if isinstance(base, AsyncVectorEnv):
            pipes = cast("list[Any]", base.parent_pipes)
            return pipes.index(None) if None in pipes else None  # it shuts down a worker that raised
        return None if self._log is None else self._log.culprit(error)

    def _outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[NDArray[np.float64], BoolArray, BoolArray]:
        """Return rewards and ends as arrays of this stepper's own; those of filler rows are cleared."""
        reward_N = np.array(reward, dtype=np.float64)
        terminated_N, truncated_N = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        if self._filler_N is not None:
            reward_N = np.where(self._filler_N, 0.0, reward_N)
            terminated_N &= ~self._filler_N
            truncated_N &= ~self._filler_N
        usable_N = np.abs(reward_N) <= _LARGEST
        if np.count_nonzero(usable_N) != self.num_envs:
            env = int(np.argmin(usable_N))
            raise EnvironmentFault(
                f"environment {env}: its reward must be finite as float32, got {reward_N[env]}. Repair the environment.", env
            )
        return reward_N, terminated_N, truncated_N

    def _record(self, kept: NDArray[Any], begun: Sequence[int]) -> None:
        assert self._log is not None
        self._log.append(kept)
        if begun:
            self._log.begin(begun)

    def _after_same_step(self, ends: _Ends) -> _Next:
        rows = ends.rows
        final = ends.infos.get("final_obs")
        final_ND = ends.observation_ND.copy()
        if isinstance(final, np.ndarray) and final.dtype == object:
            missing = [row for row in rows if final[row] is None]
            if not missing:
                encoded = self.encoder.encode_rows([final[row] for row in rows], rows)
                for row, encoded_D in zip(rows, encoded, strict=True):
                    final_ND[row] = encoded_D
        else:
            missing = rows if final is None else []
            if not missing:
                final_ND[rows] = self.encoder.encode(final)[rows]
        if missing:
            raise EnvironmentFault(
                f"environment {missing[0]}: an episode that ends in SAME_STEP mode must leave its last observation in "
                '`infos["final_obs"]`, found none. Return it from step.',
                missing[0],
            )
        return _Next(ends.observation_ND, self._masks.read(ends.batch, ends.infos), final_ND, ends.ended_N)

    def _after_masked_reset(self, ends: _Ends) -> _Next:
        goes_on_N = ~ends.ended_N
        mask_NM = self._masks.read(ends.batch, ends.infos, goes_on_N) if len(ends.rows) < self.num_envs else None
        batch, infos = self._call("reset", self.env.reset, options=self._reset_options(ends.ended_N.copy()))
        ended_N1 = ends.ended_N[:, None]
        observation_ND = np.where(ended_N1, self.encoder.encode(batch), ends.observation_ND)
        begun_NM = self._masks.read(batch, infos, ends.ended_N)
        if mask_NM is not None and begun_NM is not None:
            begun_NM = np.where(ended_N1, begun_NM, mask_NM)
        return _Next(observation_ND, begun_NM, ends.observation_ND, ends.ended_N)

    def _before_filler_rows(self, ends: _Ends) -> _Next:
        if len(ends.rows) < self.num_envs:
            mask_NM = self._masks.read(ends.batch, ends.infos, ~ends.ended_N)
            return _Next(ends.observation_ND, mask_NM, ends.observation_ND, np.zeros_like(ends.ended_N), ends.ended_N.copy())
        batch, _, _, _, infos = self._call("step", self.env.step, ends.actions)
        return _Next(self.encoder.encode(batch), self._masks.read(batch, infos), ends.observation_ND, ends.ended_N)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the environments are, as plain data that aliases nothing here.

        After an :class:`EnvironmentFault` this is the state before the step that failed, unless the environment saves its
        state itself: that is lost then.

        Raises:
            ValueError: Nothing was reset yet.
        """
        if self._current is None:
            raise ValueError("`state_dict` must follow a reset, but nothing was reset yet. Call reset first.")
        episodes, own_state, reason = None, None, self._obstacle
        if self._log is not None and self._keeps_actions:
            episodes = self._log.state_dict(settled=not self._unfit)
            reason = "" if episodes else "an environment has no NumPy generator whose state could be saved"
        elif self._own_state is not None:
            own_state = None if self._unfit else copy.deepcopy(self._own_state.state_dict())
            reason = self._unfit and f"when it was saved, {self._unfit}"
        return {
            "observation_ND": self._current.observation_ND.copy(),
            "mask_NM": None if self._current.mask_NM is None else self._current.mask_NM.copy(),
            "start_N": self._current.start_N.copy(),
            "filler_N": None if self._filler_N is None else self._filler_N.copy(),
            "total_reward_N": self._total_reward_N.copy(),
            "length_N": self._length_N.copy(),
            "num_steps": self._num_steps,
            "root_seed": self._root_seed,
            "environment": own_state,
            "episodes": episodes,
            "reason": reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> Step:
        """Go on from ``state``, and return the step to act on; :attr:`resumed` says how.

        An environment that saves its own state loads it. A ``SyncVectorEnv`` plays the episodes under way again, from the
        state of its random generators at their beginning; if observations, rewards and generators agree with the saved ones
        in every bit, it goes on as if never interrupted. Where neither is possible new episodes begin, from a seed that
        depends on the state alone, and :attr:`resumed_reason` says why. What wrappers around single environments remember
        across episodes is not part of it.

        Raises:
            StateMismatch: ``state`` is of another number of environments or width of observation. Nothing was changed.
            EnvironmentFault: An environment raised.
        """
        shape = tuple(np.shape(state["observation_ND"]))
        if shape != (self.num_envs, self.encoder.width):
            raise StateMismatch(
                f"the saved observations must be of {self.num_envs} environments with {self.encoder.width} entries, got "
                f"{shape[0]} with {shape[1]}. Build the same environments as before, or begin anew with reset."
            )
        how, reason = self._resume(state)
        if how != "fresh":
            self._restore(state)
        else:
            self.reset(int(np.random.SeedSequence([state["root_seed"], state["num_steps"]]).generate_state(1)[0]))
        self.resumed, self.resumed_reason = how, reason
        assert self._current is not None
        return self._current

    def _resume(self, state: dict[str, Any]) -> tuple[Resumed, str]:
        """Bring the environments to where they were, and say how; if "fresh" they are anywhere."""
        if state["environment"] is not None:
            if self._own_state is None:
                return "fresh", "the environment saves no state any more"
            self.reset()
            self._call("load_state_dict", self._own_state.load_state_dict, state["environment"])
            return "own_state", ""
        if state["episodes"] is None or not self._keeps_actions:
            return "fresh", state["reason"] or self._obstacle or "the state was saved by another kind of environment"
        self.reset()  # clears what the vector remembers of episodes that had ended
        for row in range(self.num_envs):
            problem = self._replay(row, state)
            if problem:
                return "fresh", f"environment {row} did not repeat its episode: {problem}"
        return "replayed", ""

    def _replay(self, row: int, state: dict[str, Any]) -> str:
        assert self._log is not None
        replayed = self._call("the replay of an episode", self._log.replay, row, state["episodes"][row])
        if replayed.problem:
            return replayed.problem
        if not np.array_equal(self.encoder.encode_rows([replayed.observation], [row])[0], state["observation_ND"][row]):
            return "its observation differs"
        return "" if replayed.total_reward == float(state["total_reward_N"][row]) else "its rewards differ"

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what this stepper itself knew, the environments being there again."""
        assert self._current is not None
        if self._log is not None and state["episodes"] is not None:
            self._log.resume(state["episodes"])
        self._total_reward_N, self._length_N = state["total_reward_N"].copy(), state["length_N"].copy()
        self._filler_N = None if state["filler_N"] is None else state["filler_N"].copy()
        self._num_steps, self._root_seed = state["num_steps"], state["root_seed"]
        for layer in statistics_of(self.env):
            layer.episode_returns, layer.episode_lengths = self._total_reward_N.copy(), self._length_N.copy()
        observation_ND = state["observation_ND"].copy()
        self._current = dataclasses.replace(
            self._current,
            observation_ND=observation_ND,
            mask_NM=None if state["mask_NM"] is None else state["mask_NM"].copy(),
            final_ND=observation_ND,
            start_N=state["start_N"].copy(),
        )
