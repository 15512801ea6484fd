"""One contract for every vector environment: the same trajectories in every autoreset mode, and nothing read from filler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TransformReward
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics

from morphogen.errors import EnvironmentFault
from morphogen.rl.vector import Step, Stepper, make_vector

MODES = list(AutoresetMode)
POISON = 1e6


class Walk(gym.Env[Any, Any]):
    """Observes (episode, time, noise); lasts as long as its generator says, and ends in death or by the clock in turn."""

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (3,))
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, fixed_length: int | None = None) -> None:
        self.fixed_length = fixed_length
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.time = (0 if seed is not None else self.episode + 1), 0
        self.length = self.fixed_length or int(self.np_random.integers(1, 6))
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.time += 1
        over = self.time >= self.length
        reward = self.time + 0.1 * int(action)
        return self.observe(), reward, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}

    def observe(self) -> Any:
        return np.array([self.episode, self.time, self.np_random.random()], dtype=np.float32)


class Vector(VectorEnv[Any, Any, Any]):
    """A vector environment that is not Gymnasium's: reuses its buffers, and fills filler rows with poison."""

    def __init__(self, envs: list[gym.Env[Any, Any]], mode: AutoresetMode | str) -> None:
        self.envs, self.num_envs = envs, len(envs)
        self.mode = AutoresetMode(mode)
        self.metadata: dict[str, Any] = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = envs[0].observation_space, envs[0].action_space
        self.observation = np.zeros((self.num_envs, 3), dtype=np.float32)
        self.reward = np.zeros(self.num_envs)
        self.terminated, self.truncated = np.zeros((2, self.num_envs), dtype=bool)
        self.ended = np.zeros(self.num_envs, dtype=bool)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = np.ones(self.num_envs, dtype=bool) if options is None else options["reset_mask"]
        for row in np.flatnonzero(mask):
            self.observation[row] = self.envs[row].reset(seed=None if seed is None else seed + int(row))[0]
        self.ended = self.ended & ~mask
        return self.observation, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        infos: dict[str, Any] = {}
        before, self.ended = self.ended, np.zeros(self.num_envs, dtype=bool)
        assert not (self.mode is AutoresetMode.DISABLED and before.any())
        for row, env in enumerate(self.envs):
            if before[row]:
                self.observation[row] = env.reset()[0]
                self.reward[row], self.terminated[row], self.truncated[row] = POISON, True, True
                continue
            outcome = env.step(actions[row])
            self.observation[row], self.reward[row], self.terminated[row], self.truncated[row], _ = outcome
            self.ended[row] = outcome[2] or outcome[3]
        if self.mode is AutoresetMode.SAME_STEP and self.ended.any():
            infos["final_obs"] = np.where(self.ended[:, None], self.observation, POISON)
            self.reset(options={"reset_mask": self.ended.copy()})
        return self.observation, self.reward, self.terminated, self.truncated, infos


def walks(mode: AutoresetMode | str, fixed_length: int | None = None, num_envs: int = 3) -> Vector:
    return Vector([Walk(fixed_length) for _ in range(num_envs)], mode)


