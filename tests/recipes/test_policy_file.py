"""Policy files: what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.choices import action_config
from morphogen.errors import CheckpointError
from morphogen.recipes import policy_file
from morphogen.recipes.policy_file import find, load_policy, save_policy
from morphogen.rl import PPO, PPOConfig
from morphogen.rl.policy import PolicyConfig
from morphogen.version import __version__


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a policy file with facts of its header changed."""
    with safetensors.safe_open(source, framework="pt") as opened:
        header = json.loads(opened.metadata()["morphogen"])
    save_file(load_file(source), target, metadata={"morphogen": json.dumps({**header, **changes})})
    return target


@pytest.mark.parametrize("memory", ["none", "gru", "lstm"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_loaded_policy_chooses_what_the_agent_chooses(tmp_path: Path, memory: str, normalize: bool) -> None:
    env = GrowthVectorEnv("digits", 2, total_steps=6, tick_steps=2)
    network = PolicyConfig(hidden=(8,), memory=memory, memory_width=8, action_gain=4.0)
    settings = {"rollout_steps": 3, "epochs": 1, "gamma": env.config.reward.gamma}
    agent = PPO(env, PPOConfig(policy=network, action=action_config(), normalize_observations=normalize, **settings))
    agent.learn(6)
    save_policy(agent, env, tmp_path / "policy.safetensors")
    policy = load_policy(tmp_path)
    policy.start(2)
    observation, info = env.reset(seed=3)
    state, starts = None, np.ones(2, dtype=bool)
    for _ in range(5):
        mask = info["action_mask"]
        expected, state = agent.predict(observation, state, starts, deterministic=True, action_mask=mask)
        chosen = policy.choose(observation, mask, starts)
        np.testing.assert_array_equal(chosen, expected)
        observation, _, starts, _, info = env.step(chosen)
    agent.close()


def test_where_it_comes_from_is_kept(small_policy: Path) -> None:
    origin = load_policy(small_policy).origin
    assert (origin.task, origin.version, origin.facts["steps"]) == ("digits", __version__, 8)
    assert origin.env.total_steps == 8 and origin.env.reward.gamma == origin.gamma
    assert origin.blueprints[1] == "mlp" and len(origin.slots) >= 2


def test_one_flipped_bit_is_noticed(small_policy: Path, tmp_path: Path) -> None:
    content = bytearray(small_policy.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="flipped.safetensors: is damaged"):
        load_policy(tmp_path / "flipped.safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, -3])
def test_a_torn_file_is_refused(small_policy: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "torn.safetensors").write_bytes(small_policy.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"torn.safetensors: (is damaged|must be a policy)"):
        load_policy(tmp_path / "torn.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="must be a policy that `morphogen train` wrote"):
        load_policy(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="gone.safetensors: cannot be read"):
        load_policy(tmp_path / "gone.safetensors")


def test_another_format_is_refused_with_the_version_that_wrote_it(small_policy: Path, tmp_path: Path) -> None:
    file = rewritten(small_policy, tmp_path / "new.safetensors", format="morphogen-policy-9", version="7.1")
    with pytest.raises(CheckpointError, match="format morphogen-policy-1, got morphogen-policy-9. Use .* that wrote it: 7.1"):
        load_policy(file)


def test_other_choices_are_refused(small_policy: Path, tmp_path: Path) -> None:
    choices = policy_file.choices_table() | {"tempo": [1, 2]}
    file = rewritten(small_policy, tmp_path / "other.safetensors", choices=choices)
    with pytest.raises(CheckpointError, match=r"trained with the choices \[1, 2\] of `tempo`"):
        load_policy(file)


def test_other_features_are_refused_by_name(small_policy: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(small_policy, framework="pt") as opened:
        features = json.loads(opened.metadata()["morphogen"])["features"]
    renamed = rewritten(small_policy, tmp_path / "a.safetensors", features=["budget", *features[1:]])
    with pytest.raises(CheckpointError, match="features: .*budget.* changed since"):
        load_policy(renamed)
    swapped = rewritten(small_policy, tmp_path / "b.safetensors", features=[features[1], features[0], *features[2:]])
    with pytest.raises(CheckpointError, match="their order changed since"):
        load_policy(swapped)


def test_features_that_are_scaled_otherwise_are_refused(small_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = policy_file.sample_observations

    def scaled(layout):
        observations = real(layout)
        observations[:, 1] *= 0.5
        return observations

    monkeypatch.setattr(policy_file, "sample_observations", scaled)
    with pytest.raises(CheckpointError, match="progress changed since"):
        load_policy(small_policy)


def test_another_network_than_the_header_says_is_refused(small_policy: Path, tmp_path: Path) -> None:
    network = PolicyConfig(hidden=(16,), memory="lstm", memory_width=8).model_dump(mode="json")
    with pytest.raises(CheckpointError, match="does not fit this version of morphogen"):
        load_policy(rewritten(small_policy, tmp_path / "wide.safetensors", policy=network))
    with pytest.raises(CheckpointError, match="is not a setting of PolicyConfig"):
        load_policy(rewritten(small_policy, tmp_path / "odd.safetensors", policy={"layers": 3}))


def test_what_was_there_stays_whole_when_the_disk_refuses(
    small_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "policy.safetensors"
    shutil.copyfile(small_policy, file)
    env = GrowthVectorEnv("digits", 1, total_steps=6, tick_steps=2)
    agent = PPO(env, PPOConfig(action=action_config()))

    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(Exception, match="No space left"):
        save_policy(agent, env, file)
    assert file.read_bytes() == small_policy.read_bytes() and list(tmp_path.iterdir()) == [file]
    agent.close()


def test_policies_are_found_by_run_file_and_name(small_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match="run: holds no policy.safetensors"):
        find(str(run))
    shutil.copyfile(small_policy, run / "policy.safetensors")
    assert find(str(run)) == run / "policy.safetensors" and find(str(small_policy)) == small_policy
    monkeypatch.setattr(policy_file, "shipped", lambda: {"mnist1d": small_policy})
    assert find("mnist1d") == small_policy
    with pytest.raises(ValueError, match="one of wait, mnist1d, got 'mnist1'. Did you mean 'mnist1d'"):
        find("mnist1", also=("wait",))
