"""The train job end to end on a tiny budget: what it leaves behind, interruption at any moment, faults, what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from morphogen.envs.config import GrowthEnvConfig
from morphogen.errors import EnvironmentFault, MorphogenError, WorkerDied
from morphogen.recipes.policy_file import FILE_NAME, load_policy
from morphogen.recipes.recorded_growth import RecordedGrowth
from morphogen.recipes.run_directory import RunDirectory
from morphogen.recipes.train import TrainResult, resume_train, train
from morphogen.recipes.train_config import AGENT, TrainConfig
from morphogen.rl.ppo import PPO
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power, interrupt, terminate

NUM_ENVS, ROLLOUT_STEPS, UPDATES = 2, 3, 6
SMALL = TrainConfig(
    task="digits",
    total_steps=UPDATES * NUM_ENVS * ROLLOUT_STEPS,
    checkpoint_every_updates=2,
    env=GrowthEnvConfig(total_steps=10, tick_steps=2),
    # Rollouts end within episodes, so that checkpoints find networks half grown.
    ppo=AGENT.replace(num_envs=NUM_ENVS, rollout_steps=ROLLOUT_STEPS, epochs=2, normalize_observations=True, seed=3),
)


def log_of(directory: Path) -> list[dict[str, Any]]:
    """The event log without times and paths."""
    dropped = ("seconds", "wall_seconds", "steps_per_second", "command")
    records = read_records(directory / "events.jsonl").records
    return [{name: value for name, value in record.items() if name not in dropped} for record in records]


def events_of(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in log_of(directory) if record["event"] == kind]


def summary_of(directory: Path) -> dict[str, Any]:
    summary = json.loads((directory / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "wall_seconds"}


def assert_same(directory: Path, whole: TrainResult) -> None:
    """Every result is that of the undisturbed job, the policy to the byte."""
    assert log_of(directory) == log_of(whole.directory)
    assert summary_of(directory) == summary_of(whole.directory)
    assert (directory / FILE_NAME).read_bytes() == (whole.directory / FILE_NAME).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The undisturbed job that stopped ones are compared with."""
    return train(SMALL, tmp_path_factory.mktemp("whole") / "run")


def test_every_promised_file_is_there_and_complete(whole: TrainResult) -> None:
    assert whole.finished and not whole.lost_sinks and whole.num_steps == SMALL.total_steps
    for name in ("config.yaml", "events.jsonl", "report.html", "summary.json", FILE_NAME):
        assert (whole.directory / name).exists(), name
    for run in ("training", "episodes"):
        assert any((whole.directory / "tensorboard" / run).glob("events.out*"))
    assert not any((whole.directory / "checkpoints").glob("*/"))
    assert RunDirectory.open(whole.directory, TrainConfig)[1] == SMALL
    assert "digits: learning when to grow" in (whole.directory / "report.html").read_text()


