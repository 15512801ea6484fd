"""The Ray engine on a Ray of this machine: what every engine must, and what actors bring with them."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import ray

from morphogen.errors import MorphogenError
from morphogen.pbt import PBTConfig, PopulationResult, PopulationTrainer
from morphogen.pbt.engines.hosting import Birth, Succession
from morphogen.pbt.engines.ray import RayEngine
from morphogen.pbt.events import MemberExploited, MemberLost, MemberReported
from morphogen.pbt.snapshots import read_snapshot
from morphogen.testing.engine_members import START, troubled_member
from morphogen.testing.engines import ENGINE_CHECKS, EngineCase

Settings = Callable[..., PBTConfig]
Facts = Callable[[PopulationResult], Any]
PAIR: dict[str, Any] = {"population_size": 2, "truncation_ratio": 0.5, "total_steps": 8, "perturbation_interval": 4}


@pytest.fixture(scope="module")
def local_ray() -> Generator[None]:
    """A Ray of two cores, whose workers are not put behind everything else on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        memory = {"object_store_memory": 100_000_000}
        ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, **memory)
        yield
        ray.shutdown()


def test_a_run_is_the_same_as_inline(local_ray: None, settings: Settings, facts_of: Facts, tmp_path: Path) -> None:
    ours = PopulationTrainer(troubled_member, settings(**PAIR), "ray", directory=tmp_path / "ray").run()
    theirs = PopulationTrainer(troubled_member, settings(**PAIR), "inline", directory=tmp_path / "inline").run()
    assert ours.finished and len(ours.exploits) == 1
    assert facts_of(ours) == facts_of(theirs)
    snapshots = [{file.name for file in (tmp_path / name).rglob("*.safetensors")} for name in ("ray", "inline")]
    assert snapshots[0] == snapshots[1] and snapshots[0], "names are digests of all that a member is"
    assert ray.is_initialized(), "it was there before"


@pytest.mark.slow
@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_ray(local_ray: None, check: Callable[[EngineCase], None]) -> None:
    check(EngineCase("ray", RayEngine))


@pytest.mark.slow
def test_a_member_whose_process_is_killed_takes_over_another_one(local_ray: None, settings: Settings) -> None:
    seen: list[Any] = []
    factory = functools.partial(troubled_member, troubles={1: "dies"})  # by SIGKILL, in its second interval
    result = PopulationTrainer(factory, settings(**{**PAIR, "total_steps": 16}), "ray", emit=seen.append).run()
    (lost,) = [event for event in seen if isinstance(event, MemberLost)]
    assert (lost.member, lost.interval) == (1, 2) and "its actor died" in lost.problem
    (rescue,) = [event for event in seen if isinstance(event, MemberExploited) and event.interval == 2]
    assert (rescue.member, rescue.source) == (1, 0)
    assert result.finished and len(result.reports) == 8
    assert {(report.interval, report.member) for report in result.reports if report.problem} == {(2, 1)}


@pytest.mark.slow
def test_an_actor_killed_between_two_intervals_costs_nothing(
    local_ray: None, settings: Settings, facts_of: Facts, tmp_path: Path
) -> None:
    class Unlucky(RayEngine):
        kills = 1

        def lost(self) -> set[int]:
            if self.kills:
                self.kills -= 1
                handle = self._actors[1].handle
                ray.kill(handle)
                with pytest.raises(ray.exceptions.RayActorError):
                    while True:  # it is not dead at once
                        ray.get(handle.start.remote())
            return super().lost()

    engine = Unlucky(troubled_member, "score")
    ours = PopulationTrainer(troubled_member, settings(**PAIR), engine, directory=tmp_path).run()
    assert not engine.kills
    assert facts_of(ours) == facts_of(PopulationTrainer(troubled_member, settings(**PAIR), "inline").run())


@pytest.mark.slow
def test_asynchronous_members_leave_their_parameters(local_ray: None, settings: Settings, tmp_path: Path) -> None:
    many = {"population_size": 3, "truncation_ratio": 0.34, "ready_fraction": 1.0, "total_steps": 24}
    rules = settings(**many, synchronous=False)

    def stop_in_the_middle(event: object) -> None:
        if isinstance(event, MemberReported) and event.interval == 3:
            trainer.stop()

    trainer = PopulationTrainer(troubled_member, rules, "ray", directory=tmp_path, emit=stop_in_the_middle)
    assert not trainer.run().finished
    result = PopulationTrainer(troubled_member, rules, "ray", directory=tmp_path).run()
    assert result.finished and len(result.reports) == 24
    assert result.exploits and not any(exploit.refused for exploit in result.exploits)


