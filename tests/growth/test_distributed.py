"""Several processes grow one model under DistributedDataParallel. Real processes, over gloo.

This file runs itself as each of the processes; all scenarios share them, as starting takes longest. A scenario compares with a
model that each process grows by itself, on the batches of all.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from morphogen.errors import MorphogenError
from morphogen.growth import GrowableModel, Stage, measure_contributions
from morphogen.growth.distributed import Processes
from morphogen.state import TrainingState
from morphogen.testing import LENIENT, HostCase, lead_to

SIZE = 2
CASE = HostCase("NLC")
"""LayerNorm: with BatchNorm each process normalises its own samples, so that no sum of processes is one process."""
Record = dict[str, Any]


def is_last() -> bool:
    return dist.get_rank() == SIZE - 1


def grown(case: HostCase = CASE, distributed: bool = True, **options: Any) -> GrowableModel:
    config = options.pop("config", LENIENT)
    return GrowableModel(case.build(), case.points, case.example(), config=config, distributed=distributed, **options)


def wrapped(model: GrowableModel) -> DistributedDataParallel:
    return DistributedDataParallel(model)


def batch(number: int = 0, case: HostCase = CASE) -> tuple[Tensor, Tensor]:
    """The samples of all processes, and those of this one."""
    whole = case.example(num_samples=4 * SIZE, seed=100 + number)
    return whole, whole.chunk(SIZE)[dist.get_rank()]


def backward(module: Callable[[Tensor], Tensor], inputs: Tensor, share: float = 1.0) -> None:
    (module(inputs).sin().mean() * share).backward()


def stir(model: GrowableModel) -> None:
    """Give seeds weights with which they do something, the same in all processes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.slots.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def error_between(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of two gradients; infinite if one is there and the other is not."""
    worst = 0.0
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        if (left.grad is None) != (right.grad is None):
            return math.inf
        if left.grad is not None and right.grad is not None:
            worst = max(worst, float((left.grad - right.grad).abs().max()))
    return worst


def digest(model: nn.Module) -> str:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def pair(stage: Stage) -> tuple[GrowableModel, DistributedDataParallel, GrowableModel]:
    """The model of all processes, wrapped before anything grew, and the same model of this process alone."""
    model, alone = grown(), grown(distributed=False)
    ddp = wrapped(model)
    for each in (model, alone):
        for slot, operator in (("early", "gate"), ("late", "add")):
            each.germinate(slot, "low_rank", operator=operator)
            lead_to(each, slot, stage, CASE.example())
        if stage is not Stage.TRAINING:
            stir(each)
    return model, ddp, alone


def gradients() -> Record:
    found: Record = {}
    for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
        model, ddp, alone = pair(stage)
        whole, mine = batch()
        backward(ddp, mine)
        backward(alone, whole)
        found[stage.name] = error_between(model, alone)
        if stage is Stage.HOLDING:
            for each in (model, alone):
                each.zero_grad()
                each.prune("early")
            backward(ddp, mine)
            backward(alone, whole)
            found["pruned"] = error_between(model, alone)
    return found


def accumulated() -> Record:
    model, ddp, alone = pair(Stage.BLENDING)
    found: Record = {}
    for name, without_sync in (("no_sync", True), ("each", False)):
        for each in (model, alone):
            each.zero_grad()
        for number in range(3):
            whole, mine = batch(number)
            ddp.require_backward_grad_sync = not without_sync or number == 2
            backward(ddp, mine, 1 / 3)
            backward(alone, whole, 1 / 3)
        found[name] = error_between(model, alone)
    copied = copy.deepcopy(model)
    model.zero_grad()
    copied.zero_grad()
    backward(copied, batch()[1])
    found["copy"] = digest(copied.slots)
    found["original"] = all(parameter.grad is None for parameter in model.parameters())
    return found


def forward_with_checkpoint(host: nn.Module, reentrant: bool, inputs: Tensor) -> Tensor:
    """The host's forward pass; both growth points are in the block that is run twice."""

    def block(h: Tensor) -> Tensor:
        return host.act(host.body(host.act(host.norm(h))))

    return host.head(checkpoint(block, host.stem(inputs), use_reentrant=reentrant))


def checkpointed() -> Record:
    found: Record = {}
    for reentrant in (True, False):
        model, ddp, alone = pair(Stage.BLENDING)
        model.host.forward = functools.partial(forward_with_checkpoint, model.host, reentrant)
        whole, mine = batch()
        backward(ddp, mine)
        backward(alone, whole)
        found[f"reentrant={reentrant}"] = error_between(model, alone)
    return found


def incubated() -> Record:
    """Of a seed that has grown, which ``straight_through`` limits by the sizes in each sample."""
    found: Record = {}
    for incubator in ("straight_through", "shadow"):
        config = LENIENT.replace(incubator=incubator)
        model, alone = grown(config=config), grown(config=config, distributed=False)
        ddp = wrapped(model)
        whole, mine = batch()
        for each, module, inputs in ((model, ddp, mine), (alone, alone, whole)):
            each.germinate("early", "low_rank")
            each.advance("early")
            stir(each)
            backward(module, inputs)
            if each.needs_shadow:
                with each.shadow():
                    backward(each, inputs)
        found[incubator] = {
            "host": error_between(model.host, alone.host),
            "seed": error_between(model.slots, alone.slots),
            "digest": digest(model.slots),
        }
    return found


class Life:
    """A data-parallel run of this process; what happened goes into ``log``."""

    def __init__(self, case: HostCase, **options: Any) -> None:
        self.case = case
        self.model = grown(case, **options)
        self.ddp = wrapped(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.state = TrainingState(self.ddp, self.optimizer)
        self.log: list[Any] = []
        self.number = 0

    def step(self) -> None:
        self.number += 1
        self.optimizer.zero_grad()
        backward(self.ddp, batch(self.number, self.case)[1])
        self.model.sense()
        self.optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()
            self.model.tick()
            self.note()

    def note(self) -> None:
        sensors = [repr(self.model.slot(name).sensors) for name in self.model.stages()]
        stages = {name: stage.name for name, stage in self.model.stages().items()}
        self.log.append([stages, self.model.alphas(), sensors])

    def advance(self, slot: str) -> None:
        gate = self.model.advance(slot)
        self.log.append([gate.into.name, [repr(check) for check in gate.checks]])

    def fossilize(self, slot: str) -> None:
        inputs = batch(1000, self.case)[1]
        found = measure_contributions(self.model, [(inputs, inputs)], lambda out, _: out.flatten(1).mean(1)).slots[slot]
        self.own = found.value
        self.model.record_contribution(slot, found.value, found.error)
        self.log.append(self.model.fossilize(slot).passed)


def life() -> Record:
    """Everything that can happen to a seed, with gates that read what each process measured on samples of its own."""
    run = Life(HostCase("NCHW"))
    run.model.germinate("early", "conv3x3", operator="gate")
    run.advance("early")
    run.steps(3)
    run.model.germinate("late", "norm")
    run.advance("early")
    run.steps(2)
    run.advance("late")
    run.steps(4)
    run.advance("early")
    run.advance("late")
    run.model.set_alpha_target("late", 0.5, over=2)
    run.steps(3)
    run.fossilize("early")
    run.model.prune("late", over=3)
    run.steps(12)
    run.model.germinate("late", "low_rank")
    run.steps(2)
    run.state.verify()
    run.ddp.eval()(batch(0, run.case)[1])  # before a pass the wrapper sends the buffers of the first process around
    return {"log": run.log, "digest": digest(run.model), "own": run.own, "rates": list(run.state.learning_rates())}


def faults() -> Record:
    """NaN in the weights or the gradient of a seed of the last process alone."""
    found: Record = {}
    for where in ("weight", "gradient"):
        run = Life(CASE)
        run.model.germinate("early", "low_rank")
        run.model.advance("early")
        run.steps(2)
        seed = run.model.slot("early").seed
        assert seed is not None
        if is_last() and where == "weight":
            with torch.no_grad():
                next(seed.parameters()).fill_(math.nan)
        if where == "gradient":
            handle = next(seed.parameters()).register_hook(lambda grad: grad * (math.nan if is_last() else 1.0))
        run.step()
        before = digest(run.model.host)
        run.model.tick()
        run.note()
        run.steps(2)
        if where == "gradient":
            handle.remove()
        found[where] = {"log": run.log, "same_host": before != digest(run.model.host), "stage": run.log[2][0]["early"]}
        found[where]["finite"] = all(bool(p.isfinite().all()) for p in run.model.parameters())
    return found


def message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except MorphogenError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def different() -> Record:
    """The last process does something else."""
    model = grown()
    before = digest(model)
    found: Record = {
        "points": message_of(
            lambda: GrowableModel(CASE.build(), {"late": "body"} if is_last() else CASE.points, CASE.example())
        ),
        "root seed": message_of(lambda: grown(seed=dist.get_rank())),
        "slot": message_of(lambda: model.germinate("late" if is_last() else "early", "low_rank")),
        "blueprint": message_of(lambda: model.germinate("early", "low_rank" if is_last() else "mlp")),
        "seed": message_of(lambda: model.germinate("early", "low_rank", seed=dist.get_rank())),
        "tick": message_of(lambda: model.tick() if is_last() else model.germinate("early", "low_rank")),
    }
    found["unchanged"] = digest(model) == before and model.clock == 0 and set(model.stages().values()) == {Stage.DORMANT}
    model.germinate("early", "low_rank")
    found["matter"] = message_of(lambda: model.tick() if is_last() else model.sense())
    if is_last():
        model.config = LENIENT.replace(embargo_ticks=9)
    found["config"] = message_of(lambda: model.advance("early"))
    model.config = LENIENT
    found["unchanged"] &= model.stages()["early"] is Stage.GERMINATED and model.clock == 0
    model.advance("early")
    model.tick()
    found["clock"] = model.clock
    return found


def resumed(path: Path) -> Record:
    """A checkpoint with seeds in it goes into fresh models, which are wrapped then; seeds still come and go."""
    found: Record = {}
    first = Life(CASE)
    first.model.germinate("early", "low_rank")
    first.model.advance("early")
    first.steps(2)
    first.advance("early")
    first.steps(2)
    if dist.get_rank() == 0:
        first.state.save(path)
    dist.barrier()
    run, alone = Life(CASE), grown(distributed=False)
    run.state.load(path)
    TrainingState(alone, torch.optim.Adam(alone.parameters(), lr=0.01)).load(path)
    run.ddp = wrapped(run.model)
    whole, mine = batch()
    for each, module, inputs in ((run.model, run.ddp, mine), (alone, alone, whole)):
        each.zero_grad()
        backward(module, inputs)
    found["resumed"] = error_between(run.model, alone)
    for each, module, inputs in ((run.model, run.ddp, mine), (alone, alone, whole)):
        each.prune("early")
        each.germinate("late", "norm")
        each.zero_grad()
        backward(module, inputs)
    found["pruned"] = error_between(run.model, alone)
    run.steps(3)
    return {**found, "log": run.log, "digest": digest(run.model)}


def averaged() -> Record:
    """A gradient that one process has not counts as zero; one that none has stays away."""
    processes = Processes(dist.group.WORLD, 8)
    both, one, none, half = (nn.Parameter(torch.zeros(2, dtype=t)) for t in (torch.float32,) * 3 + (torch.float16,))
    both.grad = torch.full((2,), dist.get_rank() + 1.0)
    half.grad = torch.full((2,), 60000.0, dtype=torch.float16)
    if is_last():
        one.grad = torch.full((2,), 3.0)
    processes.average_gradients([both, one, none, half])
    return {"gradients": [None if p.grad is None else p.grad.tolist() for p in (both, one, none, half)]}


SCENARIOS = (gradients, accumulated, checkpointed, incubated, life, faults, different, resumed, averaged)


def main(rank: int, directory: Path) -> None:
    """Be one process: run every scenario and write down what came of it."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", timeout, rank=rank, world_size=SIZE)
    for scenario in SCENARIOS:
        record = scenario(directory / "checkpoint") if scenario is resumed else scenario()
        (directory / f"{scenario.__name__}-{rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


class World:
    """What each process wrote down."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        command = [sys.executable, "-W", "ignore", __file__]
        started = [
            subprocess.Popen([*command, str(rank), str(directory)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank in range(SIZE)
        ]
        try:
            self.output = [process.communicate(timeout=240)[0].decode() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()

    def __getitem__(self, scenario: Callable[..., Record]) -> list[Record]:
        paths = [self.directory / f"{scenario.__name__}-{rank}.json" for rank in range(SIZE)]
        assert all(path.exists() for path in paths), "\n".join(self.output)
        return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def check_same(records: list[Record]) -> Record:
    """All processes say the same."""
    assert all(record == records[0] for record in records), records
    return records[0]


def test_gradients_are_those_of_one_process_on_all_samples(world: World) -> None:
    for record in world[gradients]:
        assert set(record) == {"GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED", "pruned"}
        assert max(record.values()) < 1e-6, record


def test_gradients_may_be_accumulated(world: World) -> None:
    for record in world[accumulated]:
        assert max(record["no_sync"], record["each"]) < 1e-6, record


def test_a_copy_of_the_model_is_averaged_for_itself(world: World) -> None:
    record = check_same([{key: record[key] for key in ("copy", "original")} for record in world[accumulated]])
    assert record["original"], "the copy's gradients must not reach the original"


def test_gradients_through_checkpointed_blocks(world: World) -> None:
    for record in world[checkpointed]:
        assert len(record) == 2 and max(record.values()) < 1e-6, record


def test_incubation(world: World) -> None:
    for record in world[incubated]:
        assert max(record[incubator][part] for incubator in record for part in ("host", "seed")) < 1e-6, record
    check_same([{name: found["digest"] for name, found in record.items()} for record in world[incubated]])


def test_a_whole_life_is_one_life(world: World) -> None:
    records = world[life]
    assert records[0]["own"] != records[1]["own"], "contributions must be measured on different samples"
    record = check_same([{key: record[key] for key in ("log", "digest", "rates")} for record in records])
    assert record["rates"] == ["host", "early", "late"], "the run of a wrapped model follows its growth"
    stages = {
        stage
        for entry in record["log"]
        if isinstance(entry, list) and isinstance(entry[0], dict)
        for stage in entry[0].values()
    }
    assert stages >= {"TRAINING", "BLENDING", "FOSSILIZED", "PRUNED", "EMBARGOED", "DORMANT", "GERMINATED"}


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_seed_at_fault_in_one_process_is_taken_out_of_all_at_once(world: World, where: str) -> None:
    record = check_same([record[where] for record in world[faults]])
    assert record["stage"] == "PRUNED" and record["finite"]


def test_what_differs_is_an_error_everywhere_and_changes_nothing(world: World) -> None:
    for record in world[different]:
        for name, what in (
            ("points", "`points`"),
            ("root seed", "`seed`"),
            ("slot", "slot 'late'"),
            ("blueprint", "slot 'early'"),
            ("seed", "new weights in slot 'early'"),
            ("tick", "the clock"),
            ("config", "the config"),
        ):
            assert record[name].startswith("StateMismatch: a growing model must be the same"), (name, record[name])
            assert what in record[name], (name, record[name])
        assert "all processes must do the same" in record["matter"] and "'sense'" in record["matter"]
        assert "'structure'" in record["matter"]
        assert record["unchanged"] and record["clock"] == 1


def test_seeds_that_were_there_before_the_wrapper_come_and_go(world: World) -> None:
    for record in world[resumed]:
        assert max(record["resumed"], record["pruned"]) < 1e-6
    check_same([{key: record[key] for key in ("log", "digest")} for record in world[resumed]])


def test_a_gradient_that_one_process_lacks_counts_as_zero(world: World) -> None:
    assert check_same(world[averaged])["gradients"] == [[1.5, 1.5], [1.5, 1.5], None, [60000.0, 60000.0]]


# -- one process ---------------------------------------------------------------------------------------------------------


def test_one_process_needs_no_words_with_itself() -> None:
    model = CASE.model()
    model.germinate("early", "low_rank")
    seed = model.slot("early").seed
    assert seed is not None
    assert not any(parameter._post_accumulate_grad_hooks for parameter in seed.parameters())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
