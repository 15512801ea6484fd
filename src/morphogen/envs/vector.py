"""Growing as a Gymnasium vector environment: N networks are trained, and an agent decides about their slots.

Legend: N environments, H choices of an action, D numbers of an observation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from morphogen import tasks
from morphogen.envs.config import GrowthEnvConfig, check_task
from morphogen.envs.debug import DebugStatistics
from morphogen.envs.episode import menu_of
from morphogen.envs.executors import make_executor
from morphogen.envs.executors.base import Beginning
from morphogen.envs.frames import Frames
from morphogen.envs.masks import action_masks, is_possible
from morphogen.envs.observation import observation_space, observe
from morphogen.envs.records import StepRecord
from morphogen.envs.rewards import Rewards, objective
from morphogen.errors import SlotError
from morphogen.governor.faults import Fault
from morphogen.tasks import Task

Floats = NDArray[np.float32]
_FINAL = ("metric", "test_metric", "parameters", "host_parameters", "relative_flops", "tick", "rolled_back")


class GrowthVectorEnv(VectorEnv[Floats, NDArray[np.int64], Any]):
    """N runs of a task, each an episode: a step executes an action, trains some batches, and measures.

    An episode is a whole run of the task; its end is terminal, as time is observed and what was reached is paid. So is a run
    that the governor had to rewind or to stop before a step that is not finite, and a network that cannot be trained on (it
    ran out of memory, say). The next episode then begins in the same step (``AutoresetMode.SAME_STEP``).

    An episode depends on task, config, the environment's seed, the number of the episode and the actions alone: not on N, on
    the place among the N, or on the executor.

    Actions are ``MultiDiscrete``, see :mod:`morphogen.envs.choices`; ``info["action_mask"]`` says which are possible, head by
    head, each head's mask for every choice of the head it hangs on (:func:`~morphogen.envs.masks.action_masks`);
    ``info["reward_terms"]`` what each term of the reward gave. Where an episode ended, ``info["final_info"]`` has what it came
    to: metric, parameters, compute over that of the host alone, ticks, its return, and as ``reason`` why it ended before its
    time, else "".

    Args:
        task: A task, or the name of one.
        num_envs: N.
        config: How; by default a ``GrowthEnvConfig`` with its defaults.
        **settings: Fields of the config to set otherwise, ``reward`` also by the name of a preset.

    Attributes:
        frames: What is known of each run now.
        menu: What the choices mean.

    Raises:
        ValueError: A setting is wrong, or the task does not fit it.

    Example:
        >>> env = GrowthVectorEnv("digits", num_envs=2, total_steps=4, tick_steps=2)
        >>> observation, info = env.reset(seed=0)
        >>> info["action_mask"]["op"].tolist()  # WAIT and GERMINATE
        [[True, True, False, False, False, False], [True, True, False, False, False, False]]
        >>> observation, reward, terminated, truncated, info = env.step(np.zeros((2, 8), dtype=int))
        >>> terminated.tolist()
        [False, False]
        >>> env.close()
    """

    def __init__(
        self, task: str | Task = "mnist1d", num_envs: int = 1, *, config: GrowthEnvConfig | None = None, **settings: Any
    ) -> None:
        """Check everything; nothing is built before the first reset."""
        if num_envs < 1:
            raise ValueError(f"`num_envs` must be at least 1, got {num_envs}. Each environment trains a network.")
        self.config = with_settings(config or GrowthEnvConfig(), settings)
        self.task = tasks.get(task) if isinstance(task, str) else task
        check_task(self.task, self.config)
        self.menu = menu_of(self.task, self.config)
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.single_action_space = self.menu.layout.action_space
        self.single_observation_space = observation_space(self.menu)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._executor = make_executor(self.task, self.config, num_envs)
        self._rewards = Rewards(self.config.reward, num_envs, self.config.num_slots)
        self._returns_N = np.zeros(num_envs)
        self._seeds: list[int] | None = None
        self._obstacle = "nothing was reset yet"  # why no step can be taken

    @property
    def frames(self) -> Frames:
        """What is known of each run now; views that the next step writes to."""
        return self._executor.now

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        """Begin the first episode of each environment.

        Args:
            seed: Of the environments: one each, or s for s, s + 1, ...; None draws them, at the second time those of before.
            options: ``inject``: environment -> faults for its first episode, each ``kind@step`` or ``kind@step+steps``; kinds
                are those of :mod:`morphogen.governor.faults`, steps are training steps.

        Raises:
            ValueError: The number of seeds is not N, an option is unknown, or a fault.
            WorkerDied: A worker could not start, or died again and again.
        """
        inject = self._injections(options or {})
        self._seeds = self._chosen_seeds(seed)
        beginnings = {row: Beginning(own, inject.get(row, ())) for row, own in enumerate(self._seeds)}
        with self._unfit_until_done("reset"):
            self._executor.reset(beginnings)
        self._returns_N[:] = 0.0
        self._rewards.forget(np.ones(self.num_envs, dtype=bool))
        return self._observation(), self._info()

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Execute an action in each environment, train up to the next decision, and say what came of it.

        Raises:
            SlotError: An action is masked; nothing was done in any environment.
            ValueError: The shape is not (N, 8), nothing was reset, or the last step did not come to its end.
            EnvironmentFault: An environment raised what training a network cannot be blamed for.
            WorkerDied: A worker died again and again. After either, reset or load a state.
        """
        choices_NH = self._checked(actions)
        before = self._executor.now.copy()
        with self._unfit_until_done("step"):
            ended_N = self._executor.step(choices_NH)
        record = StepRecord(
            before=before,
            after=self._executor.after.copy(),
            choices_NH=choices_NH,
            ended_N=ended_N,
            faulty_N=self._executor.after.run("rolled_back") == 1.0,
            gamma=self.config.reward.gamma,
        )
        reward_N, terms = self._rewards.pay(record)
        self._returns_N += objective(terms)
        info: dict[str, Any] = {"reward_terms": terms}
        if ended_N.any():
            info |= self._final_info(record)
            self._returns_N[ended_N] = 0.0
            self._rewards.forget(ended_N)
        return self._observation(), reward_N, ended_N, np.zeros(self.num_envs, dtype=bool), info | self._info()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that evolves as plain data: every network, its optimizer, slots, governor and random streams.

        Raises:
            ValueError: Nothing was reset, or the last step did not come to its end.
        """
        self._check_fit("state_dict")
        return {
            "episodes": self._executor.state_dict(),
            "seeds": self._seeds,
            "returns": self._returns_N.copy(),
            "rewards": self._rewards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, on a CPU bit-identically.

        Raises:
            ValueError: It is of another number of environments.
        """
        if len(state["episodes"]) != self.num_envs:
            raise ValueError(
                f"`num_envs` must be {len(state['episodes'])}, as in the saved state, got {self.num_envs}. Make as many."
            )
        with self._unfit_until_done("load_state_dict"):
            self._executor.load_state_dict(state["episodes"])
        self._seeds = list(state["seeds"])
        self._returns_N = np.array(state["returns"])
        self._rewards.load_state_dict(state["rewards"])

    def debug_statistics(self) -> list[DebugStatistics]:
        """Return for each network the norm of every parameter and of its gradient in the last training step.

        Where an episode has just begun there are no gradients yet. It costs a batched reduction for each network, and nothing
        where nobody asks.

        Raises:
            ValueError: Nothing was reset, or the last step did not come to its end.
        """
        self._check_fit("debug_statistics")
        return self._executor.debug()

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers."""
        self._executor.close()

    # -- parts ------------------------------------------------------------------------------------------------------

    def _observation(self) -> Floats:
        return observe(self._executor.now, self._rewards.ledger, self.menu)

    def _info(self) -> dict[str, Any]:
        return {"action_mask": action_masks(self._executor.now, self.menu)}

    def _final_info(self, record: StepRecord) -> dict[str, Any]:
        observation_ND = observe(record.after, self._rewards.ledger, self.menu)
        final = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(record.ended_N):
            final[row] = observation_ND[row]
        facts: dict[str, Any] = {name: record.after.run(name).copy() for name in _FINAL}
        facts["return"] = self._returns_N.copy()
        facts["reason"] = np.array([self._executor.reasons.get(row, "") for row in range(self.num_envs)], dtype=object)
        facts |= {f"_{name}": record.ended_N for name in list(facts)}
        return {"final_obs": final, "_final_obs": record.ended_N, "final_info": facts, "_final_info": record.ended_N}

    def _checked(self, actions: NDArray[np.int64]) -> NDArray[np.int64]:
        self._check_fit("step")
        choices_NH = np.array(actions, dtype=np.int64)
        sizes = np.array(self.menu.layout.sizes)
        if choices_NH.shape != (self.num_envs, len(sizes)) or ((choices_NH < 0) | (choices_NH >= sizes)).any():
            raise ValueError(
                f"`actions` must be of shape ({self.num_envs}, {len(sizes)}) and below {sizes.tolist()}, got "
                f"{choices_NH.tolist()}. Sample the action space under the mask."
            )
        masked = np.flatnonzero(~is_possible(choices_NH, self._executor.now, self.menu))
        if len(masked):
            row = int(masked[0])
            raise SlotError(
                f"environment {row}: the action {choices_NH[row].tolist()} must be one that `action_mask` allows, and is not. "
                "Ask the mask first."
            )
        return choices_NH

    def _check_fit(self, what: str) -> None:
        if self._obstacle:
            raise ValueError(
                f"the environments must be reset before `{what}`, as {self._obstacle}. Call reset or load a state."
            )

    @contextlib.contextmanager
    def _unfit_until_done(self, what: str) -> Generator[None]:
        """Let no step follow on a block that did not come to its end: some environments may be a step ahead of others."""
        self._obstacle = f"the last call of {what} did not come to its end"
        yield
        self._obstacle = ""

    def _chosen_seeds(self, seed: int | Sequence[int] | None) -> list[int]:
        if seed is None and self._seeds is not None:
            return self._seeds
        if seed is None:
            return [int(own) for own in np.random.SeedSequence().generate_state(self.num_envs)]
        if isinstance(seed, int | np.integer):
            return [int(seed) + row for row in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"`seed` must hold {self.num_envs} seeds, one for each environment, got {len(seed)}.")
        return [int(own) for own in seed]

    def _injections(self, options: Mapping[str, Any]) -> dict[int, tuple[str, ...]]:
        unknown = sorted(set(options) - {"inject"})
        if unknown:
            raise ValueError(f"`options` must have no key but `inject`, got {unknown[0]!r}. It would have no effect.")
        total_steps = self.config.total_steps or self.task.total_steps
        inject = {int(row): tuple(faults) for row, faults in options.get("inject", {}).items()}
        for row, faults in inject.items():
            if not 0 <= row < self.num_envs:
                raise ValueError(f"`inject` must name environments in [0, {self.num_envs}), got {row}. There is no such.")
            late = [fault for fault in faults if Fault.parse(fault).step >= total_steps]
            if late:
                raise ValueError(f"`inject` must be of steps in [0, {total_steps}), got {late[0]!r}. It would have no effect.")
        return inject


def with_settings(config: GrowthEnvConfig, settings: Mapping[str, Any]) -> GrowthEnvConfig:
    """Return ``config`` with fields set otherwise; ``reward`` may be the name of a preset."""
    values = dict(settings)
    if isinstance(values.get("reward"), str):
        values["reward"] = config.reward.replace(preset=values["reward"])
    return config.replace(**values)
