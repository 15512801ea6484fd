"""PPO: an agent, its environments, and everything that training it changes, as one run.

for each update:   collect a rollout with the present policy
                   estimate advantages and targets
                   several epochs of minibatches
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from morphogen.errors import CheckpointError
from morphogen.rl import evaluation, parameters, prediction
from morphogen.rl.advantages import explained_variance
from morphogen.rl.assembly import assemble
from morphogen.rl.config import STRUCTURAL, PPOConfig
from morphogen.rl.events import EpisodesRestarted, Updated
from morphogen.rl.experience import digest, lowest_value
from morphogen.rl.minibatches import Batches, batches_of
from morphogen.rl.parameters import ParametersReport
from morphogen.rl.policy import ActorCritic
from morphogen.rl.rollout import Collector
from morphogen.rl.update import Hyperparameters, Updater, UpdateResult
from morphogen.rl.vector import make_vector
from morphogen.state import Snapshot, TrainingState, checkpoint
from morphogen.state.surgery import set_learning_rate
from morphogen.state.training_state import AdoptStrategy
from morphogen.telemetry.events import Emit, discard

Callback = Callable[["PPO", Updated], bool | None]
_LOG = logging.getLogger("morphogen.rl")


@dataclasses.dataclass
class Progress:
    """How far training has come.

    Attributes:
        num_steps: Environment steps, over all environments.
        num_updates: Updates.
    """

    num_steps: int = 0
    num_updates: int = 0

    def state_dict(self) -> dict[str, int]:
        """Return both counts."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Set both counts."""
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]


