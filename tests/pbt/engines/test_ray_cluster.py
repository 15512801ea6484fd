"""The Ray engine on a cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from morphogen.pbt import PBTConfig, PopulationTrainer
from morphogen.pbt.engines.hosting import Birth, Succession
from morphogen.pbt.engines.ray import RayEngine
from morphogen.pbt.events import MemberExploited, MemberLost, MemberReported

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
SETTINGS: dict[str, Any] = {"population_size": 4, "truncation_ratio": 0.25, "total_steps": 12, "perturbation_interval": 3}


class Heavy:
    """Climbs, and carries a megabyte with it: too much for Ray to keep it where its references are."""

    def __init__(self, place: int) -> None:
        self.place, self.weights, self.rate = place, torch.zeros(250_000), 0.0

    def train(self, until: int) -> float:
        time.sleep(0.5 * self.place)
        self.weights += self.rate
        return float(self.weights[0])

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        return {"weights": self.weights.clone()}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        self.weights = values["weights"].clone()

    def apply_hyperparameters(self, values: Mapping[str, Any]) -> None:
        self.rate = values["learning_rate"]


def heavy(place: int, hyperparameters: Mapping[str, Any], seed: int) -> Heavy:
    return Heavy(place)


@pytest.fixture
def cluster() -> Generator[Cluster]:
    """Two nodes of two cores; that one of them is dead is noticed within two seconds."""
    small = {"num_cpus": 2, "object_store_memory": 100_000_000}
    health = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_LOG_TO_DRIVER", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False, "_system_config": health})
        cluster.add_node(**small)
        cluster.wait_for_nodes()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def kill_a_node(cluster: Cluster) -> None:
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
def test_a_population_outlives_a_node(cluster: Cluster, settings: Callable[..., PBTConfig], tmp_path: Path) -> None:
    seen: list[Any] = []

    def watch(event: object) -> None:
        if isinstance(event, MemberReported) and event.interval == 2 and cluster.worker_nodes:
            kill_a_node(cluster)
        seen.append(event)

    rules = settings(**SETTINGS, optimizer_exploit_strategy="reset")
    where = {"address": cluster.address}
    result = PopulationTrainer(heavy, rules, "ray", directory=tmp_path, options=where, emit=watch).run()
    assert result.finished and len(result.reports) == 16
    lost = {event.member for event in seen if isinstance(event, MemberLost)}
    rescued = {event.member for event in seen if isinstance(event, MemberExploited) and event.interval == 2}
    assert lost and lost <= rescued
    assert {report.interval for report in result.reports if report.problem} == {2}
    assert not ray.is_initialized(), "the engine connected, and the engine left"


@pytest.mark.slow
def test_parameters_on_a_dead_node_are_lost_and_whoever_wanted_them_is_not(cluster: Cluster) -> None:
    engine = RayEngine(heavy, "score", address=cluster.address)
    births = [Birth(member, {"learning_rate": 0.5}, member) for member in range(4)]
    assert engine.begin(births) == {}
    nodes = {member: node_of(engine, member) for member in range(4)}
    (head,) = {*nodes.values()} - {cluster.worker_nodes.copy().pop().node_id}
    there = [member for member, node in nodes.items() if node != head]
    here = [member for member, node in nodes.items() if node == head]
    assert len(there) == len(here) == 2, "members are spread over the nodes"
    parcels = {member: engine.read(member, "reset") for member in range(4)}
    kill_a_node(cluster)
    successions = [Succession(member, {"learning_rate": 1.0}, 7, "reset") for member in range(4)]
    problem = engine.take_over(successions[here[0]], parcels[there[0]])
    assert problem == "the parameters that it was to take over were lost with their node"
    assert engine.take_over(successions[here[0]], parcels[here[-1]]) == ""
    assert engine.read(there[0], "reset") is None
    assert engine.lost() == {*there}
    assert engine.begin([births[member] for member in there]) == {}
    assert engine.lost() == set()
    assert all(engine.take_over(successions[member], parcels[here[0]]) == "" for member in there)
    engine.close()


def node_of(engine: RayEngine, member: int) -> str:
    handle = engine._actors[member].handle
    return ray.get(handle.__ray_call__.remote(lambda host: ray.get_runtime_context().get_node_id()))
