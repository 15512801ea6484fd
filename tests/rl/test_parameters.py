"""Parameters from one agent to another: whole, copied, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from morphogen.errors import StateMismatch
from morphogen.rl import CriticConfig, ParametersReport, PolicyConfig

EVERYTHING: dict[str, Any] = {
    "normalize_observations": True,
    "normalize_rewards": True,
    "normalize_values": True,
    "kl_penalty": {"kind": "adaptive", "coefficient": 1.0, "target": 0.01},
    "gradient_variance": {"warmup_steps": 2},
}
PARTS = ("gradient_variance", "kl_penalty", "observation_normalizer", "reward_normalizer", "value_normalizer")
MEMORY = PolicyConfig(hidden=(8,), memory="lstm", memory_width=6)


def pair(kit: SimpleNamespace, **settings: Any) -> tuple[Any, Any]:
    """Two agents with different pasts."""
    source, target = (kit.agent(seed=seed, **{**EVERYTHING, **settings}) for seed in (0, 1))
    return source.learn(48), target.learn(72)


def flat(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: flat(value) for name, value in tree.items()}
    return tree.tolist() if isinstance(tree, torch.Tensor | np.ndarray) else tree


def everything(agent: Any) -> Any:
    return flat(agent.get_parameters(include_optimizer=True))


def test_all_that_travels_arrives(kit: SimpleNamespace) -> None:
    source, target = pair(kit)
    given = source.get_parameters(include_optimizer=True)
    assert given["format"] == "v2_full_parameters"
    report = target.set_parameters(given)
    assert report == ParametersReport("v2_full_parameters", tuple(sorted(("optimizer", "policy", "progress", *PARTS))), (), ())
    assert everything(target) == everything(source)
    seen = np.ones((4, 3), np.float32)
    assert target.predict(seen, deterministic=True)[0].tolist() == source.predict(seen, deterministic=True)[0].tolist()
    target.state.verify()


def test_without_moments_they_are_reset_and_the_report_says_so(kit: SimpleNamespace) -> None:
    source, target = pair(kit)
    report = target.set_parameters(source.get_parameters())
    assert report.reset == ("optimizer",)
    assert "optimizer" not in report.loaded
    assert all((value == 0).all() for state in target._parts.optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("form", ["v1_policy_only", "bare weights"])
def test_bare_weights_reset_everything_else(kit: SimpleNamespace, form: str) -> None:
    source, target = pair(kit)
    policy = source.get_parameters()["policy"]
    report = target.set_parameters({"format": form, "policy": policy} if form.startswith("v1") else policy)
    assert report == ParametersReport(form, ("policy",), tuple(sorted((*PARTS, "optimizer"))), ("progress",))
    assert kit.same_weights(source, target)
    fresh = kit.agent(**EVERYTHING).get_parameters()["parts"]
    assert flat({name: target.get_parameters()["parts"][name] for name in PARTS}) == flat({name: fresh[name] for name in PARTS})
    assert target.num_steps == 72


def test_a_missing_part_is_reset(kit: SimpleNamespace) -> None:
    source, target = pair(kit)
    given = source.get_parameters(include_optimizer=True)
    del given["parts"]["kl_penalty"]
    report = target.set_parameters(given)
    assert report.reset == ("kl_penalty",)
    assert target._parts.kl_penalty.coefficient == 1.0


def test_nothing_is_shared_afterwards(kit: SimpleNamespace) -> None:
    source, target = pair(kit)
    given = source.get_parameters(include_optimizer=True)
    kept = copy.deepcopy(given)
    target.set_parameters(given)
    before = everything(source)
    target.learn(48)
    assert everything(source) == before
    assert flat(given) == flat(kept)
    after = everything(target)
    source.learn(48)
    assert everything(target) == after


def test_chance_environments_and_hyperparameters_stay(kit: SimpleNamespace) -> None:
    """Two targets with one past but for a parameter exchange with themselves go on alike."""
    agents = [kit.agent(**EVERYTHING).learn(48) for _ in range(2)]
    config = agents[1].config
    agents[1].set_parameters(agents[1].get_parameters(include_optimizer=True))
    assert agents[1].config is config
    for agent in agents:
        agent.learn(48)
    assert kit.same_weights(*agents)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_memory_is_reset_for_each_environment(kit: SimpleNamespace, num_envs: int) -> None:
    agent = kit.agent(policy=MEMORY, num_envs=num_envs).learn(48)
    assert (agent.memory_state != 0).any()
    agent.set_parameters(agent.get_parameters())
    assert agent.memory_state.shape == (2, 2, num_envs, 6)
    assert (agent.memory_state == 0).all()


def test_agents_with_other_numbers_of_environments_exchange(kit: SimpleNamespace) -> None:
    source = kit.agent(**EVERYTHING, num_envs=2).learn(48)
    target = kit.agent(**EVERYTHING, num_envs=5)
    report = target.set_parameters(source.get_parameters(include_optimizer=True))
    assert (report.reset, report.kept) == ((), ())
    assert everything(target) == everything(source)
    assert target.learn(48).num_steps == source.num_steps + 80  # two rollouts of 8 steps in 5 environments


def _without_a_weight(given: Any) -> None:
    given["policy"].popitem()


def _with_another_weight(given: Any) -> None:
    given["policy"]["extra"] = torch.zeros(1)


def _with_a_misshapen_weight(given: Any) -> None:
    given["policy"][next(iter(given["policy"]))] = torch.zeros(1, 2, 3, 4)


def _with_a_misshapen_moment(given: Any) -> None:
    next(iter(given["optimizer"].values()))["exp_avg"] = torch.zeros(1, 2, 3, 4)


def _with_a_damaged_normaliser(given: Any) -> None:
    given["parts"]["observation_normalizer"]["mean"] = np.zeros(7)


def _with_damaged_statistics(given: Any) -> None:
    given["parts"]["gradient_variance"]["mean"] = {}


def _with_another_part(given: Any) -> None:
    given["parts"]["soul"] = {}


def _of_another_format(given: Any) -> None:
    given["format"] = "v3"


def _with_another_key(given: Any) -> None:
    given["extra"] = 1


def _of_nothing(given: Any) -> None:
    given.clear()


@pytest.mark.parametrize(
    "spoil",
    [
        *(_without_a_weight, _with_another_weight, _with_a_misshapen_weight, _with_a_misshapen_moment),
        *(_with_a_damaged_normaliser, _with_damaged_statistics, _with_another_part),
        *(_of_another_format, _with_another_key, _of_nothing),
    ],
)
def test_what_does_not_fit_is_refused_whole(kit: SimpleNamespace, spoil: Callable[[Any], None]) -> None:
    source, target = pair(kit)
    before, given = everything(target), source.get_parameters(include_optimizer=True)
    spoil(given)
    with pytest.raises(StateMismatch):
        target.set_parameters(given)
    assert everything(target) == before
    target.learn(24)


def test_another_architecture_is_refused_by_name(kit: SimpleNamespace) -> None:
    source, target = kit.agent(critic=CriticConfig(kind="quantile")), kit.agent()
    with pytest.raises(StateMismatch, match="critic"):
        target.set_parameters(source.get_parameters())
