"""The PPO job end to end on a short budget: what it leaves behind, interruption, faults, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from safetensors.torch import load_file

from morphogen.errors import EnvironmentFault, MorphogenError, UpdateDiverged
from morphogen.recipes.environments import check_environment
from morphogen.recipes.ppo import PPOResult, check, resume_ppo, train_ppo
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.run_directory import RunDirectory
from morphogen.rl.config import PPOConfig
from morphogen.rl.policy import PolicyConfig
from morphogen.rl.ppo import PPO
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power, interrupt, terminate

UPDATES = 8
STEPS_PER_UPDATE = 64
AGENT = PPOConfig(num_envs=2, rollout_steps=32, minibatch_size=32, epochs=2, seed=3)
RECURRENT = AGENT.replace(policy=PolicyConfig(memory="lstm"), normalize_observations=True, normalize_rewards=True)
SCHEDULED = RECURRENT.replace(learning_rate={"kind": "linear", "start": 1e-3, "end": 0.0})
SMALL = PPOJobConfig(
    env="CartPole-v1",
    total_steps=UPDATES * STEPS_PER_UPDATE,
    evaluation_episodes=2,
    evaluate_every_steps=150,
    checkpoint_every_updates=3,
    ppo=SCHEDULED,
)


def log_of(directory: Path) -> list[dict[str, object]]:
    """The event log without times and paths."""
    dropped = ("seconds", "wall_seconds", "steps_per_second", "command")
    records = read_records(directory / "events.jsonl").records
    return [{name: value for name, value in record.items() if name not in dropped} for record in records]


def summary_of(directory: Path) -> dict[str, object]:
    summary = json.loads((directory / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name != "wall_seconds"}


def tensors_of(directory: Path) -> dict[str, bytes]:
    """All tensors of the final checkpoint, but the generators that all of the process shares."""
    files = (directory / "policy").glob("*.safetensors")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items() if "generators." not in name}
    assert len(tensors) > 30
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def kinds_of(directory: Path) -> list[object]:
    return [record["event"] for record in read_records(directory / "events.jsonl").records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PPOResult:
    """The undisturbed job that stopped ones are compared with."""
    return train_ppo(SMALL, tmp_path_factory.mktemp("whole") / "run")


def test_every_promised_file_is_there_and_complete(whole: PPOResult) -> None:
    assert whole.finished and not whole.lost_sinks and whole.num_steps == SMALL.total_steps
    for name in ("config.yaml", "events.jsonl", "report.html", "summary.json", "policy"):
        assert (whole.directory / name).exists(), name
    for run in ("training", "evaluation"):
        assert any((whole.directory / "tensorboard" / run).glob("events.out*"))
    assert not any((whole.directory / "checkpoints").glob("*/"))
    assert yaml.safe_load((whole.directory / "config.yaml").read_text())["job"] == "ppo"
    assert RunDirectory.open(whole.directory, PPOJobConfig)[1] == SMALL
    assert "CartPole-v1: PPO" in (whole.directory / "report.html").read_text()


def test_the_summary_holds_the_evaluation(whole: PPOResult) -> None:
    assert whole.evaluation is not None
    summary = summary_of(whole.directory)
    assert summary["finished"] is True and summary["num_steps"] == SMALL.total_steps and summary["num_updates"] == UPDATES
    assert summary["evaluation"] == {
        "mean_return": whole.evaluation.mean_return,
        "std_return": whole.evaluation.std_return,
        "mean_length": whole.evaluation.mean_length,
        "returns": list(whole.evaluation.returns),
        "lengths": list(whole.evaluation.lengths),
    }


def test_the_log_is_whole_and_ordered(whole: PPOResult) -> None:
    log = read_records(whole.directory / "events.jsonl")
    assert log.malformed_count == 0
    kinds = kinds_of(whole.directory)
    assert (kinds[0], kinds[-1]) == ("PPOStarted", "PPOFinished")
    assert kinds.count("Updated") == UPDATES
    evaluated = [record["step"] for record in log.records if record["event"] == "Evaluated"]
    assert evaluated == [192, 320, 512], "after the update that reaches 150 and 300, and at the end, 450 being on its way"


def test_schedules_run_over_the_whole_job(whole: PPOResult, tmp_path: Path) -> None:
    expected = [pytest.approx(1e-3 * (1 - update / UPDATES)) for update in range(UPDATES)]
    assert rates_of(whole.directory) == expected
    own = SMALL.replace(ppo=SCHEDULED.replace(schedule_steps=2 * SMALL.total_steps))
    assert rates_of(train_ppo(own, tmp_path / "run").directory)[-1] == pytest.approx(1e-3 * (1 - 7 / 16))


def rates_of(directory: Path) -> list[object]:
    return [record["learning_rate"] for record in log_of(directory) if record["event"] == "Updated"]


def test_the_saved_policy_is_the_one_that_was_evaluated(whole: PPOResult) -> None:
    agent = PPO.load(whole.directory / "policy")
    again = agent.evaluate(SMALL.evaluation_episodes, seed=SMALL.ppo.seed)
    agent.close()
    assert again == whole.evaluation


def test_evaluating_on_the_way_changes_nothing(whole: PPOResult, tmp_path: Path) -> None:
    plain = train_ppo(SMALL.replace(evaluate_every_steps=None), tmp_path / "run")
    assert kinds_of(plain.directory).count("Evaluated") == 1
    assert tensors_of(plain.directory) == tensors_of(whole.directory)


@pytest.mark.parametrize(
    ("act", "update"),
    [
        (interrupt, 2),
        (terminate, 5),
        (cut_power, 2),
        (cut_power, 4),
        (cut_power, 7),
        (interrupt, UPDATES),
        (cut_power, UPDATES),
    ],
)
def test_a_stopped_job_goes_on_bit_identically(act: Callable[[], None], update: int, tmp_path: Path, whole: PPOResult) -> None:
    out = tmp_path / "run"
    if act is cut_power:
        with pytest.raises(PowerCut):
            train_ppo(SMALL, out, sinks=(At("Updated", update, act),))
    else:
        stopped = train_ppo(SMALL, out, sinks=(At("Updated", update, act),))
        assert not stopped.finished and stopped.evaluation is None
        assert stopped.num_steps == update * STEPS_PER_UPDATE, "it goes no further than the update under way"
        [checkpoint] = (out / "checkpoints").glob("*/")
        assert checkpoint.name == f"step-{stopped.num_steps}", "nothing of it is done again"
    assert not (out / "summary.json").exists() and not (out / "policy").exists()
    result = resume_ppo(out)
    assert result.finished and result.evaluation == whole.evaluation
    assert log_of(out) == log_of(whole.directory)
    assert summary_of(out) == summary_of(whole.directory)
    assert tensors_of(out) == tensors_of(whole.directory)


def test_a_killed_process_loses_nothing_but_time(tmp_path: Path, whole: PPOResult) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(SMALL.model_dump(mode="json")))
    program = f"""
