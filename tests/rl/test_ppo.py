"""The agent as its users meet it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from morphogen.errors import CheckpointError, EnvironmentFault
from morphogen.rl import PPO, CriticConfig, EpisodesRestarted, Linear, PolicyConfig, PPOConfig, Updated
from morphogen.rl.update import Hyperparameters

LSTM = PolicyConfig(hidden=(8,), memory="lstm", memory_width=6)
EVERYTHING: dict[str, Any] = {
    "normalize_observations": True,
    "normalize_rewards": True,
    "normalize_values": True,
    "kl_penalty": {"kind": "pid", "coefficient": 0.5, "target": 0.01, "proportional": 1.0},
    "gradient_variance": {"warmup_steps": 2},
    "critic": CriticConfig(kind="quantile", num_quantiles=5, twin=True),
    "learning_rate": Linear(start=1e-3, end=0.0),
    "schedule_steps": 400,
}


def rate_of(agent: PPO) -> float:
    return agent.state.learning_rates()["group0"]


class TestLearning:
    def test_cartpole_is_learned(self) -> None:
        """Chance gives about 22, and so does a policy whose advantages have the wrong sign."""
        config = PPOConfig(
            num_envs=8, rollout_steps=32, minibatch_size=256, epochs=20, gamma=0.98, gae_lambda=0.8, learning_rate=1e-3
        )
        agent = PPO("CartPole-v1", config).learn(20_000)
        assert agent.evaluate(10).mean_return > 150

    def test_memory_learns_what_needs_it(self) -> None:
        """The reward is for naming what was shown one step before: without memory, a coin's chance."""
        returns = {}
        for memory in ("none", "lstm"):
            policy = PolicyConfig(hidden=(16,), memory=memory, memory_width=16)
            config = PPOConfig(
                rollout_steps=32, minibatch_size=256, learning_rate=1e-2, gamma=0.5, policy=policy, entropy_coef=0.01
            )
            env = SyncVectorEnv([Recall] * 8, autoreset_mode=AutoresetMode.SAME_STEP)
            returns[memory] = PPO(env, config).learn(5_000).evaluate(20, SyncVectorEnv([Recall] * 4)).mean_return
        assert returns["none"] < 0.75 * Recall.LENGTH
        assert returns["lstm"] > 0.9 * Recall.LENGTH

    def test_counts_steps_calls_back_and_stops_when_told(self, kit: SimpleNamespace) -> None:
        events: list[Any] = []
        agent = kit.agent(emit=events.append)
        seen = []
        assert agent.learn(25, lambda learner, event: seen.append((learner, event))) is agent
        assert agent.num_steps == 48  # whole rollouts of 8 steps in 3 environments
        assert [event.step for event in events] == [24, 48]
        assert seen == [(agent, event) for event in events]
        agent.learn(1000, lambda learner, event: False)
        assert agent.num_steps == 72

    def test_reports_returns_in_the_environments_unit(self) -> None:
        events: list[Any] = []
        agent = PPO("CartPole-v1", PPOConfig(num_envs=2, rollout_steps=64, normalize_rewards=True), emit=events.append)
        agent.learn(256)
        assert events[-1].mean_return == events[-1].mean_length > 5

    def test_threads_are_one_while_learning_and_as_before_after(self, kit: SimpleNamespace, caplog: Any) -> None:
        before, seen = torch.get_num_threads(), []
        torch.set_num_threads(2)
        try:
            with caplog.at_level(logging.INFO, "morphogen.rl"):
                kit.agent().learn(24, lambda *_: seen.append(torch.get_num_threads()))
            assert (seen, torch.get_num_threads()) == ([1], 2)
            assert len([record for record in caplog.records if "thread" in record.message]) == 1
            kit.agent(num_threads=None).learn(24, lambda *_: seen.append(torch.get_num_threads()))
            assert seen == [1, 2]
        finally:
            torch.set_num_threads(before)

    def test_draws_from_no_global_generator(self, kit: SimpleNamespace) -> None:
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        agent = kit.agent(**EVERYTHING, masks=True)
        agent.learn(48)
        agent.evaluate(2, kit.worlds(masks=True), deterministic=False)
        assert torch.equal(states[0], torch.get_rng_state())
        assert (states[1] == np.random.get_state()[1]).all()

    def test_the_same_seed_is_the_same_agent(self, kit: SimpleNamespace) -> None:
        first, second, other = (kit.agent(seed=seed).learn(48) for seed in (0, 0, 1))
        assert kit.same_weights(first, second)
        assert not kit.same_weights(first, other)


