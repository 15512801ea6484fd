"""Snapshots: nothing shared with the run, buffers used again, contents that can be checked and counted."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from morphogen.errors import StateMismatch
from morphogen.state import Snapshot, TrainingState
from morphogen.state.snapshot import BufferPool


def addresses(snapshot: Snapshot) -> set[int]:
    return {tensor.data_ptr() for section, _, tensor in snapshot.named_tensors() if section != "loose" and tensor.numel()}


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize("optimizer", ["adamw-amsgrad", "muon", "lbfgs", "adamw-tensor-lr"])
def test_no_tensor_is_shared_with_the_run(kit: Any, optimizer: str) -> None:
    run = kit.build(optimizer, "lambda")
    run.steps(2)
    snapshot = run.state.capture()
    run.steps(1)
    run.state.restore(snapshot)
    live = [*run.model.parameters(), *run.model.buffers(), *run.extras["ema"].parameters()]
    live += [run.extras["hidden"], run.extras["tally"].last]
    for stepped in run.optimizers.values():
        for values in stepped.state.values():
            live += [item for value in values.values() for item in (value if isinstance(value, list) else [value])]
        live += [group["lr"] for group in stepped.param_groups]
    kept = [tensor for _, _, tensor in snapshot.named_tensors()]
    assert not storages(kept) & storages([tensor for tensor in live if isinstance(tensor, torch.Tensor)])
    assert len(storages(kept)) == len([tensor for tensor in kept if tensor.numel()])


def test_a_snapshot_is_not_changed_by_what_the_run_does_next(kit: Any) -> None:
    run = kit.build("adam", "cosine")
    run.steps(2)
    first = run.state.capture()
    checksum = first.checksum()
    for _ in range(4):
        run.steps(1)
        later = run.state.capture()
        assert later.checksum() != checksum
        assert not addresses(later) & addresses(first)
    assert first.checksum() == checksum


def test_buffers_of_dropped_snapshots_are_filled_again(kit: Any) -> None:
    run = kit.build("adam")
    run.steps(2)
    snapshots = [run.state.capture(), run.state.capture()]
    used = addresses(snapshots[0]) | addresses(snapshots[1])
    for _ in range(5):  # a ring of two: each capture takes the place of the older one
        snapshots.pop(0)
        run.steps(1)
        snapshots.append(run.state.capture())
        assert addresses(snapshots[-1]) <= used
        assert not addresses(snapshots[0]) & addresses(snapshots[1])


class Odd(nn.Module):
    """Parameters and buffers whose memory is laid out in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.sliced = nn.Parameter(torch.arange(12.0).reshape(3, 4)[:, :3])
        self.image = nn.Parameter(torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("wave", torch.tensor([1 + 2j]))
        self.register_buffer("narrow", torch.ones(3, dtype=torch.bfloat16))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(2))


def test_unusual_layouts_and_dtypes_come_back_and_use_their_buffers_again(kit: Any) -> None:
    model = Odd()
    state = TrainingState(model)
    before = kit.tensors(model)
    snapshot = state.capture()
    with torch.inference_mode():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel():
                tensor.copy_(torch.zeros_like(tensor))
    state.restore(snapshot)
    assert kit.same(kit.tensors(model), before)
    assert model.inferred.is_inference()
    used = addresses(snapshot)
    del snapshot
    assert addresses(state.capture()) == used


def test_memory_that_overlaps_itself_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(1).expand(5))
    with pytest.raises(StateMismatch, match="`mask` must own each of its 5 values"):
        TrainingState(model)


def test_a_buffer_is_made_anew_when_its_tensor_changes() -> None:
    model = nn.Linear(2, 2)
    state = TrainingState(model)
    del [state.capture()][0]
    model.double()
    assert state.capture().tensor("model", "weight").dtype == torch.float64
    model.weight.data = torch.ones(3, 2, dtype=torch.float64)
    assert state.capture().tensor("model", "weight").shape == (3, 2)


def test_a_failed_capture_leaves_the_older_snapshot(kit: Any) -> None:
    run = kit.build("adam")
    run.steps(1)
    snapshot = run.state.capture()
    checksum = snapshot.checksum()
    before = run.contents()
    run.extras["tally"].mean = object()
    with pytest.raises(TypeError, match=r"`extras\.tally\.mean` must be made of"):
        run.state.capture()
    run.extras["tally"].mean = before["tally"]["mean"]
    assert kit.same(run.contents(), before)
    assert snapshot.checksum() == checksum