import os, signal
from pathlib import Path
from morphogen.recipes.ppo import train_ppo
from morphogen.recipes.ppo_config import PPOJobConfig
from morphogen.recipes.run_directory import read_config
class Kill:
    def write(self, record):
        if record["event"] == "Updated" and record["update"] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self): pass
here = Path({str(tmp_path)!r})
train_ppo(read_config(here / "job.yaml", PPOJobConfig), here / "run", sinks=(Kill(),))
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    resume_ppo(tmp_path / "run")
    assert log_of(tmp_path / "run") == log_of(whole.directory)
    assert tensors_of(tmp_path / "run") == tensors_of(whole.directory)


def test_resuming_a_finished_job_changes_nothing(whole: PPOResult) -> None:
    before = {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()}
    assert resume_ppo(whole.directory) == whole
    assert {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()} == before


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_ppo(SMALL, out, sinks=(At("Updated", 5, interrupt),))
    [data] = (out / "checkpoints").rglob("model-*.safetensors")
    content, log = data.read_bytes(), (out / "events.jsonl").read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(MorphogenError, match=f"{data.name}: must have {len(content)} bytes"):
        resume_ppo(out)
    assert (out / "events.jsonl").read_bytes() == log
    data.write_bytes(content)
    assert resume_ppo(out).finished


def test_the_arguments_of_the_environments_reach_them_all(tmp_path: Path) -> None:
    config = SMALL.replace(env="Pendulum-v1", env_kwargs={"g": 1.0, "max_episode_steps": 20}, total_steps=64, ppo=AGENT)
    result = train_ppo(config, tmp_path / "run")
    assert result.evaluation is not None and set(result.evaluation.lengths) == {20}
    stopped = train_ppo(config.replace(total_steps=256), tmp_path / "other", sinks=(At("Updated", 2, interrupt),))
    assert resume_ppo(stopped.directory).finished


# -- environments that fail


