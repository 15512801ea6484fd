"""Several processes train one model: one of them sees a fault, all come to one verdict. Real processes, over gloo.

This file runs itself as each of the processes; all scenarios of one world share its processes, as starting them takes longest.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from morphogen.errors import MorphogenError, StateMismatch
from morphogen.governor import Governor, GovernorConfig
from morphogen.governor.consensus import Consensus
from morphogen.governor.findings import Finding, Observation
from morphogen.governor.sensors import Sensors
from morphogen.growth import Stage
from morphogen.state import TrainingState, draw_from
from morphogen.testing import LENIENT, HostCase, lead_to

CONFIG = GovernorConfig(snapshot_every=10, probation_steps=15)
NAMES = ("loss", "grad_norm", "output_spread", "prediction_entropy")
Record = dict[str, Any]


class Run:
    """One process' share of a data-parallel run."""

    def __init__(self, config: GovernorConfig = CONFIG, **options: Any) -> None:
        self.rank = dist.get_rank()
        with draw_from(torch.Generator().manual_seed(0)):
            model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        model.register_buffer("large", torch.zeros(config.sensors.max_buffer_size + 1))
        self.model = DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.data = torch.Generator().manual_seed(10 + self.rank)
        self.state = TrainingState(self.model, self.optimizer, extras={"data": self.data})
        self.governor = Governor(self.state, config, **options) if config else None
        self.record: Record = {"actions": [], "to": [], "error": None}

    def step(self, seen: Callable[[Tensor], Tensor] | None = None, **given: Any) -> None:
        """``seen`` changes the loss that this process shows to its governor."""
        targets = torch.randint(3, (16,), generator=self.data)
        inputs = torch.randn(16, 6, generator=self.data) + targets[:, None]
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.model(inputs), targets)
        loss.backward()
        verdict = self.governor.observe(seen(loss.detach()) if seen else loss, **given)
        self.record["actions"].append(verdict.action.value)
        if verdict.rollback is not None:
            self.record["to"].append(verdict.rollback.to_step)
        if verdict.proceed:
            self.optimizer.step()

    def steps(self, count: int, at: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Run:
        for number in range(count):
            self.step((at or {}).get(number))
        return self

    def result(self) -> Record:
        weights = [parameter.detach() for parameter in self.model.parameters()]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (*weights, *moments))).hexdigest()
        finite = all(bool(tensor.isfinite().all()) for tensor in self.state.capture().table("model").values())
        return {**self.record, "digest": digest, "finite": finite}


def is_last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def only_in_the_last(change: Callable[[Tensor], Tensor], *steps: int) -> dict[int, Callable[[Tensor], Tensor]]:
    return dict.fromkeys(steps, change) if is_last() else {}


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda value: value * factor


def healthy() -> Record:
    return Run().steps(40).result()


def nan_loss() -> Record:
    return Run().steps(40, only_in_the_last(times(math.nan), 30)).result()


def infinite_norm() -> Record:
    run = Run()
    for number in range(10):
        run.step(grad_norm=math.inf if is_last() and number == 7 else 1.0)
    return run.result()


def spikes() -> Record:
    return Run().steps(110, only_in_the_last(times(1e3), 100, 101, 102)).result()


def spikes_between_checks() -> Record:
    return Run(CONFIG.replace(check_every=4)).steps(110, only_in_the_last(times(math.nan), 101)).result()


def damaged_buffer() -> Record:
    run = Run().steps(50)
    if is_last():
        run.model.module.large[3] = math.nan
    run.step(times(math.nan) if is_last() else None)
    return run.steps(5).result()


def damaged_candidate() -> Record:
    run = Run().steps(47)
    if is_last():
        run.model.module.large[3] = math.nan
    return run.steps(40).result()


def configs_that_differ() -> Record:
    return Run(CONFIG.replace(snapshot_every=3) if is_last() else CONFIG).result()