@pytest.mark.slow
def test_a_member_that_goes_on_can_be_read_before_it_reports_again(local_ray: None, tmp_path: Path) -> None:
    engine = RayEngine(troubled_member, "score")
    engine.begin([Birth(member, START, member) for member in (0, 1)])
    engine.submit(0, 5)
    assert engine.next(60) is not None
    digest, _ = engine.save(0, str(tmp_path))
    engine.begin([Birth(0, START, 0, read_snapshot(str(tmp_path), digest))])
    engine.submit(0, 9, publish="copy")
    parcel = engine.read(0, "copy")
    assert parcel is not None and engine.take_over(Succession(1, START, 7, "copy"), parcel) == ""
    assert engine.values(1)["num_steps"] == 5
    assert engine.next(60) is not None and engine.values(0)["num_steps"] == 9
    engine.close()


@pytest.mark.slow
def test_gpus_are_shared_and_one_member_too_many_finds_no_room(local_ray: None) -> None:
    births = [Birth(member, START, member) for member in range(3)]
    engine = RayEngine(troubled_member, "score", num_gpus_per_member=0.5)
    assert engine.begin(births[:2]) == {}
    assert [seen_gpus(engine, member) for member in (0, 1)] == ["0", "0"]
    engine._start_seconds = 1.0
    problems = engine.begin(births[2:])
    assert problems.keys() == {2} and "it asks for 0 CPU, 0.5 GPU, the cluster has 2 CPU, 1 GPU" in problems[2]
    engine.end([0])
    engine._start_seconds = 60.0
    assert engine.begin(births[2:]) == {}, "who waited takes the room that was left"
    engine.close()


def seen_gpus(engine: RayEngine, member: int) -> str:
    call = engine._actors[member].handle.__ray_call__.remote
    return ray.get(call(lambda host: __import__("os").environ["CUDA_VISIBLE_DEVICES"]))


@pytest.mark.slow
def test_a_run_that_finds_no_room_at_its_beginning_ends(local_ray: None, settings: Settings) -> None:
    options = {"num_cpus_per_member": 1.5, "start_seconds": 1.0}
    with pytest.raises(
        MorphogenError, match="its actor has not started within 1 s: it asks for 1.5 CPU, 0 GPU, the cluster has 2"
    ):
        PopulationTrainer(troubled_member, settings(**PAIR), "ray", options=options).run()


def test_a_factory_that_cannot_be_sent_is_refused(local_ray: None) -> None:
    lock = threading.Lock()
    with pytest.raises(ValueError, match="`member_factory` and options must be what Ray can use"):
        RayEngine(lambda place, hyperparameters, seed: lock, "score")


def test_an_address_is_refused_where_ray_runs(local_ray: None) -> None:
    with pytest.raises(ValueError, match="`address` must be left out"):
        RayEngine(troubled_member, "score", address="auto")


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    ray.shutdown()
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))  # and nobody listens at it
        port = mine.getsockname()[1]
        with pytest.raises(MorphogenError, match=f"Ray cannot be reached at '127.0.0.1:{port}'"):
            RayEngine(troubled_member, "score", address=f"127.0.0.1:{port}")


@pytest.mark.parametrize("wrong", [{"num_cpus_per_member": -1}, {"num_gpus_per_member": float("nan")}, {"start_seconds": 0}])
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be "):
        RayEngine(troubled_member, "score", **wrong)


def test_without_ray() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from morphogen.pbt import PBTConfig, PopulationTrainer\n"
        "spaces = {'x': {'kind': 'float', 'low': 0, 'high': 1}}\n"
        "config = PBTConfig(total_steps=2, perturbation_interval=1, hyperparameters=spaces)\n"
        "PopulationTrainer(lambda place, hyperparameters, seed: None, config, 'ray')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last == "morphogen.errors.MorphogenError: Ray is not installed. Run: pip install 'morphogen[ray]'"
