"""Episodes under way are data: a saved stepper goes on in every bit, or says why it cannot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TransformReward
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics
from torch import Tensor

from morphogen.errors import EnvironmentFault, StateMismatch
from morphogen.rl.episodes import EpisodeLog, EpisodeRecorder
from morphogen.rl.vector import Step, Stepper, make_vector
from morphogen.state.trees import decode, encode

Build = Callable[[], VectorEnv[Any, Any, Any]]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def act(stepper: Stepper, step: Step, num_steps: int, seed: int) -> list[Step]:
    """Act by a generator of the test's own, after ``step``."""
    chance, space, steps = np.random.default_rng(seed), stepper.env.single_action_space, [step]
    for _ in range(num_steps):
        if isinstance(space, spaces.Discrete):
            actions = chance.integers(0, space.n, stepper.num_envs)
        else:
            assert isinstance(space, spaces.Box)
            actions = chance.uniform(space.low, space.high, (stepper.num_envs, *space.shape)).astype(space.dtype)
        steps.append(stepper.step(actions))
    return steps


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """What comes back from a checkpoint: through JSON and a table of tensors."""
    tensors: dict[str, Tensor] = {}
    return decode(json.loads(json.dumps(encode(state, tensors, "stepper"))), tensors)


def plain(steps: list[Step]) -> list[Any]:
    fields = [[getattr(step, name) for name in step.__slots__] for step in steps]
    return [[field.tolist() if isinstance(field, np.ndarray) else field for field in row] for row in fields]


def resumed(build: Build, num_before: int, num_after: int = 60) -> tuple[Stepper, list[Step], list[Step]]:
    """Return a stepper that took over a saved state, its steps, and those of the one that went on."""
    first, second = Stepper(build()), Stepper(build())
    last = act(first, first.reset(5), num_before, seed=1)[-1]
    state = stored(first.state_dict())
    expected = act(first, last, num_after, seed=2)
    second.reset(99)
    got = act(second, second.load_state_dict(state), num_after, seed=2)
    first.close()
    second.close()
    return second, got, expected


def same_from(got: list[Step], expected: list[Step]) -> bool:
    """Whether all agree, of the first only what it hands on: the rest was known to those who saw the step."""
    one, other = got[0], expected[0]
    begins = np.array_equal(one.observation_ND, other.observation_ND) and np.array_equal(one.start_N, other.start_N)
    return bool(begins) and plain(got[1:]) == plain(expected[1:])


ENVIRONMENTS = [
    "CartPole-v1",
    "Pendulum-v1",
    "FrozenLake-v1",
    pytest.param("LunarLander-v3", marks=pytest.mark.skipif(not has("Box2D"), reason="needs Box2D")),
    pytest.param("HalfCheetah-v5", marks=pytest.mark.skipif(not has("mujoco"), reason="needs MuJoCo")),
]


@pytest.mark.parametrize("num_before", [0, 1, 70])
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_the_episodes_under_way_go_on_in_every_bit(env_id: str, num_before: int) -> None:
    stepper, got, expected = resumed(lambda: make_vector(env_id, 3, max_episode_steps=37), num_before)
    assert (stepper.resumed, stepper.resumed_reason) == ("replayed", "")
    assert same_from(got, expected)
    assert any(step.episodes for step in got)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_in_every_autoreset_mode(mode: AutoresetMode) -> None:
    make = [lambda length=length: gym.make("CartPole-v1", max_episode_steps=length) for length in (7, 30, 12)]
    stepper, got, expected = resumed(lambda: SyncVectorEnv(make, autoreset_mode=mode), 21)
    assert stepper.resumed == "replayed" and same_from(got, expected)


def test_a_run_may_be_saved_and_taken_up_many_times() -> None:
    make = [lambda length=length: gym.make("Pendulum-v1", max_episode_steps=length) for length in (9, 31, 14)]

    def build() -> VectorEnv[Any, Any, Any]:
        return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)

    whole = Stepper(build())
    step = whole.reset(0)
    parts = Stepper(build())
    piece = parts.reset(0)
    for turn in range(12):
        expected = act(whole, step, 4, seed=turn)
        got = act(parts, piece, 4, seed=turn)
        assert same_from(got, expected)
        step, state = expected[-1], parts.state_dict()
        parts = Stepper(build())
        piece = parts.load_state_dict(stored(state))
        assert parts.resumed == "replayed"


def test_the_callers_array_of_actions_may_be_used_again() -> None:
    stepper, other, actions = Stepper(make_vector("Pendulum-v1", 2)), Stepper(make_vector("Pendulum-v1", 2)), np.zeros((2, 1))
    stepper.reset(0)
    for value in (2.0, -1.0, 0.5):
        actions[:] = value
        step = stepper.step(actions)
    assert np.array_equal(other.load_state_dict(stepper.state_dict()).observation_ND, step.observation_ND)
    assert other.resumed == "replayed"