def generations_that_differ() -> Record:
    run = Run().steps(45)
    if is_last():
        run.governor._keeper.take(45, 45, 45)
    return run.steps(4).result()


def collapse() -> Record:
    return Run(CONFIG.replace(max_rewinds=1)).steps(100, only_in_the_last(times(math.nan), *range(20, 100))).result()


def each_for_itself() -> Record:
    return Run(distributed=False).steps(20, only_in_the_last(times(math.nan), 10)).result()


def quarantined_seed() -> Record:
    case = HostCase("NC")
    model = case.model(config=LENIENT)
    model.germinate("early", "low_rank")
    lead_to(model, "early", Stage.TRAINING, case.example())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    governor = Governor(TrainingState(model, optimizer), CONFIG)
    record: Record = {"quarantined": [], "actions": []}
    for number in range(6):
        optimizer.zero_grad()
        loss = model(case.example(num_samples=16)).square().mean()
        loss.backward()
        if number == 4 and is_last():
            model.owners()["early"][0][1].grad.fill_(math.nan)
        verdict = governor.observe(loss)
        record["actions"].append(verdict.action.value)
        record["quarantined"].append(list(verdict.quarantined))
        optimizer.step()
    return {**record, "stage": model.stages()["early"].name}


def worst_of(consensus: Consensus, values: Sequence[float]) -> dict[str, float]:
    return consensus.worst([dict(zip(NAMES, values, strict=False))], NAMES, {"steps": 3})[0]


def reduced() -> Record:
    """Rank r has r + 1 for each number; then a NaN here and infinities there."""
    everybody, rank = Consensus.of(True), dist.get_rank()
    mixed = [[math.nan, 1.0, math.inf, -1.0], [math.inf, math.inf, 0.0, -math.inf], [5.0, -1.0, 2.0, -3.0]][rank % 3]
    try:
        everybody.check_same("rank", rank)
        agreed = True
    except StateMismatch as error:
        agreed = str(error)
    everybody.check_same("zero", 0)
    return {
        "worst": [*worst_of(everybody, [rank + 1.0] * 4).values()],
        "mixed": [*worst_of(everybody, mixed).values()],
        "missing": worst_of(everybody, [1.0, 2.0] if is_last() else [1.0]),
        "any": everybody.any([rank == 0, is_last(), False]),
        "agreed": agreed,
    }


def subgroup() -> dist.ProcessGroup:
    """A group of all, broken by what follows without harm to the others."""
    return dist.new_group(timeout=datetime.timedelta(seconds=10))


def outputs_of_one_process_alone() -> Record:
    """The last batch of an epoch may be too small, in one process, to say anything about the outputs."""
    run = Run(distributed=subgroup())
    for number in range(3):
        rows = 2 if number == 1 and is_last() else 16
        run.step(logits=torch.arange(rows * 3.0).reshape(rows, 3))
    return run.result()