def actions_for(observation_ND: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Actions that depend on nothing but the row's own observation."""
    chance = np.sin(observation_ND.astype(np.float64).sum(1) * 1000)
    if isinstance(space, spaces.Box):
        return np.repeat(chance[:, None], space.shape[0], axis=1).astype(space.dtype) * space.high
    return (chance > 0).astype(np.int64)


def run(env: VectorEnv[Any, Any, Any], num_steps: int, seed: int = 3) -> list[Step]:
    """Return the step of the reset and those after it, checked for what holds in all of them."""
    stepper = Stepper(env)
    steps = [stepper.reset(seed)]
    for _ in range(num_steps):
        steps.append(stepper.step(actions_for(steps[-1].observation_ND, env.single_action_space)))
    stepper.close()
    for step in steps:
        ended = step.terminated_N | step.truncated_N
        assert not (ended & ~step.valid_N).any() and not step.reward_N[~step.valid_N].any()
        assert [episode.env for episode in step.episodes] == np.flatnonzero(ended).tolist()
        assert step.observation_ND.dtype == step.final_ND.dtype == step.reward_N.dtype == np.float32
    return steps


def trajectories(steps: list[Step], num_rows: int) -> list[list[Any]]:
    """For each environment its first ``num_rows`` transitions, without the rows that are filler."""
    rows: list[list[Any]] = [[] for _ in steps[0].valid_N]
    for before, step in zip(steps, steps[1:], strict=False):
        episodes = {episode.env: episode for episode in step.episodes}
        for env in np.flatnonzero(step.valid_N):
            seen = (before.observation_ND, step.reward_N, step.terminated_N, step.truncated_N, step.final_ND, before.start_N)
            rows[env].append([*(part[env].tolist() for part in seen), episodes.get(int(env))])
    assert all(len(row) >= num_rows for row in rows)
    return [row[:num_rows] for row in rows]


def arrays(step: Step) -> list[Any]:
    fields = (getattr(step, name) for name in step.__slots__)
    return [field.tolist() if isinstance(field, np.ndarray) else field for field in fields]


def same(one: list[Step], other: list[Step]) -> bool:
    return [arrays(step) for step in one] == [arrays(step) for step in other]


# -- the modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_known_trajectory(mode: AutoresetMode) -> None:
    """Two steps, then death; two steps, then the clock; all rows at once, so that no mode leaves filler."""
    reset, first, second, third, fourth = run(walks(mode, fixed_length=2, num_envs=2), 4)
    assert reset.start_N.all() and not reset.valid_N.any()
    assert first.observation_ND[:, :2].tolist() == [[0, 1]] * 2 and not first.start_N.any() and first.valid_N.all()
    assert first.final_ND is first.observation_ND and first.episodes == ()
    assert second.terminated_N.all() and not second.truncated_N.any() and second.start_N.all()
    assert second.final_ND[:, :2].tolist() == [[0, 2]] * 2 and second.observation_ND[:, :2].tolist() == [[1, 0]] * 2
    assert third.observation_ND[:, :2].tolist() == [[1, 1]] * 2 and third.reward_N.tolist() == pytest.approx([1, 1], abs=0.11)
    assert fourth.truncated_N.all() and not fourth.terminated_N.any()
    assert [episode.length for episode in fourth.episodes] == [2, 2]
    rewards = third.reward_N.astype(np.float64) + fourth.reward_N
    assert [episode.total_reward for episode in fourth.episodes] == pytest.approx(rewards.tolist())


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, "SameStep", "Disabled"])
def test_modes_without_filler_agree_in_every_bit(mode: AutoresetMode | str) -> None:
    assert same(run(walks(AutoresetMode.SAME_STEP), 60), run(walks(mode), 60))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, "NextStep"])
def test_filler_rows_are_marked_and_nothing_in_them_is_read(mode: AutoresetMode | str) -> None:
    steps = run(walks(mode), 90)
    fillers = [step for step in steps[1:] if not step.valid_N.all()]
    assert fillers and all(step.start_N[~step.valid_N].all() for step in fillers)
    assert all(step.valid_N.any() for step in steps[1:]), "a step that is all filler is taken inside the one before"
    assert trajectories(steps, 50) == trajectories(run(walks(AutoresetMode.SAME_STEP), 60), 50)