def test_every_episode_is_in_the_log_and_adds_up(whole: TrainResult) -> None:
    kinds = [record["event"] for record in log_of(whole.directory)]
    assert (kinds[0], kinds[-1], kinds.count("Updated")) == ("TrainStarted", "TrainFinished", UPDATES)
    episodes = events_of(whole.directory, "EpisodeFinished")
    assert len(episodes) == NUM_ENVS * (UPDATES * ROLLOUT_STEPS // 5), "of five decisions each"
    for episode in episodes:
        assert sum(episode["terms"].values()) == pytest.approx(episode["total_reward"])
        assert sum(episode["ops"].values()) == episode["ticks"] == 5
    assert {op for episode in episodes for op, count in episode["ops"].items() if count} >= {"wait", "germinate"}
    for averaged in events_of(whole.directory, "EpisodesAveraged"):
        own = [episode for episode in episodes if episode["step"] == averaged["step"]]
        assert averaged["episodes"] == len(own)
        assert averaged["metric"] == pytest.approx(np.mean([episode["metric"] for episode in own]))
        assert sum(averaged["op"].values()) == pytest.approx(1.0)


def test_the_agent_is_told_of_the_same_returns(whole: TrainResult) -> None:
    returns = [episode["total_reward"] for episode in events_of(whole.directory, "EpisodeFinished")]
    assert whole.recent is not None
    last = events_of(whole.directory, "Updated")[-1]
    assert last["mean_return"] == pytest.approx(np.mean(returns)) == whole.recent.mean_return
    assert summary_of(whole.directory)["recent"]["episodes"] == last["episodes"] == whole.recent.episodes == len(returns)


def test_the_policy_is_that_of_the_agent(whole: TrainResult, tmp_path: Path) -> None:
    stopped = train(SMALL, tmp_path / "run", sinks=(At("Updated", UPDATES, interrupt),))
    [checkpoint] = (stopped.directory / "checkpoints").glob("*/")
    with_env = RecordedGrowth(SMALL.task, NUM_ENVS, config=SMALL.env)
    agent = PPO.load(checkpoint, with_env)
    saved = load_file(whole.directory / FILE_NAME)
    for name, value in agent.get_parameters()["policy"].items():
        assert torch.equal(saved[f"network.{name}"], value), name
    agent.close()
    policy = load_policy(whole.directory)
    assert policy.origin.task == "digits" and policy.origin.gamma == SMALL.env.reward.gamma
    assert policy.origin.facts["steps"] == SMALL.total_steps


@pytest.mark.parametrize(
    ("act", "update"), [(interrupt, 1), (terminate, 5), (cut_power, 1), (cut_power, 3), (cut_power, UPDATES)]
)
def test_a_stopped_job_goes_on_bit_identically(
    act: Callable[[], None], update: int, tmp_path: Path, whole: TrainResult
) -> None:
    out = tmp_path / "run"
    if act is cut_power:
        with pytest.raises(PowerCut):
            train(SMALL, out, sinks=(At("Updated", update, act),))
    else:
        stopped = train(SMALL, out, sinks=(At("Updated", update, act),))
        assert not stopped.finished and stopped.recent is None
        [checkpoint] = (out / "checkpoints").glob("*/")
        assert checkpoint.name == f"step-{stopped.num_steps}", "nothing of it is done again"
    assert not (out / "summary.json").exists() and not (out / FILE_NAME).exists()
    result = resume_train(out)
    assert result.finished and result.recent == whole.recent
    assert_same(out, whole)


def killed_and_resumed(here: Path, whole: TrainResult, kills: int, seed: int, executor: str = "inline") -> None:
    """Train in processes that are killed at random moments, until one comes to the end."""
    config = SMALL.replace(env=SMALL.env.replace(executor=executor))
    (here / "job.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words, moment, log = ["train", "--config", "job.yaml", "--out", "run"], random.Random(seed), here / "run" / "events.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, "-m", "morphogen", *words], cwd=here, env=environment, stderr=subprocess.DEVNULL
        ) as process:
            before, more = (log.stat().st_size if log.exists() else 0), moment.randint(1, 4000)
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if log.exists() and log.stat().st_size > before + more:
                    process.kill()
                    break
                time.sleep(0.002)
        if (here / "run" / "config.yaml").exists():
            words = ["resume", "run"]
    done = subprocess.run([sys.executable, "-m", "morphogen", *words], cwd=here, env=environment, check=False)
    assert done.returncode == 0
    if executor == "inline":
        assert_same(here / "run", whole)
    else:
        assert load_file(here / "run" / FILE_NAME).keys() == load_file(whole.directory / FILE_NAME).keys()
        for name, tensor in load_file(here / "run" / FILE_NAME).items():
            assert torch.equal(tensor, load_file(whole.directory / FILE_NAME)[name]), name


def test_a_killed_process_loses_nothing_but_time(tmp_path: Path, whole: TrainResult) -> None:
    killed_and_resumed(tmp_path, whole, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "executor"), [(2, "inline"), (3, "processes")])
def test_processes_killed_again_and_again_lose_nothing_but_time(
    seed: int, executor: str, tmp_path: Path, whole: TrainResult
) -> None:
    killed_and_resumed(tmp_path, whole, kills=3, seed=seed, executor=executor)


def test_resuming_a_finished_job_changes_nothing(whole: TrainResult) -> None:
    before = {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()}
    assert resume_train(whole.directory) == whole
    assert {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()} == before


def test_watching_changes_nothing(whole: TrainResult, tmp_path: Path) -> None:
    """With a sink that fails on the way, the results are the same."""

    def fail() -> None:
        raise OSError("no space left")

    with pytest.warns(RuntimeWarning, match="At failed"):
        result = train(SMALL, tmp_path / "run", sinks=(At("Updated", 2, fail),))
    assert result.lost_sinks == ("At",)
    assert (result.directory / FILE_NAME).read_bytes() == (whole.directory / FILE_NAME).read_bytes()