class PPO:
    """Proximal policy optimisation (Schulman et al. 2017) for any Gymnasium vector environment.

    Args:
        env: A vector environment in any autoreset mode, or an id, of which ``config.num_envs`` are then made.
        config: How to train; ``reconfigure`` changes what is live in it.
        emit: Receives an ``Updated`` event after each update.

    Attributes:
        config: The one copy of every setting: what is in it is what the next update uses.
        policy: The network and its action distribution.
        state: The whole run: policy, optimizer, normalisers, controllers, random streams, environments.
        env: The vector environment.

    Raises:
        ValueError: The configuration does not fit the environment's spaces; the message names the setting.
        TypeError: ``env`` is no vector environment and no id.

    Example:
        >>> agent = PPO("CartPole-v1", PPOConfig(num_envs=2, rollout_steps=32, epochs=1))
        >>> agent.learn(128).num_steps
        128
    """

    def __init__(self, env: str | VectorEnv[Any, Any, Any], config: PPOConfig | None = None, *, emit: Emit = discard) -> None:
        """Build everything under the config's seed; no environment is touched yet."""
        config = _checked(env, config)
        self.env_id = env if isinstance(env, str) else None
        self.env: VectorEnv[Any, Any, Any] = make_vector(env, config.num_envs) if isinstance(env, str) else env
        self.config = _with_num_envs(config, self.env.num_envs)
        self._emit = emit
        self._parts = parts = assemble(self.env, self.config)
        self.policy: ActorCritic = parts.policy
        self.progress = Progress()
        self._collector = Collector(parts)
        self._updater = Updater(parts, self.config)
        travelling = {**parts.travelling(), "progress": self.progress}
        extras = {**travelling, **parts.chance(), "collector": self._collector}
        self.state = TrainingState(self.policy, parts.optimizer, scaler=parts.scaler, extras=extras, emit=emit)
        self._portable = parameters.Portable(self.policy, parts.optimizer, travelling, emit)
        self._horizon_steps = 0

    @property
    def num_steps(self) -> int:
        """Environment steps so far, over all environments."""
        return self.progress.num_steps

    @property
    def num_envs(self) -> int:
        """Environments that are stepped together."""
        return self.env.num_envs

    @property
    def recent_returns(self) -> tuple[float, ...]:
        """Returns of the last episodes in training, at most 100, latest last."""
        return tuple(self._collector.recent_returns)

    @property
    def num_episodes(self) -> int:
        """Episodes that ended in training."""
        return self._collector.num_episodes

    @property
    def memory_state(self) -> Tensor | None:
        """The memory's state in training, [parts, towers, num_envs, width]; None without memory."""
        return self._collector.memory_state

    def learn(self, total_steps: int, callback: Callback | None = None) -> Self:
        """Train for at least ``total_steps`` further environment steps, whole rollouts at a time; returns the agent.

        Args:
            total_steps: Steps over all environments, > 0.
            callback: Called with the agent and its ``Updated`` event after each update; False stops.

        Raises:
            EnvironmentFault: An environment failed. Policy and optimizer are as after the last update: save, repair, go on.
            UpdateDiverged: Three minibatches in a row were not finite; none of them changed anything.
            RuntimeError: Called within ``torch.inference_mode()``.
        """
        if total_steps < 1:
            raise ValueError(f"`total_steps` must be at least 1, got {total_steps}. It counts the steps of this call.")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "`learn` must run outside torch.inference_mode(): its tensors cannot be learned from. Leave the mode first."
            )
        target = self.num_steps + total_steps
        self._horizon_steps = self.config.schedule_steps or target
        with _threads(self.config.num_threads):
            while self.num_steps < target:
                event = self._improve()
                self._emit(event)
                if callback is not None and callback(self, event) is False:
                    break
        return self

    def predict(
        self,
        observation: Any,
        state: Tensor | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_mask: object = None,
    ) -> tuple[Any, Tensor | None]:
        """Return the action for one observation or a batch, and the memory's state afterwards.

        Args:
            observation: As from the environment or the vector environment; it is normalised here, and changes no statistics.
            state: What the last call returned; None at the beginning.
            episode_start: For each row, whether it is the first of an episode: its memory is forgotten first.
            deterministic: The most probable action instead of a drawn one; draws never touch the streams of training.
            action_mask: In any form the environment gives it; observations with an "action_mask" key carry their own.

        Raises:
            ValueError: The observation or mask does not fit, or the policy needs a mask and got none.
        """
        return prediction.predict(
            self._predictor(), observation, state, episode_start, deterministic=deterministic, action_mask=action_mask
        )

    def evaluate(
        self,
        episodes: int = 10,
        env: str | VectorEnv[Any, Any, Any] | None = None,
        *,
        deterministic: bool = True,
        seed: int = 0,
    ) -> evaluation.EvaluationResult:
        """Play whole episodes with everything frozen; training goes on as if this had not happened.

        Args:
            episodes: How many, shared out evenly over the environments so that short ones are not favoured.
            env: Where; by default new environments like those of training.
            deterministic: Take the most probable actions.
            seed: Of the environments and of drawn actions.

        Raises:
            ValueError: There is no id to make new environments from. Pass ``env``.
        """
        where = env or self.env_id or evaluation.id_of(self.env)
        vector = make_vector(where, min(episodes, 8)) if isinstance(where, str) else where
        try:
            with _threads(self.config.num_threads):
                return evaluation.evaluate(self._predictor(), vector, episodes, deterministic=deterministic, seed=seed)
        finally:
            if vector is not env:
                vector.close()

    def reconfigure(self, **hyperparameters: Any) -> None:
        """Change live settings by name; the next rollout and update use them, and nothing puts the old ones back.

        Raises:
            ValueError: A name is unknown or structural, or a value wrong; nothing was changed.
        """
        fixed = sorted(STRUCTURAL & hyperparameters.keys())
        if fixed:
            raise ValueError(
                f"`{fixed[0]}` must stay as it was built, got {hyperparameters[fixed[0]]!r}. Make a new PPO with it."
            )
        config = self.config.replace(**hyperparameters)
        if (config.kl_penalty is None) != (self._parts.kl_penalty is None):
            raise ValueError("`kl_penalty` must stay on or off as it was built. Make a new PPO, or set its coefficient.")
        now = Hyperparameters.at(config, min(1.0, self.num_steps / max(1, config.schedule_steps or self._horizon_steps)))
        if self._parts.kl_penalty is not None and config.kl_penalty is not None:
            self._parts.kl_penalty.reconfigure(config.kl_penalty)
        set_learning_rate(self._parts.optimizer, now.learning_rate)
        self.config = config

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        """Return copies of all that another agent needs to take over: policy, normalisers, controllers, progress.

        Format ``v2_full_parameters``; see :mod:`morphogen.rl.parameters`. Hyperparameters, chance and environments stay here.

        Args:
            include_optimizer: Adam's moments as well.
        """
        return self._portable.read(include_optimizer=include_optimizer)

    def set_parameters(self, values: Mapping[str, Any]) -> ParametersReport:
        """Take over what ``get_parameters`` of another agent returned, its ``v1_policy_only`` form, or bare policy weights.

        Own hyperparameters, schedules, chance and environments stay. What ``values`` lack is reset: moments, normalisers,
        controllers; the memory's state always is.

        Returns:
            What was loaded, reset and kept, by name.

        Raises:
            StateMismatch: Something does not fit; nothing was changed.
        """
        report = self._portable.write(values)
        self._collector.forget()
        return report

    def portable_snapshot(self) -> Snapshot:
        """Return what travels, moments included, as a snapshot; see :meth:`adopt`."""
        return self._portable.state.capture(reuse=False)

    def adopt(self, snapshot: Snapshot, optimizer: AdoptStrategy = "reset", *, seed: int | None = None) -> None:
        """Take over another agent's ``portable_snapshot``: weights, normalisers, controllers, progress; moments as told.

        Hyperparameters and schedules stay this agent's; the memory's state is reset.

        Args:
            snapshot: Of an agent with the same parts; not changed.
            optimizer: As in :meth:`morphogen.state.TrainingState.adopt`.
            seed: Of all streams and new episodes from now on; None: streams and episodes under way stay.

        Raises:
            StateMismatch: Something does not fit; nothing was changed.
        """
        self._portable.state.adopt(snapshot, optimizer)
        self._collector.forget()
        if seed is not None:
            self.state.reseed(seed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to the directory ``path``; what was there stays whole until the new checkpoint is.

        Raises:
            CheckpointError: It could not be written.
            ValueError: A schedule of the config is a function, which no file can hold.
        """
        self.state.save(path, user_data={"kind": "ppo", "config": self.config.model_dump(mode="json"), "env_id": self.env_id})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        env: str | VectorEnv[Any, Any, Any] | None = None,
        config: PPOConfig | None = None,
        *,
        emit: Emit = discard,
    ) -> Self:
        """Return an agent that goes on where the saved one was: on a CPU bit-identically, episodes under way included.

        Episodes can be taken up again in environments that are determined by their seed and actions, or that have
        ``state_dict`` and ``load_state_dict``; else new ones are started, and an ``EpisodesRestarted`` event says why.

        Args:
            path: A directory written by ``save``.
            env: The environments; by default those of the saved id.
            config: By default the saved one. Live settings may differ from it.
            emit: Receives events.

        Raises:
            CheckpointError: The file is missing, damaged, or of another architecture.
            ValueError: There is no saved id. Pass ``env``.
        """
        saved = checkpoint.read(path, {}).user_data if os.path.isdir(path) else None
        if not isinstance(saved, dict) or saved.get("kind") != "ppo":
            raise CheckpointError(f"{os.fspath(path)}: must be a directory that PPO.save wrote. Check the path.")
        where = env or saved["env_id"]
        if where is None:
            raise ValueError(
                "`env` must be given: the agent was trained in an environment that was not made from an id. Pass it."
            )
        agent = cls(where, config or PPOConfig(**saved["config"]), emit=emit)  # pyright: ignore[reportArgumentType]
        agent.restore(path)
        return agent

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Put this agent back to a checkpoint of one with the same architecture, all or nothing; see :meth:`load`.

        Raises:
            CheckpointError: It is damaged or does not fit; the agent is as it was.
        """
        self.state.load(path)
        if self._parts.stepper.resumed == "fresh":
            self._emit(EpisodesRestarted(step=self.num_steps, reason=self._parts.stepper.resumed_reason or ""))

    def close(self) -> None:
        """Close the environments."""
        self._parts.stepper.close()

    # -- one update -------------------------------------------------------------------------------------------------

    def _improve(self) -> Updated:
        started, config = time.perf_counter(), self.config
        now = Hyperparameters.at(config, min(1.0, self.num_steps / max(1, self._horizon_steps)))
        set_learning_rate(self._parts.optimizer, now.learning_rate)
        rollout = self._collector.collect(config.rollout_steps, config.gamma)
        experience = digest(rollout, self._parts.critic, self._parts.value_normalizer, config, self._parts.streams.targets)
        batches = batches_of(rollout, experience.rows, config.sequence_steps)
        result = self._updater.update(batches, now)
        self.progress.num_steps += rollout.num_valid
        self.progress.num_updates += 1
        after = self._explained_after(batches)
        seconds = time.perf_counter() - started
        return self._event(result, now, experience.explained_variance, after, rollout.num_valid / seconds)

    def _explained_after(self, batches: Batches) -> float:
        """Return the explained variance of the targets by the critic as it is now."""
        batch = batches.whole()
        value_B = lowest_value(self._parts.critic, self._updater.evaluate(batch).critic)
        return explained_variance(value_B.cpu().numpy(), batch.rows.target_BZ.mean(1).cpu().numpy())

    def _event(self, result: UpdateResult, now: Hyperparameters, before: float, after: float, speed: float) -> Updated:
        returns, lengths = self._collector.recent_returns, self._collector.recent_lengths
        watched = {name: value for name, value in vars(result).items() if name != "minibatches"}
        return Updated(
            step=self.num_steps,
            update=self.progress.num_updates,
            mean_return=float(np.mean(returns)) if returns else float("nan"),
            mean_length=float(np.mean(lengths)) if lengths else float("nan"),
            episodes=self._collector.num_episodes,
            explained_variance=before,
            explained_variance_after=after,
            learning_rate=now.learning_rate,
            clip_range=now.clip_range,
            entropy_coef=now.entropy_coef,
            kl_coefficient=self._updater.kl_coefficient,
            steps_per_second=speed,
            **watched,
        )

    def _predictor(self) -> prediction.Predictor:
        return prediction.Predictor(
            self.policy,
            self._parts.stepper.encoder,
            self._parts.observation_normalizer,
            self._parts.streams.predicting,
            self.env.single_observation_space,
        )


@contextlib.contextmanager
def _threads(wanted: int | None) -> Generator[None]:
    """Let torch use ``wanted`` threads in the block, and as many as before after it."""
    before = torch.get_num_threads()
    if wanted is None or wanted == before:
        yield
        return
    _LOG.info(
        "torch uses %d thread(s) instead of %d while learning; PPOConfig(num_threads=None) leaves them alone", wanted, before
    )
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked(env: object, config: object) -> PPOConfig:
    """Return the config; TypeError, which says what to pass, for what is no environment or no config."""
    if not isinstance(env, str | VectorEnv):
        raise TypeError(
            f"`env` must be the id of an environment or a vector environment, got {type(env).__name__}. Wrap a single one: "
            "SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)."
        )
    if not isinstance(config, PPOConfig | None):
        raise TypeError(f"`config` must be a PPOConfig, got {type(config).__name__}. Write PPOConfig(**settings).")
    return config or PPOConfig()


def _with_num_envs(config: PPOConfig, num_envs: int) -> PPOConfig:
    if "num_envs" in config.model_fields_set and config.num_envs != num_envs:
        raise ValueError(
            f"`num_envs` must be {num_envs}, as many as the given vector environment has, got {config.num_envs}. Leave it out."
        )
    return config.replace(num_envs=num_envs)