def test_statistics_around_it_go_on_too() -> None:
    queues: list[list[int]] = []

    def build() -> VectorEnv[Any, Any, Any]:
        return RecordEpisodeStatistics(make_vector("CartPole-v1", 3))

    stepper, got, expected = resumed(build, 40)
    assert stepper.resumed == "replayed" and same_from(got, expected)
    queues.append(list(stepper.env.length_queue))
    assert queues[0][-3:] == [episode.length for step in expected for episode in step.episodes][-3:]
    assert queues[0] == [episode.length for step in got[1:] for episode in step.episodes]


def test_saved_states_alias_nothing() -> None:
    stepper = Stepper(make_vector("Pendulum-v1", 2))
    last = act(stepper, stepper.reset(0), 9, seed=0)[-1]
    state = stepper.state_dict()
    before = json.dumps(encode(state, table := {}, "x")), {name: tensor.clone() for name, tensor in table.items()}
    act(stepper, last, 9, seed=1)
    other = Stepper(make_vector("Pendulum-v1", 2))
    act(other, other.load_state_dict(state), 250, seed=1)
    after = json.dumps(encode(state, table := {}, "x"))
    assert after == before[0] and all(bool((table[name] == tensor).all()) for name, tensor in before[1].items())


def test_a_failed_step_can_be_saved_as_it_was_before() -> None:
    """The first environment ends and is reset within the step in which the second raises."""
    fail = {"now": False}

    def check(reward: Any) -> Any:
        if fail["now"]:
            raise OSError("gone")
        return reward

    def build() -> VectorEnv[Any, Any, Any]:
        make = [lambda: gym.make("CartPole-v1", max_episode_steps=6), lambda: TransformReward(gym.make("CartPole-v1"), check)]
        return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)

    stepper, whole = Stepper(build()), Stepper(build())
    act(stepper, stepper.reset(0), 5, seed=0)
    last = act(whole, whole.reset(0), 5, seed=0)[-1]
    fail["now"] = True
    with pytest.raises(EnvironmentFault, match="environment 1 raised OSError"):
        stepper.step(np.zeros(2, dtype=np.int64))
    fail["now"] = False
    state = stored(stepper.state_dict())
    got = act(stepper, stepper.load_state_dict(state), 20, seed=3)
    assert stepper.resumed == "replayed" and same_from(got, act(whole, last, 20, seed=3))


# -- where it cannot be replayed ----------------------------------------------------------------------------------------


class Moody(gym.Env[Any, Any]):
    """Draws from a generator of its own, which nobody can save."""

    observation_space: spaces.Space[Any] = spaces.Box(-9, 9, (1,))
    action_space: spaces.Space[Any] = spaces.Discrete(2)

    def __init__(self, what: str) -> None:
        self.chance, self.what = np.random.default_rng(), what

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        draw = self.chance.random()
        if self.what == "generator":
            self.np_random.random(int(9 * draw) + 1)
        observation = np.full(1, draw if self.what == "observation" else 0, dtype=np.float32)
        return observation, draw if self.what == "reward" else 0.0, False, False, {}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("observation", "its observation differs"),
        ("reward", "its rewards differ"),
        ("generator", "it drew other random numbers"),
    ],
)
def test_an_environment_that_does_not_repeat_itself_begins_anew(what: str, reason: str) -> None:
    def build() -> VectorEnv[Any, Any, Any]:
        make: list[Callable[[], gym.Env[Any, Any]]] = [
            lambda: gym.wrappers.FlattenObservation(Moody("none")),
            lambda: Moody(what),
        ]
        return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)

    stepper, got, _ = resumed(build, 12)
    assert stepper.resumed == "fresh"
    assert stepper.resumed_reason == f"environment 1 did not repeat its episode: {reason}"
    assert got[0].start_N.all()


def test_an_episode_that_ends_early_is_not_the_saved_one() -> None:
    first, second = Stepper(make_vector("CartPole-v1", 2)), Stepper(make_vector("CartPole-v1", 2, max_episode_steps=3))
    act(first, first.reset(0), 7, seed=0)
    step = second.load_state_dict(first.state_dict())
    assert second.resumed_reason == "environment 0 did not repeat its episode: it ended at step 3 of 7" and step.start_N.all()


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: CartPoleVectorEnv(num_envs=3, max_episode_steps=9), "CartPoleVectorEnv saves no state and cannot be replayed"),
        (lambda: NormalizeReward(make_vector("CartPole-v1", 3)), "the wrapper NormalizeReward saves no state"),
    ],
)
def test_what_cannot_be_replayed_begins_anew_from_a_seed_of_the_state(build: Build, reason: str) -> None:
    stepper, first, expected = resumed(build, 13)
    assert (stepper.resumed, stepper.resumed_reason) == ("fresh", reason)
    assert first[0].start_N.all() and not np.array_equal(first[0].observation_ND, expected[0].observation_ND)
    _, again, _ = resumed(build, 13)
    assert np.array_equal(first[0].observation_ND, again[0].observation_ND)
    _, later, _ = resumed(build, 14)
    assert not np.array_equal(first[0].observation_ND, later[0].observation_ND)