@pytest.mark.slow
def test_workers_train_the_same_policy(whole: TrainResult, tmp_path: Path) -> None:
    config = SMALL.replace(env=SMALL.env.replace(executor="processes", num_workers=2))
    result = train(config, tmp_path / "run")
    for name, tensor in load_file(whole.directory / FILE_NAME).items():
        assert torch.equal(load_file(result.directory / FILE_NAME)[name], tensor), name


# -- faults


def test_a_worker_that_died_for_good_stops_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, steps, step = tmp_path / "run", iter(range(10**6)), RecordedGrowth.step

    def dies(env: RecordedGrowth, actions: Any) -> Any:
        if next(steps) == 3 * ROLLOUT_STEPS + 1:
            raise WorkerDied("the worker of the environments 0 to 1 died 4 times in a row", (0, 1))
        return step(env, actions)

    monkeypatch.setattr(RecordedGrowth, "step", dies)
    with pytest.raises(EnvironmentFault, match="died 4 times in a row") as caught:
        train(SMALL, out)
    assert caught.value.__notes__ == [f"What was learned is saved. Go on with: morphogen resume {out}"]
    assert sorted(path.name for path in (out / "checkpoints").glob("*/")) == ["fault-step-18", "step-12"]
    assert "Stopped by EnvironmentFault" in (out / "report.html").read_text()
    result = resume_train(out)
    assert result.finished and result.num_steps == SMALL.total_steps
    assert [update["update"] for update in events_of(out, "Updated")] == [*range(1, UPDATES + 1)]
    assert len(events_of(out, "EpisodesRestarted")) == len(events_of(out, "TrainFaulted")) == 1


def test_where_nothing_can_be_saved_the_last_checkpoint_is_named(
    tmp_path: Path, whole: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, save = iter(range(10**6)), PPO.save

    def dies(agent: PPO, path: Any) -> None:
        if next(saves) == 1:
            raise WorkerDied("the worker of the environments 0 to 1 died 4 times in a row", (0, 1))
        save(agent, path)

    monkeypatch.setattr(PPO, "save", dies)
    out = tmp_path / "run"
    with pytest.raises(WorkerDied) as caught:
        train(SMALL, out)
    assert caught.value.__notes__ == [f"Go on from the last checkpoint with: morphogen resume {out}"]
    resume_train(out)
    assert_same(out, whole)


# -- from a policy that was trained before


def test_it_starts_from_a_policy_and_goes_on_from_it_after_a_cut(whole: TrainResult, tmp_path: Path) -> None:
    given = tmp_path / "given.safetensors"
    given.write_bytes((whole.directory / FILE_NAME).read_bytes())
    config = SMALL.replace(start_from=str(given), ppo=SMALL.ppo.replace(learning_rate=1e-12, normalize_observations=False))
    result = train(config, tmp_path / "run")
    for name, tensor in load_policy(given).weights().items():
        torch.testing.assert_close(load_policy(result.directory).weights()[name], tensor, rtol=0, atol=1e-8)
    with pytest.raises(PowerCut):
        train(config, tmp_path / "cut", sinks=(At("Updated", 1, cut_power),))  # before the first checkpoint
    given.unlink()  # the run has its own
    resume_train(tmp_path / "cut")
    assert_same(tmp_path / "cut", result)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("nowhere", "`policy` must be a run directory or a policy file"),
        ("small", "does not fit the agent that `ppo` describes"),
        ("narrow", "Give the environment as many places"),
    ],
)
def test_a_policy_it_cannot_start_from_is_said_before_anything_is_written(
    start: str, words: str, small_policy: Path, narrow_policy: Path, tmp_path: Path
) -> None:
    files = {"small": str(small_policy), "narrow": str(narrow_policy)}
    with pytest.raises((ValueError, MorphogenError), match=words):
        train(SMALL.replace(start_from=files.get(start, start)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": SMALL.env.replace(slots=("blok1",))}, "blok1"),
        ({"env": SMALL.env.replace(num_slots=1)}, "num_slots"),
        ({"env": SMALL.env.replace(device="cuda:9")}, "`device`"),
        ({"ppo": SMALL.ppo.replace(device="cuda:9")}, "`device`"),
        ({"ppo": SMALL.ppo.replace(action={"squash": True})}, "squash"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(SMALL.replace(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_here_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORPHOGEN_DATA", str(tmp_path / "nothing"))
    with pytest.raises(MorphogenError, match="cifar10"):
        train(SMALL.replace(task="cifar10"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(MorphogenError, match="must be a new or empty directory"):
        train(SMALL, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]
