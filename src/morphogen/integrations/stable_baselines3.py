"""The governor as a callback of Stable-Baselines3 (and sb3-contrib) algorithms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from morphogen.errors import MorphogenError
from morphogen.governor import Action, Detector, ExplosionConfig, Governor, GovernorConfig
from morphogen.integrations.steps import BackwardWatch, Interception, StepGate, for_data_that_goes_on
from morphogen.state import TrainingState, surgery
from morphogen.telemetry.events import Emit, discard

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.vec_env import VecNormalize
except ImportError as error:
    raise ImportError("Stable-Baselines3 is not installed. Run: pip install 'morphogen[stable-baselines3]'") from error

DEFAULT_CONFIG = GovernorConfig(
    explosion=ExplosionConfig(
        window_steps=512,
        run_steps=8,
        loss_spike=100.0,
        sustained=4.0,
        log_norm_spike=5.0,
        log_norm_sustained=4.0,
    )
)
"""Limits for reinforcement learning, where each rollout is new data: losses and gradients of healthy runs jump between them."""


class GovernorCallback(BaseCallback):
    """Stops bad policy updates of a Stable-Baselines3 run, and rewinds the run when that does not help.

    For every algorithm with the one optimizer ``policy.optimizer``: PPO, A2C and DQN, RecurrentPPO, MaskablePPO and QRDQN of
    sb3-contrib. Each update is judged once, by its loss and the norm of its gradients before they are clipped, both read as
    ``loss.backward()`` returns; detectors of one's own also get what the algorithm has logged so far in ``metrics``, and
    ``rollout/ep_rew_mean``, the mean return of the last episodes. An update that is stopped changes nothing.

    A rewind puts back policy, optimizer, the statistics of a ``VecNormalize`` and torch's, NumPy's and Python's generators. The
    data of that rollout is not trained on further, and as the environments cannot be put back, all begin a new episode. A
    learning rate that the governor lowers stays lower, whatever the algorithm's schedule. Replay buffers are not rewound.

    Args:
        config: Knobs of the governor, :data:`DEFAULT_CONFIG` unless told; its times are updates (minibatches), not
            environment steps, and ``skip_window_steps`` is taken as 0, as data does not come again after a rewind.
        detectors: Own detectors to use beside the standard ones.
        emit: Receives the governor's events; their steps are updates since ``learn`` was called.
        verbose: As for every callback of Stable-Baselines3.

    Attributes:
        governor: The governor of the present or last ``learn``, which starts from the model as it is then, also if it was
            loaded; None before the first.

    Raises:
        ValueError: From ``learn``: the algorithm has more than one optimizer, or updates the policy without it.
        TrainingCollapsed: From ``learn``: the fault came back after every rewind.

    Example:
        >>> from stable_baselines3 import PPO
        >>> callback = GovernorCallback()
        >>> model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").learn(64, callback=callback)
        >>> callback.governor.rollbacks
        0
    """

    def __init__(
        self,
        config: GovernorConfig | None = None,
        *,
        detectors: Sequence[Detector] = (),
        emit: Emit = discard,
        verbose: int = 0,
    ) -> None:
        """Remember what the governor is to be made of."""
        super().__init__(verbose)
        self.governor: Governor | None = None
        self._config = for_data_that_goes_on(config or DEFAULT_CONFIG)
        self._detectors, self._emit = tuple(detectors), emit
        self._attached: _Attached | None = None

    def _on_training_start(self) -> None:
        self.detach()
        optimizer = getattr(self.model.policy, "optimizer", None)
        if not isinstance(optimizer, Optimizer) or hasattr(self.model, "line_search_max_iter"):
            raise ValueError(
                f"the algorithm must make every update with `policy.optimizer`, got {type(self.model).__name__}. Use PPO, A2C, "
                "DQN, or RecurrentPPO, MaskablePPO or QRDQN of sb3-contrib."
            )
        normalizer = self.model.get_vec_normalize_env()
        factor = _RateFactor(optimizer)
        extras = {} if normalizer is None else {"vec_normalize": _Statistics(normalizer)}
        state = TrainingState(self.model.policy, optimizer, factor, extras=extras)
        self.governor = Governor(state, self._config, detectors=self._detectors, emit=self._emit)
        self._attached = _Attached(optimizer, factor, self._may_step)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self._attached is not None:
            self._attached.begin_training()

    def _on_training_end(self) -> None:
        self.detach()
        if self.governor is not None:
            self.governor.flush()

    def _may_step(self, loss: Tensor, grad_norm: Tensor) -> bool:
        if self.governor is None or self._attached is None:
            return True
        try:
            verdict = self.governor.observe(loss, grad_norm=grad_norm, metrics=self._metrics() if self._detectors else None)
        except MorphogenError:
            self.detach()
            raise
        if verdict.action is Action.REWIND:
            self._attached.is_over = True
            for module in self.model.policy.modules():  # what is left of train() runs forward, and must not move statistics
                if next(module.buffers(recurse=False), None) is not None:
                    module.training = False
            self._begin_new_episodes()
        return verdict.proceed

    def _metrics(self) -> dict[str, float]:
        logged: Any = self.model.logger.name_to_value
        metrics = {name: float(value) for name, value in logged.items() if isinstance(value, int | float | np.number)}
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        return {**metrics, "rollout/ep_rew_mean": float(np.mean(returns))} if returns else metrics

    def _begin_new_episodes(self) -> None:
        """Forget observations and recurrent states that come from before the rewind."""
        model: Any = self.model
        model._last_obs = model.env.reset()
        model._last_episode_starts = np.ones((model.env.num_envs,), dtype=bool)
        if model.get_vec_normalize_env() is not None:
            model._last_original_obs = model.get_vec_normalize_env().get_original_obs()
        states = getattr(model, "_last_lstm_states", None)
        if states is not None:
            for tensor in (*states.pi, *states.vf):
                tensor.zero_()

    def detach(self) -> None:
        """Let go of the optimizer. The end of ``learn`` does so, and the next one; call it after a Ctrl-C."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None