def test_tensor_gives_a_copy_and_table_the_buffer() -> None:
    state = TrainingState(nn.Linear(2, 1))
    snapshot = state.capture()
    checksum = snapshot.checksum()
    snapshot.tensor("model", "weight").zero_()
    assert snapshot.checksum() == checksum
    assert set(snapshot.table("model")) == {"weight", "bias"}
    assert snapshot.table("model")["weight"] is snapshot.table("model")["weight"]
    assert snapshot.table("nothing") == {}
    with pytest.raises(KeyError):
        snapshot.tensor("model", "nothing")


def test_parts_sizes_and_has_optimizer_state(kit: Any) -> None:
    snapshot = TrainingState(nn.Linear(2, 1)).capture()
    assert snapshot.parts == {"model", "generators"}
    assert not snapshot.has_optimizer_state
    run = kit.build("adam", "cosine")
    run.steps(1)
    snapshot = run.state.capture()
    assert snapshot.parts == {"model", "optimizer", "scheduler", "extras", "generators"}
    assert snapshot.has_optimizer_state
    assert snapshot.num_bytes == sum(tensor.nbytes for _, _, tensor in snapshot.named_tensors())
    adam = [tensor for section, _, tensor in snapshot.named_tensors() if section == "optimizer"]
    stepped = [p for p in run.model.parameters() if p.requires_grad]
    assert sum(tensor.nbytes for tensor in adam) == sum(2 * p.nbytes + 4 for p in stepped)


def test_the_checksum_sees_every_value_name_and_shape() -> None:
    def checksum(**tensors: torch.Tensor) -> str:
        return Snapshot({"model": dict(tensors)}, {}, {}).checksum()

    base = checksum(w=torch.zeros(2, 3))
    others = [checksum(v=torch.zeros(2, 3)), checksum(w=torch.zeros(3, 2)), checksum(w=torch.zeros(2, 3).int())]
    nudged = torch.zeros(2, 3)
    nudged[1, 2] = 1e-45
    assert base == checksum(w=torch.zeros(2, 3))
    assert len({base, *others, checksum(w=nudged), checksum(w=-torch.zeros(2, 3))}) == 6


@pytest.mark.parametrize("where", ["parameter", "buffer", "moment", "extra"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_is_finite_sees_one_bad_value_anywhere(kit: Any, where: str, value: float) -> None:
    run = kit.build("adam")
    run.steps(1)
    assert run.state.capture().is_finite()
    moments = run.optimizers[""].state[run.model.body.weight]
    tensor = {
        "parameter": run.model.body.weight.data,
        "buffer": run.model.level,
        "moment": moments["exp_avg_sq"],
        "extra": run.extras["hidden"],
    }[where]
    tensor.view(-1)[-1] = value
    assert not run.state.capture().is_finite()


def test_finite_values_whose_norm_overflows_are_finite() -> None:
    model = nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    assert TrainingState(model).capture().is_finite()


def test_a_pool_outlives_no_run_and_no_snapshot(kit: Any) -> None:
    run = kit.build("adam")
    snapshot = run.state.capture()
    checksum = snapshot.checksum()
    alive = weakref.ref(run.state)
    run.state = None
    gc.collect()
    assert alive() is None
    assert snapshot.checksum() == checksum
    buffer = weakref.ref(snapshot.table("model")["level"])
    del snapshot
    gc.collect()
    assert buffer() is None


def test_a_snapshot_collected_while_another_is_taken_does_not_block() -> None:
    """The garbage collector may run, and give buffers back, at any moment, also inside the pool."""
    pool = BufferPool()
    snapshot = pool.snapshot({"model": {"w": torch.ones(1)}}, {}, {})
    snapshots = [snapshot]
    del snapshot

    def drop_inside() -> None:
        with pool._lock:
            snapshots.clear()  # gives the buffers back in this very thread

    thread = threading.Thread(target=drop_inside, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert pool.snapshot({"model": {"w": torch.zeros(1)}}, {}, {}).tensor("model", "w") == 0