class Saving(CartPoleVectorEnv):
    """Knows how to save itself."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "arrays": [self.state, self.steps, self.prev_done],
            "chance": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.steps, self.prev_done = (array.copy() for array in state["arrays"])
        self.np_random.bit_generator.state = state["chance"]


@pytest.mark.parametrize("num_before", range(12, 20))
def test_an_environment_that_saves_its_state_is_asked_first(num_before: int) -> None:
    """In NEXT_STEP mode some of these states are saved between an end and its filler row."""
    stepper, got, expected = resumed(lambda: RecordEpisodeStatistics(Saving(num_envs=3, max_episode_steps=15)), num_before)
    assert (stepper.resumed, stepper.resumed_reason) == ("own_state", "") and same_from(got, expected)


def test_a_failed_environment_is_not_asked_for_its_state() -> None:
    stepper = Stepper(Saving(num_envs=2))
    stepper.reset(0)
    with pytest.raises(EnvironmentFault, match="the environments raised AssertionError"):
        stepper.step(np.full(2, 7))
    stepper.load_state_dict(stepper.state_dict())
    assert (stepper.resumed, stepper.resumed_reason) == ("fresh", "when it was saved, the environment has failed")


def test_a_state_of_another_kind_of_environment() -> None:
    saving, plain_env = Stepper(Saving(num_envs=2)), Stepper(make_vector("CartPole-v1", 2))
    saving.reset(0)
    plain_env.load_state_dict(saving.state_dict())
    assert (plain_env.resumed, plain_env.resumed_reason) == ("fresh", "the environment saves no state any more")
    saving.load_state_dict(plain_env.state_dict())
    assert (saving.resumed, saving.resumed_reason) == ("fresh", "the state was saved by another kind of environment")


def test_a_state_of_other_shapes_is_refused_before_anything_changes() -> None:
    two, three, pendulum = (
        Stepper(env) for env in (make_vector("CartPole-v1", 2), make_vector("CartPole-v1", 3), make_vector("Pendulum-v1", 2))
    )
    two.reset(0)
    state = two.state_dict()
    for other, expected in ((three, "3 environments with 4 entries"), (pendulum, "2 environments with 3 entries")):
        step = other.reset(1)
        with pytest.raises(StateMismatch, match=f"must be of {expected}, got 2 with 4"):
            other.load_state_dict(state)
        assert other.resumed is None and np.array_equal(other.state_dict()["observation_ND"], step.observation_ND)


# -- the recorder -------------------------------------------------------------------------------------------------------


def test_generators_of_another_kind_are_noticed() -> None:
    def build(generator: type[np.random.BitGenerator]) -> Stepper:
        env = SyncVectorEnv([lambda: gym.make("CartPole-v1")], autoreset_mode=AutoresetMode.SAME_STEP)
        env.envs[0].unwrapped.np_random = np.random.Generator(generator(3))
        return Stepper(env)

    twister = build(np.random.MT19937)
    last = act(twister, twister.reset(), 5, seed=0)[-1]
    state = stored(twister.state_dict())
    again = build(np.random.MT19937)
    got = act(again, again.load_state_dict(state), 40, seed=1)
    assert again.resumed == "replayed" and same_from(got, act(twister, last, 40, seed=1))
    other = build(np.random.PCG64)
    other.load_state_dict(state)
    assert other.resumed_reason == "environment 0 did not repeat its episode: its random generator is of another kind"


def test_the_log_keeps_only_what_the_episodes_under_way_need() -> None:
    env = SyncVectorEnv([lambda length=length: gym.make("Pendulum-v1", max_episode_steps=length) for length in (10, 15)])
    stepper = Stepper(env)
    step = stepper.reset(0)
    most = 0
    for turn in range(40):
        step = act(stepper, step, 10, seed=turn)[-1]
        log = stepper._log
        assert log is not None
        most = max(most, len(log._actions))
    assert 10 <= most <= 30


def test_a_recorder_remembers_how_its_episode_began() -> None:
    env = EpisodeRecorder(gym.make("CartPole-v1"))
    env.reset(seed=4, options=(options := {"low": -0.01, "high": 0.01}))
    assert env.beginning is not None and (env.beginning.seed, env.beginning.random_state) == (4, None)
    options["low"] = 0.0
    assert env.beginning.options == {"low": -0.01, "high": 0.01}
    state = env.unwrapped.np_random.bit_generator.state
    env.reset()
    assert env.beginning.random_state == state and env.beginning.options is None


def test_options_are_used_again() -> None:
    env = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
    log = EpisodeLog(env)
    observation, _ = env.reset(seed=1, options={"low": 0.01, "high": 0.02})
    log.begin(range(2))
    episodes = log.state_dict()
    assert episodes is not None
    assert np.array_equal(log.replay(1, stored({"it": episodes[1]})["it"]).observation, observation[1])
    log.detach()