class Fragile(gym.Env[Any, Any]):
    """Counts its steps over all instances, and does what it is told to from a certain one on."""

    steps = 0
    breaks_at: int | None = None
    how = "raise"

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,))
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 10
        return self._observed(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        Fragile.steps += 1
        self._left -= 1
        is_broken = Fragile.breaks_at is not None and Fragile.steps >= Fragile.breaks_at
        if is_broken and Fragile.how == "raise":
            raise RuntimeError("the motor is on fire")
        return self._observed(), 1e30 if is_broken else 1.0, self._left == 0, False, {}

    def _observed(self) -> np.ndarray[Any, Any]:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


@pytest.fixture
def fragile() -> Iterator[PPOJobConfig]:
    Fragile.steps, Fragile.breaks_at, Fragile.how = 0, None, "raise"
    gym.register("Fragile-v0", entry_point=Fragile)
    yield SMALL.replace(env="Fragile-v0", ppo=AGENT)
    del gym.registry["Fragile-v0"]


@pytest.mark.parametrize(("how", "kind"), [("raise", EnvironmentFault), ("explode", UpdateDiverged)])
def test_a_fault_saves_what_was_learned_and_says_how_to_go_on(
    how: str, kind: type[Exception], tmp_path: Path, fragile: PPOJobConfig
) -> None:
    out = tmp_path / "run"
    Fragile.how, Fragile.breaks_at = how, 4 * STEPS_PER_UPDATE + 60
    fragile = fragile.replace(evaluate_every_steps=None)
    with pytest.raises(kind) as caught:
        train_ppo(fragile, out)
    assert caught.value.__notes__ == [f"What was learned is saved. Go on with: morphogen resume {out}"]
    regular, fault = sorted((out / "checkpoints").glob("*/"), reverse=True)
    assert regular.name == "step-192", "the last regular checkpoint survives"
    assert fault.name == "fault-step-256", "four updates were done"
    assert kinds_of(out)[-1] == "PPOFaulted"
    assert f"Stopped by {kind.__name__}" in (out / "report.html").read_text()
    Fragile.breaks_at = None
    saved = PPO.load(fault)
    saved.close()
    assert saved.num_steps == 256 and all(bool(torch.isfinite(p).all()) for p in saved.policy.parameters())
    assert resume_ppo(out).num_steps == fragile.total_steps
    updates = [record["update"] for record in log_of(out) if record["event"] == "Updated"]
    assert updates == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "PPOFaulted" in kinds_of(out), "what happened stays in the log"


def test_a_fault_in_the_first_rollout_can_be_resumed_too(tmp_path: Path, fragile: PPOJobConfig) -> None:
    Fragile.breaks_at = 5
    with pytest.raises(EnvironmentFault, match="the motor is on fire"):
        train_ppo(fragile, tmp_path / "run")
    Fragile.breaks_at = None
    assert resume_ppo(tmp_path / "run").finished


def test_a_fault_in_an_evaluation_can_be_resumed_too(tmp_path: Path, fragile: PPOJobConfig) -> None:
    Fragile.breaks_at = fragile.total_steps + 3
    with pytest.raises(EnvironmentFault, match="the motor is on fire"):
        train_ppo(fragile.replace(evaluate_every_steps=None), tmp_path / "run")
    Fragile.breaks_at = None
    result = resume_ppo(tmp_path / "run")
    assert result.evaluation is not None and result.evaluation.mean_return == 10.0


# -- what is refused


class Untold(Fragile):
    """Observes what no network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Text(5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"env": "CartPole-v7"}, "`env` must be a registered Gymnasium environment, got 'CartPole-v7'"),
        ({"env": "CartPol-v1"}, "CartPole"),
        ({"env": "Cart Pole!"}, "`env` must"),
        ({"env": "no_such_module:Thing-v0"}, "no_such_module"),
        ({"ppo": AGENT.replace(device="cuda:9")}, "`device`"),
        ({"env": "Untold-v0"}, "`env` must be an environment that PPO can learn in, got 'Untold-v0'"),
        ({"ppo": AGENT.replace(action={"squash": True})}, "squash"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    gym.register("Untold-v0", entry_point=Untold)
    try:
        with pytest.raises(ValueError, match=words):
            train_ppo(SMALL.replace(**changes), tmp_path / "run")
    finally:
        del gym.registry["Untold-v0"]
    assert not (tmp_path / "run").exists()


def test_an_environment_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="CartPole-v1: cannot be made: TypeError: .*'colour'"):
        train_ppo(SMALL.replace(env_kwargs={"colour": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(MorphogenError, match="must be a new or empty directory"):
        train_ppo(SMALL, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


def test_check_accepts_what_is_there() -> None:
    for env in ("CartPole-v1", "Pendulum-v1"):
        check(SMALL.replace(env=env))


# -- video


@pytest.mark.skipif(importlib.util.find_spec("moviepy") is not None, reason="moviepy is installed")
def test_video_without_its_package_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MorphogenError, match=r"`video` needs moviepy.*morphogen\[video\]"):
        train_ppo(SMALL.replace(video=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_video_needs_an_environment_that_renders(fragile: PPOJobConfig) -> None:
    pytest.importorskip("moviepy")
    with pytest.raises(
        ValueError, match="`video` must be left out for Fragile-v0: it does not render 'rgb_array', but nothing"
    ):
        check_environment(fragile.env, {}, video=True)


def test_videos_of_whole_episodes_are_recorded(tmp_path: Path, whole: PPOResult, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    result = train_ppo(SMALL.replace(video=True), tmp_path / "run")
    videos = json.loads((result.directory / "summary.json").read_text())["videos"]
    assert videos == [f"videos/evaluation-episode-{episode}.mp4" for episode in range(2)]
    assert all((result.directory / video).stat().st_size > 1000 for video in videos)
    assert tensors_of(result.directory) == tensors_of(whole.directory), "filming changes nothing"


def test_names_are_safe() -> None:
    names = {SMALL.replace(env=env).run_name for env in ("a/b-v1", "m:n-v0", "x y")}
    assert all("/" not in name and ":" not in name and " " not in name for name in names)
    assert all(first != second for first, second in itertools.combinations(names, 2))
