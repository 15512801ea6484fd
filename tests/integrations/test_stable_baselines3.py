"""The Stable-Baselines3 callback: bad updates are not made, damaged runs are rewound, healthy runs are as without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.overrides import _get_current_function_mode_stack

from morphogen.errors import TrainingCollapsed
from morphogen.governor import GovernorConfig, Rollback, StepSkipped
from morphogen.integrations.stable_baselines3 import DEFAULT_CONFIG, GovernorCallback
from morphogen.telemetry.events import Event

UPDATES = 4  # of one rollout
SMALL = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [16]}}
PPO_SIZES: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "learning_rate": 1e-3, **SMALL}
DQN_SIZES: dict[str, Any] = {"learning_starts": 50, "train_freq": 8, "gradient_steps": 2, "target_update_interval": 64, **SMALL}
LSTM = {"lstm_hidden_size": 8, "net_arch": [16]}


class Normalising(FlattenExtractor):
    """Observations, normalised batch by batch."""

    def __init__(self, space: Any) -> None:
        super().__init__(space)
        self.norm = torch.nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(observations))


BATCH_NORM = {"features_extractor_class": Normalising, "net_arch": [16]}


class Faulty(gymnasium.Wrapper):
    """CartPole in which the rewards of some steps are NaN, the first being 1; has masks, for who wants them."""

    def __init__(self, bad: Iterable[int] = ()) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.bad, self.steps, self.resets = set(bad), 0, 0

    def reset(self, **options: Any) -> Any:
        self.resets += 1
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        self.steps += 1
        seen, reward, *rest = super().step(action)
        return seen, math.nan if self.steps in self.bad else reward, *rest

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)


class Diary(BaseCallback):
    """Policy and optimizer before every update, as a detector; at the start of every rollout, as a callback."""

    name = "diary"

    def __init__(self, kit: Any, damages: dict[int, float]) -> None:
        super().__init__()
        self.kit, self.damages = kit, damages
        self.pages: list[Any] = []
        self.rates: list[float] = []
        self.seen: list[Any] = []
        self.rollouts: list[tuple[int, list[Any], Any, dict[str, float]]] = []

    def page(self) -> list[Any]:
        return self.kit.contents(self.model.policy, self.model.policy.optimizer)

    def inspect(self, observation: Any) -> None:
        self.pages.append(self.page())
        self.rates.append(self.model.policy.optimizer.param_groups[0]["lr"])
        self.seen.append(observation)

    def accept(self, observation: Any) -> None: ...

    def forget(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def _on_rollout_start(self) -> None:
        logged = dict(self.model.logger.name_to_value)
        starts = getattr(self.model, "_last_episode_starts", None)
        self.rollouts.append((len(self.seen), self.page(), np.copy(starts), logged))

    def _on_step(self) -> bool:
        assert not _get_current_function_mode_stack()  # nobody watches while a rollout is collected
        if self.num_timesteps in self.damages:
            with torch.no_grad():
                for parameter in self.model.policy.parameters():
                    parameter *= self.damages[self.num_timesteps]
        return True


class Run:
    """One ``learn`` and what came of it."""

    def __init__(
        self,
        kit: Any,
        make: Callable[[Any], BaseAlgorithm] = lambda env: PPO("MlpPolicy", env, **PPO_SIZES),
        bad: Iterable[int] = (),
        damages: dict[int, float] | None = None,
        *,
        rollouts: int = 15,
        governed: bool = True,
        normalized: bool = False,
        config: GovernorConfig | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.diary = Diary(kit, damages or {})
        self.callback = GovernorCallback(config or kit.config, detectors=[self.diary], emit=self.events.append)
        self.env = Faulty(bad)
        self.venv: Any = DummyVecEnv([lambda: Monitor(self.env)])
        if normalized:
            self.venv = VecNormalize(self.venv)
        self.model = make(self.venv)
        self.model.learn(64 * rollouts, callback=[self.diary, *([self.callback] if governed else [])])

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def is_finite(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.policy.parameters())


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterable[None]:
    yield
    assert not _get_current_function_mode_stack()


ALGORITHMS: dict[str, Callable[[Any], BaseAlgorithm]] = {
    "ppo": lambda env: PPO("MlpPolicy", env, **PPO_SIZES),
    "a2c": lambda env: A2C("MlpPolicy", env, n_steps=16, **SMALL),
    "dqn": lambda env: DQN("MlpPolicy", env, **DQN_SIZES),
    "qrdqn": lambda env: QRDQN("MlpPolicy", env, **{**DQN_SIZES, "policy_kwargs": {"net_arch": [16], "n_quantiles": 5}}),
    "maskable_ppo": lambda env: MaskablePPO("MlpPolicy", env, **PPO_SIZES),
    "batch_norm_ppo": lambda env: PPO("MlpPolicy", env, **{**PPO_SIZES, "policy_kwargs": BATCH_NORM}),
    "recurrent_ppo": lambda env: RecurrentPPO("MlpLstmPolicy", env, **{**PPO_SIZES, "policy_kwargs": LSTM}),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("qrdqn", "maskable_ppo", "recurrent_ppo")]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "dqn", *SLOW])
def test_a_healthy_run_is_the_same_to_the_bit(kit: Any, algorithm: str, normalized: bool) -> None:
    runs = [
        Run(kit, ALGORITHMS[algorithm], rollouts=5, governed=governed, normalized=normalized, config=DEFAULT_CONFIG)
        for governed in (True, False)
    ]
    assert not runs[0].events
    assert len(runs[0].diary.seen) >= 16
    assert kit.same(*(run.diary.page() for run in runs))


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "dqn", *SLOW])
def test_a_nan_reward_changes_nothing_and_training_goes_on(kit: Any, algorithm: str) -> None:
    patient = kit.config.model_copy(update={"patience": 64, "alarm_window_steps": 64, "probation_steps": 1000})
    run = Run(kit, ALGORITHMS[algorithm], [330], config=patient, rollouts=8)
    skipped = [event.step for event in run.of(StepSkipped) if "nan" in event.reason]
    assert skipped and not run.of(Rollback)
    for step in skipped:
        if step + 1 < len(run.diary.pages):
            assert kit.same(run.diary.pages[step], run.diary.pages[step + 1])
    assert len({*range(len(run.diary.pages))} - {*skipped}) > len(skipped)
    assert run.is_finite()
    assert not kit.same(run.diary.page(), run.diary.pages[skipped[-1]]) or algorithm in ("dqn", "qrdqn")


def test_without_a_governor_a_nan_reward_ruins_the_run(kit: Any) -> None:
    # Which of the two depends on whether somebody in the process has turned the checks of torch.distributions off.
    with pytest.raises((ValueError, RuntimeError), match="invalid values|inf"):
        Run(kit, bad=[330], governed=False)


@pytest.mark.parametrize("algorithm", ["ppo", "batch_norm_ppo", SLOW[2]])
def test_damaged_weights_are_rewound_and_the_rollout_is_not_trained_on(kit: Any, algorithm: str) -> None:
    run = Run(kit, ALGORITHMS[algorithm], damages={700: 30.0}, rollouts=16)
    rewind = run.of(Rollback)[0]
    assert rewind.from_step > 10 * UPDATES > rewind.to_step > 0
    back = run.diary.pages[rewind.to_step]
    following = next(rollout for rollout in run.diary.rollouts if rollout[0] > rewind.from_step)
    assert following[0] == rewind.from_step + 1  # nothing of that rollout was judged, let alone trained on, after the rewind
    assert kit.same(following[1], back)
    assert following[2].all()  # new episodes
    assert run.is_finite()


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_the_statistics_of_a_normaliser_are_rewound(kit: Any, algorithm: str) -> None:
    """One reward of NaN makes the running variance of returns NaN, and every reward after it."""
    run = Run(kit, ALGORITHMS[algorithm], [400], normalized=True, rollouts=14)
    assert run.of(Rollback)
    assert np.isfinite(run.venv.ret_rms.var) and np.isfinite(run.venv.ret_rms.mean) and np.isfinite(run.venv.returns).all()
    assert np.isfinite(run.venv.obs_rms.var).all()
    assert run.is_finite()
    assert run.venv.ret_rms.count < run.env.steps  # it was set back


def test_dictionaries_of_observations_are_normalised_and_rewound(kit: Any) -> None:
    class Named(gymnasium.ObservationWrapper):
        def __init__(self, env: Any) -> None:
            super().__init__(env)
            self.observation_space = gymnasium.spaces.Dict({"pole": env.observation_space})

        def observation(self, observation: Any) -> Any:
            return {"pole": observation}

    venv = VecNormalize(DummyVecEnv([lambda: Monitor(Named(Faulty([400])))]))
    callback = GovernorCallback(kit.config)
    PPO("MultiInputPolicy", venv, **PPO_SIZES).learn(64 * 12, callback=callback)
    assert callback.governor is not None and callback.governor.rollbacks
    assert np.isfinite(venv.ret_rms.var)
    venv = VecNormalize(DummyVecEnv([lambda: Monitor(Faulty([400]))]), norm_obs=False)
    PPO("MlpPolicy", venv, **PPO_SIZES).learn(64 * 12, callback=GovernorCallback(kit.config))
    assert np.isfinite(venv.ret_rms.var)


def test_a_lowered_learning_rate_stays_lower(kit: Any) -> None:
    """The algorithm sets its own rate in every call of ``train``; here it falls linearly to nothing."""
    config = kit.config.model_copy(update={"snapshot_every": 2, "probation_steps": 2})
    falling: dict[str, Any] = {**PPO_SIZES, "learning_rate": lambda remaining: 1e-3 * remaining}

    def make(env: Any) -> PPO:
        return PPO("MlpPolicy", env, **falling)

    run = Run(kit, make, [400, 401, 460, 461], config=config, rollouts=14)
    factors = [event.learning_rate_factor for event in run.of(Rollback)]
    assert factors[:2] == [1.0, 0.5]
    first = [rollout for rollout in run.diary.rollouts if rollout[0] > run.of(Rollback)[1].from_step][0]
    number = run.diary.rollouts.index(first)
    assert run.diary.rates[first[0]] == pytest.approx(0.5 * 1e-3 * (1 - (number + 1) / 14))
    assert run.diary.rates[0] == pytest.approx(1e-3 * 13 / 14)


def test_updates_are_judged_by_their_loss_and_the_norm_before_clipping(kit: Any) -> None:
    run = Run(kit, rollouts=4, config=DEFAULT_CONFIG)
    assert len(run.diary.seen) == 4 * UPDATES
    for count, _, _, logged in run.diary.rollouts[1:]:
        assert run.diary.seen[count - 1].loss == pytest.approx(logged["train/loss"])
    clipped = Run(kit, lambda env: PPO("MlpPolicy", env, max_grad_norm=1e-4, **PPO_SIZES), rollouts=1)
    free = Run(kit, lambda env: PPO("MlpPolicy", env, max_grad_norm=1e9, **PPO_SIZES), rollouts=1)
    assert clipped.diary.seen[0].grad_norm == free.diary.seen[0].grad_norm > 0.01
    assert "rollout/ep_rew_mean" in run.diary.seen[-1].metrics


def test_collapse_ends_the_run(kit: Any) -> None:
    run: Any = None

    def make(env: Any) -> PPO:
        nonlocal run
        run = PPO("MlpPolicy", env, **PPO_SIZES)
        return run

    with pytest.raises(TrainingCollapsed, match="loss is nan"):
        Run(kit, make, range(300, 100_000), rollouts=40)
    assert not {"step", "zero_grad"} & vars(run.policy.optimizer).keys()


def test_nothing_is_left_on_the_optimizer(kit: Any) -> None:
    run = Run(kit, rollouts=1)
    assert not {"step", "zero_grad"} & vars(run.model.policy.optimizer).keys()


def test_saving_loading_and_going_on(kit: Any, tmp_path: Path) -> None:
    first = PPO("MlpPolicy", DummyVecEnv([lambda: Monitor(Faulty())]), **PPO_SIZES)
    first.learn(64 * 6, callback=[GovernorCallback(), CheckpointCallback(128, str(tmp_path))])
    first.save(tmp_path / "last")
    models = [PPO.load(tmp_path / "last", env=DummyVecEnv([lambda: Monitor(Faulty())])) for _ in range(2)]
    callback = GovernorCallback()
    for model, wanted in zip(models, (callback, None), strict=True):
        model.set_random_seed(1)
        model.learn(64 * 4, callback=wanted, reset_num_timesteps=False)
    assert models[0].num_timesteps == 64 * 10
    assert kit.same(*(kit.contents(model.policy, model.policy.optimizer) for model in models))
    assert PPO.load(tmp_path / "rl_model_384_steps").num_timesteps == 384


def test_an_interrupted_run_can_be_let_go_of(kit: Any) -> None:
    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 100:
                raise KeyboardInterrupt
            return True

    model, callback = PPO("MlpPolicy", Faulty(), **PPO_SIZES), GovernorCallback()
    with pytest.raises(KeyboardInterrupt):
        model.learn(200, callback=[callback, Interrupting()])
    assert {"step", "zero_grad"} <= vars(model.policy.optimizer).keys()
    callback.detach()
    assert not {"step", "zero_grad"} & vars(model.policy.optimizer).keys()


def test_one_callback_serves_several_runs(kit: Any) -> None:
    run = Run(kit, rollouts=2)
    first = run.callback.governor
    run.model.learn(128, callback=run.callback)
    assert run.callback.governor is not first


def test_algorithms_with_other_ways_to_update_are_refused() -> None:
    sac = SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, **SMALL)
    trpo = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, device="cpu")
    for model in (sac, trpo):
        with pytest.raises(ValueError, match=f"got {type(model).__name__}"):
            model.learn(100, callback=GovernorCallback())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [30, 31])
def test_healthy_learning_is_left_alone(seed: int) -> None:
    """No rewind, and an update skipped now and then at most, where rollouts differ as much as they do while a policy learns."""
    models: list[tuple[BaseAlgorithm, int]] = [
        (PPO("MlpPolicy", "CartPole-v1", n_steps=512, n_epochs=5, learning_rate=1e-3, seed=seed, device="cpu"), 12_000),
        (PPO("MlpPolicy", "Pendulum-v1", n_steps=512, gamma=0.9, learning_rate=1e-3, seed=seed, device="cpu"), 8_000),
        (A2C("MlpPolicy", "CartPole-v1", seed=seed, device="cpu"), 10_000),
        (DQN("MlpPolicy", "CartPole-v1", learning_starts=500, learning_rate=1e-3, seed=seed, device="cpu"), 10_000),
    ]
    for model, steps in models:
        callback = GovernorCallback()
        model.learn(steps, callback=callback)
        assert callback.governor is not None
        assert callback.governor.rollbacks == 0
        assert callback.governor.skipped_steps <= 2