@pytest.mark.parametrize(("length", "num_envs"), [(3, 2), (None, 1)])
def test_where_all_rows_end_together_all_modes_agree_in_every_bit(length: int | None, num_envs: int) -> None:
    runs = [run(walks(mode, length, num_envs), 30) for mode in MODES]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_gymnasiums_sync_environments_agree_in_every_bit(env_id: str) -> None:
    def build(mode: AutoresetMode, copy: bool) -> VectorEnv[Any, Any, Any]:
        make = [lambda length=length: gym.make(env_id, max_episode_steps=length) for length in (9, 30, 14)]
        return SyncVectorEnv(make, copy=copy, autoreset_mode=mode)

    runs = [run(build(mode, copy), 80) for mode in MODES for copy in (True, False)]
    assert any(step.truncated_N.any() for step in runs[0]) and all(same(runs[0], other) for other in runs[1:])
    assert all(step.valid_N.all() for step in runs[0][1:])


@pytest.mark.parametrize(("mode", "shared_memory"), [*((mode, True) for mode in MODES), (AutoresetMode.NEXT_STEP, False)])
def test_gymnasiums_async_environments_agree_with_sync(mode: AutoresetMode, shared_memory: bool) -> None:
    make: list[Callable[[], gym.Env[Any, Any]]] = [lambda: gym.make("CartPole-v1")] * 2
    env = AsyncVectorEnv(make, shared_memory=shared_memory, copy=False, context="spawn", autoreset_mode=mode)
    steps = run(env, 60)
    expected = run(SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP), 60)
    if mode is AutoresetMode.NEXT_STEP and not shared_memory:  # its workers would reset a second time
        assert trajectories(steps, 40) == trajectories(expected, 40)
    else:
        assert same(steps, expected)


def test_a_native_vector_environment() -> None:
    steps = run(CartPoleVectorEnv(num_envs=4, max_episode_steps=12), 60)
    assert any(not step.valid_N.all() for step in steps[1:])
    assert sum(len(step.episodes) for step in steps) > 8
    assert all(episode.total_reward == episode.length for step in steps for episode in step.episodes)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_wrapped_around_see_the_same_episodes(mode: AutoresetMode) -> None:
    lengths: list[int] = []
    env = RecordEpisodeStatistics(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3, autoreset_mode=mode))
    steps = run(env, 80)
    assert same(steps, run(make_vector("CartPole-v1", 3), 80))
    lengths += [episode.length for step in steps for episode in step.episodes]
    assert list(env.length_queue) == lengths and len(lengths) > 6


def test_wrappers_that_count_episodes_themselves_get_their_filler_step() -> None:
    env = NormalizeReward(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 3, autoreset_mode=AutoresetMode.NEXT_STEP))
    steps = run(env, 80)
    assert any(not step.valid_N.all() for step in steps[1:])
    plain = trajectories(run(make_vector("CartPole-v1", 3), 80), 50)
    for got, expected in zip(trajectories(steps, 50), plain, strict=True):
        assert [row[0] for row in got] == [row[0] for row in expected]


def test_what_was_returned_does_not_change_later() -> None:
    stepper = Stepper(walks(AutoresetMode.SAME_STEP))
    steps = [stepper.reset(0)]
    copies = [arrays(steps[0])]
    for _ in range(20):
        actions = np.zeros(3, dtype=np.int64)
        steps.append(stepper.step(actions))
        actions[:] = 1
        copies.append(arrays(steps[-1]))
    assert copies == [arrays(step) for step in steps]


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [None, "Sometimes", 3])
def test_an_autoreset_mode_must_be_declared(declared: Any) -> None:
    env = walks(AutoresetMode.SAME_STEP)
    env.metadata = {} if declared is None else {"autoreset_mode": declared}
    with pytest.raises(ValueError, match=rf"of Vector must be one of AutoresetMode\.NEXT_STEP.*got {declared!r}"):
        Stepper(env)


def test_a_single_environment_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a gymnasium.vector.VectorEnv, got Walk. Use make_vector"):
        Stepper(Walk())
    with pytest.raises(ValueError, match="`num_envs` must be >= 1, got 0"):
        make_vector("CartPole-v1", 0)


