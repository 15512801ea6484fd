"""A snapshot that does not fit changes nothing: not a weight, option, schedule, generator or extra."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from morphogen.errors import StateMismatch
from morphogen.state import Snapshot, TrainingState


def edited(
    snapshot: Snapshot,
    tables: Callable[[dict[str, dict[str, Tensor]]], object] | None = None,
    meta: Callable[[dict[str, Any]], object] | None = None,
) -> Snapshot:
    """Return a copy of ``snapshot`` with its tensors or plain data edited, as a damaged or foreign one would be."""
    new_tables: dict[str, dict[str, Tensor]] = {}
    for section, name, tensor in snapshot.named_tensors():
        if section != "loose":
            new_tables.setdefault(section, {})[name] = tensor.clone()
    new_meta = json.loads(json.dumps(snapshot.meta))
    if tables:
        tables(new_tables)
    if meta:
        meta(new_meta)
    return Snapshot(new_tables, dict(snapshot.loose), new_meta)


FOREIGN: dict[str, tuple[Callable[[Snapshot], Snapshot], str]] = {
    "wrong shape": (
        lambda s: edited(s, lambda t: t["model"].update({"body.weight": torch.zeros(6, 5)})),
        r"`body\.weight` is \(6, 6\) torch\.float32 in the run, \(6, 5\) torch\.float32 in the snapshot",
    ),
    "wrong dtype": (
        lambda s: edited(s, lambda t: t["model"].update({"body.weight": torch.zeros(6, 6).double()})),
        r"`body\.weight` is .* torch\.float32 in the run, \(6, 6\) torch\.float64",
    ),
    "missing tensor": (
        lambda s: edited(s, lambda t: t["model"].pop("level")),
        "`level` is in the run and missing from the snapshot",
    ),
    "unknown tensor": (
        lambda s: edited(s, lambda t: t["model"].update({"extra": torch.zeros(1)})),
        "`extra` is in the snapshot and missing from the run",
    ),
    "missing model": (lambda s: edited(s, None, lambda m: m["model"].pop("extras.ema")), "model 'extras.ema' is in the run"),
    "missing extra": (lambda s: edited(s, None, lambda m: m["extras"].pop("tally")), "extras 'tally' is in the run"),
    "unknown extra": (lambda s: edited(s, None, lambda m: m["extras"].update(x=1)), "extras 'x' is in the snapshot"),
    "tensor extra": (
        lambda s: edited(s, lambda t: t["tensors"].update(hidden=torch.zeros(3))),
        r"`hidden` is \(7,\) torch\.float32 in the run",
    ),
}
FOREIGN_OPTIMIZER: dict[str, tuple[Callable[[Snapshot], Snapshot], str]] = {
    "optimizer kind": (
        lambda s: edited(s, None, lambda m: m["optimizer"][""].update(kind="Lion")),
        "optimizer is AdamW, the snapshot's was Lion",
    ),
    "no optimizer": (lambda s: edited(s, None, lambda m: m["optimizer"].clear()), "holds no optimizer state"),
    "unknown parameter": (
        lambda s: edited(s, None, lambda m: m["optimizer"][""]["groups"][0]["names"].append("ghost")),
        "optimizer parameter `ghost` is not in the model",
    ),
    "state of nobody": (
        lambda s: edited(s, None, lambda m: m["optimizer"][""]["state"].update(ghost={})),
        "moments of `ghost`, which is in no group",
    ),
    "moment shape": (
        lambda s: edited(s, lambda t: t["optimizer"].update({"body.weight.exp_avg": torch.zeros(6, 1)})),
        r"moment `exp_avg` of `body\.weight` is \(6, 1\), the parameter \(6, 6\)",
    ),
    "moment missing": (
        lambda s: edited(s, lambda t: t["optimizer"].pop("body.weight.exp_avg")),
        r"the moment .body\.weight\.exp_avg. is missing",
    ),
    "missing scheduler": (
        lambda s: edited(s, None, lambda m: m["scheduler"].clear()),
        "scheduler '' is in the run and missing from the snapshot",
    ),
    "unknown scheduler": (
        lambda s: edited(s, None, lambda m: m["scheduler"].update(other={})),
        "scheduler 'other' is in the snapshot and missing from the run",
    ),
}


def built(kit: Any, optimizer: str = "adamw-groups", schedule: str = "sequential") -> Any:
    run = kit.build(optimizer, schedule)
    run.steps(3)
    return run


@pytest.mark.parametrize("case", [*FOREIGN, *FOREIGN_OPTIMIZER])
def test_a_foreign_snapshot_is_refused_by_name_and_changes_nothing(kit: Any, case: str) -> None:
    run = built(kit)
    change, message = {**FOREIGN, **FOREIGN_OPTIMIZER}[case]
    snapshot = run.state.capture()
    run.steps(2)
    before, identities, foreign = run.contents(), run.identities(), change(snapshot)
    attempts = [lambda: run.state.restore(foreign)]
    if case in FOREIGN:
        attempts += [lambda: run.state.restore(foreign, "reset"), lambda: run.state.adopt(foreign, "copy")]
    for attempt in attempts:
        with pytest.raises(StateMismatch, match=message):
            attempt()
        assert kit.same(run.contents(), before)
        assert run.identities() == identities
    run.state.restore(snapshot)
    run.steps(1)


@pytest.mark.parametrize("ours", ["lambda", "cosine", "onecycle", "sequential", "plateau", "multistep", "chained"])
@pytest.mark.parametrize("theirs", ["cosine", "sequential"])
def test_the_state_of_another_kind_of_schedule_is_refused(kit: Any, ours: str, theirs: str) -> None:
    run, other = built(kit, "adam", ours), built(kit, "adam", theirs)
    before = run.contents()
    if ours == theirs:
        run.state.restore(other.state.capture())
        return
    with pytest.raises(StateMismatch, match="scheduler '' is .*, the snapshot's was"):
        run.state.restore(other.state.capture())
    assert kit.same(run.contents(), before)


def test_schedules_within_a_schedule_must_agree_too(kit: Any) -> None:
    def state_with(inner: Callable[..., Any]) -> TrainingState:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = [lr_scheduler.ConstantLR(optimizer), inner(optimizer)]
        return TrainingState(model, optimizer, lr_scheduler.SequentialLR(optimizer, parts, [2]))

    linear, decaying = state_with(lr_scheduler.LinearLR), state_with(lambda o: lr_scheduler.ExponentialLR(o, 0.9))
    with pytest.raises(StateMismatch, match=r"SequentialLR\(ConstantLR, LinearLR\).*SequentialLR\(ConstantLR, Expon"):
        linear.restore(decaying.capture())


@dataclasses.dataclass
class Refusing:
    """Wraps a part of a run; its ``load_state_dict`` does half of its work and then raises, once."""

    part: Any
    armed: list[bool] = dataclasses.field(default_factory=list)

    @property
    def optimizer(self) -> Any:
        return self.part.optimizer

    @property
    def _schedulers(self) -> list[Any]:
        return [self.part]

    def step(self) -> None:
        self.part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.part.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.part.load_state_dict(state["inner"])
        if self.armed:
            self.armed.clear()
            raise RuntimeError("cannot load")


@pytest.mark.parametrize("schedule", ["lambda", "cosine", "onecycle", "sequential", "plateau", "chained"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw-tensor-lr", "adamw-groups", "lbfgs"])
def test_a_schedule_that_refuses_half_way_leaves_the_run_as_it_was(kit: Any, optimizer: str, schedule: str) -> None:
    run = kit.build(optimizer, schedule)
    refusing = Refusing(run.schedulers[""])
    state = TrainingState(run.model, run.optimizers, {"": refusing}, extras=run.extras)
    run.steps(2)
    snapshot = state.capture()
    run.steps(3)
    before, identities = run.contents(), run.identities()
    refusing.armed.append(True)
    with pytest.raises(RuntimeError, match="cannot load"):
        state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.identities() == identities
    state.restore(snapshot)
    assert run.extras["tally"].count == 2


@pytest.mark.parametrize("strategy", ["restore", "reset", "keep", "adopt"])
@pytest.mark.parametrize("place", ["extra", "scaler", "module"])
def test_a_part_that_refuses_leaves_the_run_as_it_was(kit: Any, place: str, strategy: Any) -> None:
    run = kit.build("adam", "cosine")
    last = Refusing(kit.build().extras["tally"])
    scaler = Refusing(torch.amp.GradScaler("cpu"))
    ours = [run.extras["tally"], last] if place == "extra" else [run.extras["tally"]]
    extras = {**run.extras, **{f"tally{index}": tally for index, tally in enumerate(ours)}}
    model = nn.ModuleDict({"net": run.model, "odd": Odd()})
    state = TrainingState(model, run.optimizers, run.schedulers, scaler, extras)
    run.steps(2)
    run.model.norm.eval()
    model["odd"].seen = 1
    snapshot = state.capture()
    run.steps(2)
    run.model.train()
    run.model.body.requires_grad_(False)
    model["odd"].seen = 2
    before, identities = run.contents(), run.identities()
    if place == "scaler" and strategy in ("reset", "keep"):
        return  # leave the scaler alone
    {"extra": last, "scaler": scaler, "module": model["odd"]}[place].armed.append(True)
    with pytest.raises(RuntimeError, match="cannot load"):
        state.adopt(snapshot) if strategy == "adopt" else state.restore(snapshot, strategy)
    assert kit.same(run.contents(), before)
    assert run.identities() == identities
    assert model["odd"].seen == 2


class Odd(nn.Module):
    """A module whose extra state may be refused."""

    seen = 0

    def __init__(self) -> None:
        super().__init__()
        self.armed: list[bool] = []

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, seen: int) -> None:
        self.seen = seen
        if self.armed:
            self.armed.clear()
            raise RuntimeError("cannot load")


@pytest.mark.parametrize("strategy", ["restore", "reset", "keep", "adopt"])
def test_a_stream_of_another_kind_is_refused(kit: Any, strategy: Any) -> None:
    run, other = built(kit), kit.build("adamw-groups", "sequential")
    other.extras["noise"] = np.random.Generator(np.random.MT19937(0))
    state = TrainingState(other.model, other.optimizers, other.schedulers, extras=other.extras)
    before, noise = other.contents(), other.extras["noise"].bit_generator.state
    snapshot = run.state.capture()
    if strategy == "adopt":
        state.adopt(snapshot)  # streams stay the adopter's own, whatever they are
        return
    with pytest.raises(ValueError, match="PRNG"):
        state.restore(snapshot, strategy)
    assert kit.same(other.contents(), before)
    assert kit.same(other.extras["noise"].bit_generator.state, noise)
