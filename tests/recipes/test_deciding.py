"""A trained policy in the grow job: it sees what it saw in training, and its memory is part of the run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from morphogen import tasks
from morphogen.envs import GrowthVectorEnv
from morphogen.envs.learned import LearnedPolicy
from morphogen.envs.players import LearnedPlayer
from morphogen.errors import CheckpointError
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.grow import GrowResult, check, grow, resume
from morphogen.recipes.policy_file import load_policy
from morphogen.state import RandomStreams
from morphogen.telemetry.events import Event, discard
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power

STEPS, TICK_STEPS = 20, 2


def config_of(policy: Path, **changes: object) -> GrowConfig:
    settings = {"task": "digits", "repeats": 1, "arms": ("grown",), "total_steps": STEPS, "checkpoint_every_ticks": 1}
    return GrowConfig(policy=str(policy), **{**settings, **changes})


class Recorder(LearnedPolicy):
    """Keeps what it observed and chose; draws the same at the same tick, whosoever asks."""

    seen: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, policy: LearnedPolicy) -> Recorder:
        recorder = cls(*policy._parts, policy.origin)
        recorder.seen = []
        return recorder

    def twin(self) -> LearnedPolicy:
        recorder = Recorder.of(self)
        recorder.seen = self.seen
        return recorder

    def on(self, task: str) -> LearnedPolicy:
        return self.twin()

    def choose(self, observation_ND, masks, starts_N=None, *, generator=None):
        same_everywhere = torch.Generator().manual_seed(len(self.seen))
        chosen = super().choose(observation_ND, masks, starts_N, generator=same_everywhere)
        self.seen.append((observation_ND.copy(), chosen))
        return chosen


def test_it_sees_and_does_in_the_job_what_it_sees_and_does_in_the_environment(small_policy: Path) -> None:
    trained = load_policy(small_policy)
    env_config = trained.origin.env.replace(total_steps=STEPS)
    trained = LearnedPolicy(*trained._parts, dataclasses.replace(trained.origin, env=env_config))

    env = GrowthVectorEnv("digits", 1, config=env_config)
    in_env = Recorder.of(trained)
    player = LearnedPlayer(in_env)
    observation, info = env.reset(seed=[3])
    player.begin([3])
    for _ in range(STEPS // TICK_STEPS):
        observation, _, _, _, info = env.step(player.choose(env, observation, info))

    same_network = RandomStreams(3).child("episode", 0).integer("run")
    in_job = Recorder.of(trained)
    run = ArmRun(config_of(small_policy, seed=same_network), "grown", 0, discard, learned=in_job)
    run.start()
    while not run.done:
        run.run_tick()

    assert len(in_job.seen) == len(in_env.seen) == STEPS // TICK_STEPS  # the first before any training, none at the end
    ops = {int(chosen[0, 0]) for _, chosen in in_env.seen}
    assert len(ops) >= 2  # it does something
    for (seen, chosen), (expected, done) in zip(in_job.seen, in_env.seen, strict=True):
        np.testing.assert_array_equal(chosen, done)
        np.testing.assert_allclose(seen, expected, atol=1e-3)  # AdamW is fused in one of the two


def comparable(result: GrowResult) -> list[dict[str, object]]:
    return [{**dataclasses.asdict(arm), "wall_seconds": 0} for arm in result.results]


def log_of(result: GrowResult) -> list[dict[str, object]]:
    dropped = ("seconds", "wall_seconds", "command", "rows", "config", "policy")
    records = read_records(result.directory / "events.jsonl").records
    return [{name: value for name, value in record.items() if name not in dropped} for record in records]


@pytest.fixture(scope="module")
def finished(small_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> GrowResult:
    return grow(config_of(small_policy), tmp_path_factory.mktemp("grow") / "run")


def test_a_trained_policy_grows_and_exports_a_network(finished: GrowResult, small_policy: Path) -> None:
    assert finished.finished and (finished.directory / "grown.pt2").exists()
    assert (finished.directory / "policy.safetensors").read_bytes() == small_policy.read_bytes()
    decided = [record for record in log_of(finished) if record["event"] == "Decided"]
    assert decided and {record["reason"] for record in decided} == {"chosen by the trained policy"}


@pytest.mark.parametrize("tick", [1, 4, 7])
def test_a_killed_run_goes_on_bit_identically(finished: GrowResult, small_policy: Path, tmp_path: Path, tick: int) -> None:
    copy = shutil.copyfile(small_policy, tmp_path / "policy.safetensors")
    with pytest.raises(PowerCut):
        grow(config_of(copy), tmp_path / "run", sinks=(At("TickMeasured", tick, cut_power),))
    copy.unlink()  # what was begun is what is resumed
    result = resume(tmp_path / "run")
    assert comparable(result) == comparable(finished)
    assert log_of(result) == log_of(finished)


def test_a_rewind_takes_the_policy_s_memory_back(small_policy: Path) -> None:
    events: list[Event] = []
    governor = GrowConfig(policy="wait").governor.replace(snapshot_every=2, probation_steps=1)
    config = config_of(small_policy, inject=("nan_weight@13",), governor=governor)
    run = ArmRun(config, "grown", 0, events.append, learned=load_policy(small_policy))
    run.start()
    states = {}
    while not run.done:
        run.run_tick()
        state = run._decider.state_dict()
        states.setdefault(run.tick, []).append(len(state["watch"]["metrics"]))
    assert any(type(event).__name__ == "Rollback" for event in events)
    assert all(lengths == [tick + 1] * len(lengths) for tick, lengths in states.items())


def test_it_decides_on_the_slots_and_as_often_as_in_training(small_policy: Path) -> None:
    trained = load_policy(small_policy)
    slots = tuple(tasks.get("digits").points)[:1]
    env = trained.origin.env.replace(slots=slots, tick_steps=5)
    narrow = LearnedPolicy(*trained._parts, dataclasses.replace(trained.origin, env=env))
    run = ArmRun(config_of(small_policy), "grown", 0, discard, learned=narrow)
    assert tuple(run.model.stages()) == slots
    run.run_tick()
    assert run.cursor.step == 5
    elsewhere = ArmRun(config_of(small_policy, task="mnist1d"), "grown", 0, discard, learned=narrow)
    assert tuple(elsewhere.model.stages()) == tuple(tasks.get("mnist1d").points)
    assert elsewhere.task.tick_steps == tasks.get("mnist1d").tick_steps


def test_other_arms_are_as_without_it(small_policy: Path) -> None:
    learned = load_policy(small_policy)
    for arm in ("static", "reference"):
        run = ArmRun(config_of(small_policy), arm, 0, discard, learned=learned)
        plain = ArmRun(GrowConfig(task="digits", total_steps=STEPS), arm, 0, discard)
        assert run.task.tick_steps == plain.task.tick_steps
        assert type(run._decider) is type(plain._decider)


def test_bad_policies_are_refused_before_anything_is_written(small_policy: Path, narrow_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="one of wait, random, periodic, heuristic.*, got 'heurstic'. Did you mean 'heuristic'"
    ):
        check(GrowConfig(task="digits", policy="heurstic"))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(small_policy.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is damaged"):
        grow(config_of(torn), tmp_path / "run")
    with pytest.raises(CheckpointError, match="cannot decide about text: `layout.num_blueprints`"):
        grow(config_of(narrow_policy, task="text"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_called_after_the_policy_s_file(small_policy: Path) -> None:
    assert config_of(small_policy).run_name == "digits-small"
    assert GrowConfig(task="digits").run_name == "digits-heuristic"