class Recall(gym.Env[Any, Any]):
    """Name the bit that was shown one step ago."""

    LENGTH = 16
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._before, self._shown, self._left = 0, int(self.np_random.integers(2)), self.LENGTH
        return self._shown, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(int(action) == self._before)
        self._before, self._shown, self._left = self._shown, int(self.np_random.integers(2)), self._left - 1
        return self._shown, reward, self._left == 0, False, {}


class TestHyperparameters:
    @pytest.mark.parametrize(
        ("changes", "watched"),
        [
            ({"learning_rate": 7e-5}, "learning_rate"),
            ({"clip_range": 0.05}, "clip_range"),
            ({"entropy_coef": 0.03}, "entropy_coef"),
        ],
        ids=["learning_rate", "clip_range", "entropy_coef"],
    )
    def test_what_is_set_rules_for_good_over_any_schedule(self, kit: SimpleNamespace, changes: Any, watched: str) -> None:
        events: list[Any] = []
        falling = {name: Linear(start=1e-2, end=1e-3) for name in changes}
        agent = kit.agent(emit=events.append, **falling)
        agent.learn(24)
        agent.reconfigure(**changes)
        agent.learn(72)
        assert [getattr(event, watched) for event in events] == [1e-2] + 3 * list(changes.values())
        if watched == "learning_rate":
            assert rate_of(agent) == 7e-5

    @pytest.mark.parametrize(
        "changes",
        [
            {"learning_rate": 1e-2},
            {"clip_range": 1e-3},
            {"entropy_coef": 0.5},
            {"value_coef": 0.01},
            {"gamma": 0.1},
            {"gae_lambda": 0.1},
            {"epochs": 1},
            {"minibatch_size": 6},
            {"max_grad_norm": 1e-3},
            {"normalize_advantages": False},
            {"value_clip_range": 1e-3},
            {"ratio": "per_head"},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_every_live_setting_acts_from_the_next_update_as_if_it_had_always_been_so(
        self, kit: SimpleNamespace, changes: dict[str, Any]
    ) -> None:
        """Three updates later the agent is bit for bit one that was built with the setting and given the same parameters."""
        settings = {"normalize_rewards": True, "learning_rate": 3e-3, "epochs": 3}
        plain, changed, built = (kit.agent("factored", **{**settings, **more}) for more in ({}, {}, changes))
        changed.reconfigure(**changes)
        for agent in (plain, changed, built):
            agent.learn(3 * 24)
        assert kit.same_weights(changed, built)
        assert not kit.same_weights(changed, plain)

    @pytest.mark.parametrize("source_rate", [1e-5, 0.1])
    def test_a_loaded_group_does_not_bring_its_rate(self, kit: SimpleNamespace, source_rate: float) -> None:
        events: list[Any] = []
        source, target = kit.agent(learning_rate=source_rate), kit.agent(learning_rate=2e-3, emit=events.append, seed=1)
        target.set_parameters(source.learn(24).get_parameters(include_optimizer=True))
        target.learn(72)
        assert [event.learning_rate for event in events if isinstance(event, Updated)] == [2e-3] * 3
        assert rate_of(target) == 2e-3

    def test_rollout_steps_change_the_next_rollout(self, kit: SimpleNamespace) -> None:
        agent = kit.agent().learn(24)
        agent.reconfigure(rollout_steps=16)
        assert agent.learn(1).num_steps == 24 + 48

    def test_penalty_and_attack_are_live(self, kit: SimpleNamespace) -> None:
        events: list[Any] = []
        agent = kit.agent(kl_penalty={"kind": "fixed", "coefficient": 1.0}, adversarial={"epsilon": 0.0}, emit=events.append)
        agent.learn(24)
        agent.reconfigure(kl_penalty={"kind": "fixed", "coefficient": 7.0}, adversarial={"epsilon": 1.0})
        agent.learn(24)
        assert [event.kl_coefficient for event in events] == [1.0, 7.0]
        assert events[0].robust_kl < 1e-9 < events[1].robust_kl

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 1e-3}, "`lr` is not a setting"),
            ({"gamma": 1.5}, "`gamma` must"),
            ({"learning_rate": -1.0}, "`learning_rate` must"),
            ({"seed": 3}, "`seed` must stay"),
            ({"critic": CriticConfig(twin=True)}, "`critic` must stay"),
            ({"kl_penalty": {"kind": "fixed", "coefficient": 1.0}}, "`kl_penalty` must stay"),
        ],
    )
    def test_a_bad_change_changes_nothing(self, kit: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
        agent = kit.agent()
        before = agent.config
        with pytest.raises(ValueError, match=message):
            agent.reconfigure(**changes, epochs=1)
        assert agent.config is before

    def test_schedules_run_over_the_call_or_over_the_given_steps(self, kit: SimpleNamespace) -> None:
        for given, expected in ((None, [1.0, 0.5]), (96, [1.0, 0.75])):
            events: list[Any] = []
            kit.agent(clip_range=Linear(start=1.0, end=0.0), schedule_steps=given, emit=events.append).learn(48)
            assert [event.clip_range for event in events] == expected

    def test_a_fraction_is_resolved_once(self) -> None:
        config = PPOConfig(learning_rate=lambda fraction: 1.0 - fraction)
        assert Hyperparameters.at(config, 0.25).learning_rate == 0.75


class TestCheckpoints:
    @pytest.mark.parametrize("policy", [PolicyConfig(hidden=(8,)), LSTM], ids=["plain", "lstm"])
    @pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
    def test_stop_and_go_on_is_bit_identical(self, tmp_path: Path, env_id: str, policy: PolicyConfig) -> None:
        config = PPOConfig(num_envs=3, rollout_steps=33, minibatch_size=20, epochs=2, policy=policy, **EVERYTHING)
        events: list[Any] = []
        whole = PPO(env_id, config, emit=events.append)
        whole.learn(198).save(tmp_path)
        whole.learn(198)
        again: list[Any] = []
        resumed = PPO.load(tmp_path, emit=again.append)
        assert (resumed.num_steps, resumed.config) == (198, whole.config)
        resumed.learn(198)
        assert [untimed(event) for event in again] == [untimed(event) for event in events[2:]]
        mine, theirs = (agent.get_parameters(include_optimizer=True) for agent in (whole, resumed))
        assert flat(mine) == flat(theirs)

    def test_other_architectures_and_damage_are_refused_and_change_nothing(self, tmp_path: Path, kit: SimpleNamespace) -> None:
        kit.agent().learn(24).save(tmp_path / "saved")
        other = kit.agent(policy=LSTM)
        before = flat(other.get_parameters(include_optimizer=True))
        with pytest.raises(CheckpointError, match="memory"):
            other.restore(tmp_path / "saved")
        shutil.copytree(tmp_path / "saved", tmp_path / "cut")
        victim = next((tmp_path / "cut").glob("model-*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="cut off"):
            other.restore(tmp_path / "cut")
        assert flat(other.get_parameters(include_optimizer=True)) == before
        with pytest.raises(CheckpointError):
            PPO.load(tmp_path / "nowhere")

    def test_code_in_a_file_is_never_run(self, tmp_path: Path, kit: SimpleNamespace) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (Path.touch, (tmp_path / "exploded",))

        torch.save({"weight": Bomb()}, tmp_path / "policy.pt")
        agent = kit.agent()
        for load in (agent.restore, PPO.load):
            with pytest.raises(CheckpointError):
                load(tmp_path / "policy.pt")
        assert not (tmp_path / "exploded").exists()

    def test_an_environment_without_an_id_must_be_given(self, tmp_path: Path, kit: SimpleNamespace) -> None:
        agent = kit.agent().learn(24)
        agent.save(tmp_path)
        with pytest.raises(ValueError, match="`env` must be given"):
            PPO.load(tmp_path)
        resumed = PPO.load(tmp_path, kit.worlds())
        assert kit.same_weights(agent.learn(48), resumed.learn(48))

    def test_episodes_that_cannot_be_taken_up_are_started_anew_and_said_so(self, tmp_path: Path) -> None:
        native = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
        agent = PPO(native, PPOConfig(rollout_steps=16, epochs=1)).learn(32)
        agent.save(tmp_path)
        events: list[Any] = []
        again = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="vector_entry_point")
        PPO.load(tmp_path, again, emit=events.append).learn(32)
        assert [type(event) for event in events] == [EpisodesRestarted, Updated]

    def test_a_function_cannot_be_written_and_what_was_there_stays(self, tmp_path: Path, kit: SimpleNamespace) -> None:
        agent = kit.agent().learn(24)
        agent.save(tmp_path)
        agent.reconfigure(learning_rate=lambda fraction: 1e-3)
        with pytest.raises(ValueError, match="Points"):
            agent.save(tmp_path)
        assert PPO.load(tmp_path, kit.worlds()).num_steps == 24


class TestBadInput:
    def test_a_failing_environment_names_itself_and_keeps_the_learner(self, tmp_path: Path, kit: SimpleNamespace) -> None:
        env, Fragile.fuse = kit.worlds(), 1000
        env.envs[1] = Fragile(env.envs[1])
        agent = PPO(env, PPOConfig(rollout_steps=8, policy=PolicyConfig(hidden=(8,)))).learn(24)
        before = flat(agent.get_parameters(include_optimizer=True))
        Fragile.fuse = 5
        with pytest.raises(EnvironmentFault, match=r"1\b.*broke") as caught:
            agent.learn(24)
        assert caught.value.env_index == 1
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert flat(agent.get_parameters(include_optimizer=True)) == before
        agent.save(tmp_path)
        PPO.load(tmp_path, kit.worlds()).learn(24)

    def test_observations_that_are_not_finite_are_named(self, kit: SimpleNamespace) -> None:
        env = kit.worlds()
        env.envs[2] = gym.wrappers.TransformObservation(env.envs[2], lambda seen: seen * np.float32("nan"), None)
        with pytest.raises(EnvironmentFault, match=r"nvironment 2\b"):
            PPO(env, PPOConfig(rollout_steps=8)).learn(24)

    @pytest.mark.parametrize(
        ("action", "settings", "message"),
        [
            ("gaussian", {"action": {"heads": [{"name": "op"}]}}, "`heads`"),
            ("categorical", {"action": {"squash": True}}, "`squash`"),
            ("categorical", {"sequence_steps": 4}, "`sequence_steps`"),
            ("categorical", {"policy": {"torso": "cnn"}}, "`torso`"),
            ("categorical", {"policy": {"memory_layer_norm": True}}, "`memory_layer_norm`"),
            ("categorical", {"critic": {"bins": 11}}, "`bins`"),
            ("categorical", {"critic": {"kind": "categorical"}, "value_clip_range": 0.2}, "value_clip_range|clip"),
            ("categorical", {"precision": "fp16"}, "`precision`"),
            ("categorical", {"num_envs": 7}, "`num_envs` must be 3"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused_at_once(
        self, kit: SimpleNamespace, action: str, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            small = {"policy": PolicyConfig(hidden=(8,))}
            PPO(kit.worlds(action=action), PPOConfig(**{**small, **settings})).learn(1)

    def test_what_is_no_vector_environment_or_config_is_refused_with_advice(self) -> None:
        with pytest.raises(TypeError, match="SyncVectorEnv"):
            PPO(gym.make("CartPole-v1"))
        with pytest.raises(TypeError, match="PPOConfig"):
            PPO("CartPole-v1", {"gamma": 0.9})

    def test_learning_nothing_is_an_error(self, kit: SimpleNamespace) -> None:
        with pytest.raises(ValueError, match="`total_steps`"):
            kit.agent().learn(0)

    def test_inference_mode_is_refused_before_anything_happens(self, kit: SimpleNamespace) -> None:
        agent = kit.agent(policy=LSTM)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="outside torch.inference_mode"):
            agent.learn(24)
        with torch.inference_mode():
            _, state = agent.predict(np.zeros(3, np.float32))
        assert agent.learn(24).num_steps == 24
        assert not agent.memory_state.is_inference()

    def test_a_mask_of_the_wrong_shape_names_head_and_shapes(self, kit: SimpleNamespace) -> None:
        with pytest.raises(ValueError, match="mask"):
            kit.agent("factored").predict(np.zeros(3, np.float32), action_mask=np.ones(5, bool))


class Fragile(gym.Wrapper[Any, Any, Any, Any]):
    """Raises after some steps."""

    fuse = 0

    def step(self, action: Any) -> Any:
        Fragile.fuse -= 1
        if Fragile.fuse == 0:
            raise ZeroDivisionError("it broke")
        return self.env.step(action)


class TestPrediction:
    def test_single_and_batched_observations_agree(self, kit: SimpleNamespace) -> None:
        agent = kit.agent("gaussian", normalize_observations=True).learn(24)
        seen = np.arange(6, dtype=np.float32).reshape(2, 3)
        both, _ = agent.predict(seen, deterministic=True)
        assert both.shape == (2, 2)
        for row in range(2):
            np.testing.assert_allclose(agent.predict(seen[row], deterministic=True)[0], both[row], rtol=1e-5)

    def test_memory_is_carried_and_forgotten_by_row(self, kit: SimpleNamespace) -> None:
        agent = kit.agent("gaussian", policy=LSTM).learn(24)
        seen = np.ones((2, 3), np.float32)
        first, state = agent.predict(seen, deterministic=True)
        second, _ = agent.predict(seen, state, deterministic=True)
        mixed, _ = agent.predict(seen, state, np.array([True, False]), deterministic=True)
        assert (mixed[0] == first[0]).all()
        assert (mixed[1] == second[1]).all()
        assert (second != first).any()
        assert not state.is_inference()

    def test_masks_bind_drawn_and_deterministic_actions(self, kit: SimpleNamespace) -> None:
        agent = kit.agent(masks=True).learn(24)
        for allowed in range(4):
            mask = np.arange(4) == allowed
            for deterministic in (True, False):
                assert agent.predict(np.zeros(3, np.float32), deterministic=deterministic, action_mask=mask)[0] == allowed

    def test_drawn_actions_scatter_and_deterministic_ones_do_not(self, kit: SimpleNamespace) -> None:
        agent, seen = kit.agent(), np.zeros((100, 3), np.float32)
        assert len(set(agent.predict(seen)[0].tolist())) > 1
        assert len(set(agent.predict(seen, deterministic=True)[0].tolist())) == 1

    def test_evaluation_plays_whole_episodes_shared_out_evenly(self, kit: SimpleNamespace) -> None:
        result = kit.agent().learn(24).evaluate(7, kit.worlds(), seed=3)
        assert len(result.returns) == len(result.lengths) == 7
        assert result.mean_return == pytest.approx(np.mean(result.returns))
        assert kit.agent().learn(24).evaluate(7, kit.worlds(), seed=3) == result


def flat(tree: Any) -> Any:
    """Return nested parameters with tensors and arrays as lists, to be compared exactly."""
    if isinstance(tree, dict):
        return {name: flat(value) for name, value in tree.items()}
    return tree.tolist() if isinstance(tree, torch.Tensor | np.ndarray) else tree


def untimed(event: Any) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(event).items() if name != "steps_per_second"}