def test_stepping_needs_a_reset() -> None:
    stepper = Stepper(walks(AutoresetMode.SAME_STEP))
    with pytest.raises(ValueError, match="`step` must follow a reset, but nothing was reset yet"):
        stepper.step(np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="`state_dict` must follow a reset"):
        stepper.state_dict()


class Faulty(Walk):
    """Fails in its second step, in one of several ways."""

    ways: ClassVar[dict[str, Any]] = {"nan": np.nan, "reward": np.inf}

    def __init__(self, way: str) -> None:
        super().__init__(fixed_length=9)
        self.way = way

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self.time == 2 and self.way == "raise":
            raise OSError("the simulator is gone")
        if self.time == 2 and self.way == "nan":
            observation[1] = np.nan
        return observation, np.inf if self.time == 2 and self.way == "reward" else reward, *rest


FAULTS = {
    "raise": r"environment 1 raised OSError in step after 1 steps: the simulator is gone\n.*save it, repair",
    "nan": "environment 1: entry 1 of its observation must be finite",
    "reward": "environment 1: its reward must be finite as float32, got inf",
}


@pytest.mark.parametrize("way", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_faulty_environment_is_named_and_refuses_to_go_on(way: str, mode: AutoresetMode) -> None:
    stepper = Stepper(SyncVectorEnv([Walk, lambda: Faulty(way), Walk], autoreset_mode=mode))
    stepper.reset(0)
    stepper.step(np.zeros(3, dtype=np.int64))
    with pytest.raises(EnvironmentFault, match=FAULTS[way]) as caught:
        stepper.step(np.zeros(3, dtype=np.int64))
    assert caught.value.env_index == 1
    assert way != "raise" or isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ValueError, match="but the environment has failed. Call reset or load_state_dict"):
        stepper.step(np.zeros(3, dtype=np.int64))
    stepper.reset(1)
    assert stepper.step(np.zeros(3, dtype=np.int64)).valid_N.all()


@pytest.mark.filterwarnings("ignore:.*ERROR")  # Gymnasium's own report of a worker that raised
def test_a_faulty_worker_is_named() -> None:
    sound, faulty = lambda: gym.make("CartPole-v1"), lambda: TransformReward(gym.make("CartPole-v1"), lambda _: 1 / 0)
    env = AsyncVectorEnv([sound, faulty], context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
    stepper = Stepper(env)
    stepper.reset(0)
    with pytest.raises(EnvironmentFault, match="environment 1 raised ZeroDivisionError") as caught:
        stepper.step(np.zeros(2, dtype=np.int64))
    assert caught.value.env_index == 1
    stepper.close()


def test_other_vectors_that_raise_are_not_guessed_about() -> None:
    stepper = Stepper(Vector([Walk(), Faulty("raise")], AutoresetMode.SAME_STEP))
    stepper.reset(0)
    stepper.step(np.zeros(2, dtype=np.int64))
    with pytest.raises(EnvironmentFault, match="the environments raised OSError") as caught:
        stepper.step(np.zeros(2, dtype=np.int64))
    assert caught.value.env_index is None


def test_same_step_must_leave_the_last_observation() -> None:
    env = walks(AutoresetMode.SAME_STEP, fixed_length=1)
    step = env.step
    env.step = lambda actions: (*step(actions)[:4], {})
    stepper = Stepper(env)
    stepper.reset(0)
    with pytest.raises(EnvironmentFault, match=r'environment 0: .*`infos\["final_obs"\]`, found none'):
        stepper.step(np.zeros(3, dtype=np.int64))


def test_closing_puts_the_sub_environments_back() -> None:
    env = SyncVectorEnv([Walk, Walk])
    before = list(env.envs)
    stepper = Stepper(env)
    assert env.envs != before
    stepper.detach()
    assert env.envs == before and not env.closed
    with pytest.raises(ValueError, match="but the stepper was detached"):
        stepper.step(np.zeros(2, dtype=np.int64))
    stepper.close()
    assert env.closed
