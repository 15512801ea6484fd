"""One torch thread per process, and fresh deterministic streams for tests that want them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.choices import action_config
from morphogen.recipes.policy_file import save_policy
from morphogen.rl import PPO, PPOConfig
from morphogen.rl.policy import PolicyConfig

torch.set_num_threads(1)
os.environ.setdefault("MORPHOGEN_DATA", str(Path(tempfile.gettempdir()) / "morphogen-test-data"))  # not the user's cache


@pytest.fixture(autouse=True)
def _same_chance_for_each_test() -> None:
    """Hosts that a test builds from torch's global stream are the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator of its own for each test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def small_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy file: a recurrent policy for digits in four ticks, hardly trained, that waits only where it has to."""
    return _write_policy(tmp_path_factory.mktemp("policy") / "small.safetensors")


@pytest.fixture(scope="session")
def narrow_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy file for fewer blueprints than some tasks have."""
    return _write_policy(tmp_path_factory.mktemp("policy") / "narrow.safetensors", num_blueprints=4)


def _write_policy(file: Path, **layout: int) -> Path:
    env = GrowthVectorEnv("digits", 2, total_steps=8, tick_steps=2, **layout)
    network = PolicyConfig(hidden=(8,), memory="lstm", memory_width=8, action_gain=4.0)
    settings = {"rollout_steps": 4, "epochs": 1, "normalize_observations": True, "gamma": env.config.reward.gamma}
    agent = PPO(env, PPOConfig(policy=network, action=action_config(), **settings))
    agent.learn(8)
    with torch.no_grad():
        agent.policy.actor.bias[0] = -100.0  # WAIT
    save_policy(agent, env, file, {"command": "morphogen train --task digits", "steps": agent.num_steps})
    agent.close()
    return file