@dataclasses.dataclass
class Limit:
    """Alarms while a metric of the caller is not finite."""

    name: str = "limit"

    def inspect(self, observation: Observation) -> Finding | None:
        value = observation.metrics.get("kl", 0.0)
        return None if value < 1.0 else Finding(detector=self.name, message="kl", value=value, in_state=True)

    def accept(self, observation: Observation) -> None: ...

    def forget(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def metric_of_one_process_alone() -> Record:
    run = Run(distributed=subgroup(), detectors=[Limit()])
    for number in range(6):
        run.step(metrics={"kl": 2.0 if number == 3 and is_last() else 0.5})
    return run.result()


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many processes there are, and what they do."""

    size: int
    scenarios: tuple[Callable[[], Record], ...]


PLANS: dict[str, Plan] = {
    "two": Plan(
        2,
        (
            *(healthy, nan_loss, infinite_norm, spikes, spikes_between_checks, damaged_buffer),
            *(collapse, each_for_itself, quarantined_seed, reduced, damaged_candidate, configs_that_differ),
            *(generations_that_differ, outputs_of_one_process_alone, metric_of_one_process_alone),
        ),
    ),
    "three": Plan(3, (nan_loss, spikes, reduced)),
}


def main(rank: int, plan: Plan, directory: Path) -> None:
    """Be one process: run every scenario and write down what came of it."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", timeout, rank=rank, world_size=plan.size)
    for scenario in plan.scenarios:
        try:
            record = scenario()
        except (MorphogenError, RuntimeError) as error:
            record = {"error": type(error).__name__, "message": str(error)}
        (directory / f"{scenario.__name__}-{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


class World:
    """What each process of one world wrote down."""

    def __init__(self, name: str, directory: Path) -> None:
        self.size, self.directory = PLANS[name].size, directory
        command = [sys.executable, "-W", "ignore", __file__]
        started = [
            subprocess.Popen([*command, str(rank), name, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(self.size)
        ]
        try:
            self.output = [process.communicate(timeout=240)[0].decode() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()

    def __getitem__(self, scenario: Callable[[], Record]) -> list[Record]:
        paths = [self.directory / f"{scenario.__name__}-{rank}.json" for rank in range(self.size)]
        assert all(path.exists() for path in paths), "\n".join(self.output)
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    return functools.cache(lambda name: World(name, tmp_path_factory.mktemp(name)))


def check_same(records: list[Record]) -> Record:
    """All processes did the same and are the same, finite ones."""
    assert all(record["error"] is None for record in records), records
    for key in ("actions", "to", "digest"):
        assert all(record[key] == records[0][key] for record in records), key
    assert all(record["finite"] for record in records)
    return records[0]


def test_a_healthy_run_of_several_processes(worlds: Callable[[str], World]) -> None:
    assert set(check_same(worlds("two")[healthy])["actions"]) == {"proceed"}


@pytest.mark.parametrize("world", ["two", "three"])
def test_a_nan_loss_in_one_process_is_skipped_in_all(worlds: Callable[[str], World], world: str) -> None:
    actions = check_same(worlds(world)[nan_loss])["actions"]
    assert actions == ["proceed"] * 30 + ["skip"] + ["proceed"] * 9


def test_a_norm_given_by_one_process_counts_for_all(worlds: Callable[[str], World]) -> None:
    actions = check_same(worlds("two")[infinite_norm])["actions"]
    assert actions == ["proceed"] * 7 + ["skip"] + ["proceed"] * 2


@pytest.mark.parametrize("world", ["two", "three"])
def test_a_spike_that_one_process_alone_sees_rewinds_all_to_the_same_generation(
    worlds: Callable[[str], World], world: str
) -> None:
    record = check_same(worlds(world)[spikes])
    assert record["actions"][100:103] == ["skip", "skip", "rewind"] and record["actions"].count("rewind") == 1
    assert len(record["to"]) == 1 and 50 < record["to"][0] < 100


def test_a_fault_of_one_process_between_two_checks_rewinds_all(worlds: Callable[[str], World]) -> None:
    record = check_same(worlds("two")[spikes_between_checks])
    assert record["actions"][103] == "rewind" and record["actions"].count("rewind") == 1


def test_a_buffer_damaged_in_one_process_rewinds_all(worlds: Callable[[str], World]) -> None:
    record = check_same(worlds("two")[damaged_buffer])
    assert record["actions"][50] == "rewind" and set(record["actions"][51:]) == {"proceed"}


def test_a_snapshot_damaged_in_one_process_is_good_in_none(worlds: Callable[[str], World]) -> None:
    record = check_same(worlds("two")[damaged_candidate])
    assert record["actions"].count("rewind") == 1 and record["to"][0] < 47


def test_what_differs_is_an_error_everywhere(worlds: Callable[[str], World]) -> None:
    for scenario, what in ((configs_that_differ, "config"), (generations_that_differ, "newest snapshot")):
        for record in worlds("two")[scenario]:
            assert record["error"] == "StateMismatch" and f"`{what}` must be the same in all processes" in record["message"]


def test_a_collapse_is_one_of_all(worlds: Callable[[str], World]) -> None:
    records = worlds("two")[collapse]
    assert [record["error"] for record in records] == ["TrainingCollapsed"] * 2
    assert records[0]["message"] == records[1]["message"]


def test_processes_can_be_left_to_themselves(worlds: Callable[[str], World]) -> None:
    first, last = worlds("two")[each_for_itself]
    assert set(first["actions"]) == {"proceed"} and last["actions"][10] == "skip"


def test_a_seed_at_fault_in_one_process_is_taken_out_of_all(worlds: Callable[[str], World]) -> None:
    first, last = worlds("two")[quarantined_seed]
    assert first == last and first["stage"] == "PRUNED" and set(first["actions"]) == {"proceed"}
    assert first["quarantined"] == [[], [], [], [], ["early"], []]


@pytest.mark.parametrize("world", ["two", "three"])
def test_the_worst_of_all_processes(worlds: Callable[[str], World], world: str) -> None:
    size = PLANS[world].size
    for record in worlds(world)[reduced]:
        assert record["worst"] == [size, size, 1.0, 1.0], "of spread and entropy the lowest is the worst"
        assert math.isnan(record["mixed"][0])
        assert record["mixed"][1:3] == [math.inf, math.inf] and math.isinf(record["mixed"][3])
        assert record["any"] == [True, True, False]
        assert record["missing"] == {"loss": 1.0, "grad_norm": 2.0}, "what one process measured counts for all"
        assert f"`rank` must be the same in all processes, got 0 to {size - 1}" in record["agreed"]


def test_a_number_that_one_process_has_not_measured_is_no_trouble(worlds: Callable[[str], World]) -> None:
    assert set(check_same(worlds("two")[outputs_of_one_process_alone])["actions"]) == {"proceed"}


def test_a_metric_that_alarms_in_one_process_alarms_in_all(worlds: Callable[[str], World]) -> None:
    record = check_same(worlds("two")[metric_of_one_process_alone])
    assert record["actions"] == ["proceed"] * 3 + ["rewind"] + ["proceed"] * 2


# -- one process ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Consensus]:
    """A process group of this process alone, which reduces all the same."""
    dist.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Consensus(dist.group.WORLD)
    dist.destroy_process_group()


VALUES = (0.0, -0.0, 1.5, -3.0, 1e300, 5e-324, math.inf, math.nan)


def test_reducing_over_one_process_changes_no_number(alone: Consensus) -> None:
    rows = [{"loss": value, "output_spread": value} for value in VALUES]
    found = alone.worst(rows, NAMES, {"steps": 1})
    assert repr(found) == repr(rows)
    assert alone.any([]) == [] and alone.any([True, False]) == [True, False]
    alone.check_same("anything", 2**53 + 1)


def test_without_a_group_nothing_is_touched() -> None:
    nobody = Consensus()
    assert nobody.worst([{"loss": -math.inf}], NAMES, {}) == [{"loss": -math.inf}]
    assert nobody.any(iter([True, False])) == [True, False]
    nobody.check_same("anything", 3)


def test_who_takes_part(alone: Consensus) -> None:
    assert Consensus.of(True).group is None, "one process needs no words with itself"
    assert Consensus.of(False).group is None
    assert Consensus.of(dist.group.WORLD).group is dist.group.WORLD


def test_without_torch_distributed_there_is_one_process() -> None:
    assert Consensus.of(True).group is None


def test_signals_of_which_the_lowest_is_the_worst_are_measured_at_all() -> None:
    from_outputs = Sensors(TrainingState(nn.Linear(2, 2))).measure(1.0, logits=torch.randn(16, 3)).names
    assert set(NAMES[2:]) <= set(from_outputs)


if __name__ == "__main__":
    main(int(sys.argv[1]), PLANS[sys.argv[2]], Path(sys.argv[3]))