class _Attached:
    """What is attached to the optimizer during one ``learn``.

    Args:
        optimizer: The policy's.
        factor: To apply to its learning rate.
        may_step: Told loss and gradient norm of an update, says whether it is made.

    Attributes:
        is_over: Whether the run was rewound in this call of ``train``: what is left of its data is not trained on.
    """

    def __init__(self, optimizer: Optimizer, factor: _RateFactor, may_step: Callable[[Tensor, Tensor], bool]) -> None:
        self._factor, self._may_step = factor, may_step
        self.is_over = False
        self._gate = StepGate(optimizer)
        self._watch = BackwardWatch(surgery.parameters_of(optimizer))
        self._zero_grad = Interception(optimizer, "zero_grad", self._before_backward)
        self._step = Interception(optimizer, "step", self._before_step)

    def begin_training(self) -> None:
        """Each call of ``train`` begins by setting the learning rate of the algorithm's own schedule."""
        self.is_over = False
        self._factor.is_due = True

    def _before_backward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        self._factor.apply()
        self._watch.open()

    def _before_step(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._watch.close()
        seen = self._watch.take()
        self._gate.held = self.is_over or (seen is not None and not self._may_step(*seen))
        return method(*args, **kwargs)

    def detach(self) -> None:
        self._watch.close()
        for attached in (self._step, self._zero_grad, self._gate):
            attached.remove()


class _RateFactor:
    """The governor's factor on the learning rate, which each call of ``train`` sets anew; to TrainingState, a schedule.

    Attributes:
        base_lrs: The factor, under the name by which a schedule's rates are scaled and put back.
        is_due: Whether the optimizer's rate is the algorithm's own, without the factor.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base_lrs = [1.0]
        self.is_due = False

    def apply(self) -> None:
        if self.is_due and self.base_lrs[0] != 1.0:
            surgery.scale_learning_rates(self.optimizer, self.base_lrs[0])
        self.is_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.base_lrs = list(state["base_lrs"])


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """What a VecNormalize has learned, as plain data."""

    normalizer: VecNormalize

    def _parts(self) -> dict[str, RunningMeanStd]:
        observed: Any = getattr(self.normalizer, "obs_rms", {})  # missing if observations are not normalised
        observed = observed if isinstance(observed, dict) else {"": observed}
        return {f"obs_rms.{key}": part for key, part in observed.items()} | {"ret_rms": self.normalizer.ret_rms}

    def state_dict(self) -> dict[str, Any]:
        return {
            "returns": self.normalizer.returns.copy(),
            "parts": {name: [part.mean.copy(), part.var.copy(), float(part.count)] for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.normalizer.returns = state["returns"]
        for name, part in self._parts().items():
            part.mean, part.var, part.count = state["parts"][name]
