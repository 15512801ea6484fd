"""A run follows its model when branches come and go, and a rewind brings back the structure of its snapshot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from morphogen.errors import CheckpointError, StateMismatch
from morphogen.state import DynamicModel, TopologyChange, TrainingState


class Branching(nn.Module):
    """A linear host and branches beside it, each germinated once under a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.host = nn.Linear(3, 3)
        self.branches = nn.ModuleDict()
        self.numbers: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        self.born = 0
        self.followers: list[Callable[[], Callable[[], None] | None]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.host(inputs) + sum(branch(inputs) for branch in self.branches.values())

    def add(self, name: str, width: int = 4, number: int | None = None) -> None:
        self.born += 1
        self._swap({**self._present(), name: (number or self.born, width, built(width))})

    def remove(self, name: str) -> None:
        self._swap({other: branch for other, branch in self._present().items() if other != name})

    def topology(self) -> Any:
        return {"numbers": self.numbers, "widths": self.widths, "born": self.born}

    def plan_topology(self, topology: Any) -> TopologyChange:
        if not set(topology["numbers"]) <= {"a", "b", "c"}:
            raise StateMismatch(f"branches must be a, b or c, got {sorted(topology['numbers'])}")
        branches = {}
        for name, number in topology["numbers"].items():
            same = self.numbers.get(name) == number and self.widths[name] == topology["widths"][name]
            width = topology["widths"][name]
            branches[name] = (number, width, self.branches[name] if same else built(width))
        return Change(self, branches, topology["born"])

    def owners(self) -> Mapping[str, list[tuple[str, Parameter]]]:
        owned: dict[str, list[tuple[str, Parameter]]] = {"host": [], **{name: [] for name in self.branches}}
        for name, parameter in self.named_parameters():
            owned[name.split(".")[1] if name.startswith("branches") else "host"].append((name, parameter))
        return owned

    def on_topology_change(self, callback: Callable[[], Callable[[], None] | None]) -> None:
        self.followers.append(callback)

    def _present(self) -> dict[str, tuple[int, int, nn.Module]]:
        return {name: (self.numbers[name], self.widths[name], branch) for name, branch in self.branches.items()}

    def _swap(self, branches: dict[str, tuple[int, int, nn.Module]]) -> None:
        before, undo = self._present(), []
        self._put(branches)
        try:
            for follower in self.followers:
                undo.append(follower())
        except BaseException:
            for take_back in reversed(undo):
                (take_back or (lambda: None))()
            self._put(before)
            raise

    def _put(self, branches: dict[str, tuple[int, int, nn.Module]]) -> None:
        self.branches.clear()
        self.numbers.clear()
        self.widths.clear()
        for name, (number, width, branch) in branches.items():
            self.branches[name], self.numbers[name], self.widths[name] = branch, number, width


def built(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


class Change:
    """A structure to come."""

    def __init__(self, model: Branching, branches: dict[str, tuple[int, int, nn.Module]], born: int) -> None:
        self.model, self.branches, self.born = model, branches, born

    def named_tensors(self) -> Mapping[str, Tensor]:
        before = self.model._present()
        self.model._put(self.branches)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        self.model._put(before)
        return tensors

    def commit(self) -> None:
        self.model.born = self.born
        self.model._swap(self.branches)


class Grown:
    """A run around a branching model."""

    def __init__(self, kit: Any, schedule: str = "lambda", make: Any = None, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.kit, self.model = kit, Branching()
        self.optimizer: Optimizer = (make or (lambda p: torch.optim.AdamW(p, lr=0.01)))(self.model.parameters())
        self.scheduler = {
            "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
            "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=99),
            "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.9, min_lr=[1e-5]),
        }[schedule](self.optimizer)
        options = {"c": {"lr": 0.02, "weight_decay": 0.5}}
        arguments = {"newborn_options": lambda owner: options.get(owner, {}), **arguments}
        self.state = TrainingState(self.model, self.optimizer, self.scheduler, **arguments)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = (self.model(torch.randn(5, 3)) - 1).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step(*([1.0] if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            losses.append(float(loss.detach()))
        return losses

    def owners(self) -> list[str]:
        return [group["owner"] for group in self.optimizer.param_groups]

    def group(self, owner: str) -> dict[str, Any]:
        return next(group for group in self.optimizer.param_groups if group["owner"] == owner)

    def contents(self) -> Any:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in self.optimizer.param_groups]
        state = {names[id(p)]: dict(values) for p, values in self.optimizer.state.items()}
        schedule = self.kit.schedule(self.scheduler)
        return copy.deepcopy((self.model.topology(), self.kit.tensors(self.model), groups, state, schedule))

    def ids(self) -> Any:
        tensors = {name: (id(p), p.data_ptr()) for name, p in self.model.named_parameters()}
        return tensors, {group.get("owner"): id(group) for group in self.optimizer.param_groups}


SCHEDULES = ["lambda", "onecycle", "plateau"]


def test_the_fake_keeps_the_protocol() -> None:
    assert isinstance(Branching(), DynamicModel)
    assert not isinstance(nn.Linear(1, 1), DynamicModel)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_optimizer_follows_the_model(kit: Any, schedule: str) -> None:
    run = Grown(kit, schedule)
    run.steps(2)
    moments = copy.deepcopy(run.optimizer.state[run.model.host.weight])
    run.model.add("a")
    run.model.add("c")
    assert run.owners() == ["host", "a", "c"]
    assert kit.same(dict(run.optimizer.state[run.model.host.weight]), dict(moments))
    assert run.group("c")["weight_decay"] == 0.5
    assert run.group("a")["lr"] == run.group("host")["lr"]
    ratio = run.group("c")["lr"] / run.group("host")["lr"]
    run.steps(3)
    assert run.group("c")["lr"] / run.group("host")["lr"] == pytest.approx(ratio)
    assert set(run.state.learning_rates()) == {"host", "a", "c"}
    run.state.verify()
    run.model.remove("a")
    assert run.owners() == ["host", "c"]
    run.steps(1)
    run.state.verify()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rewind_across_an_added_branch_removes_it(kit: Any, schedule: str) -> None:
    run = Grown(kit, schedule)
    run.model.add("b")
    run.steps(2)
    snapshot, before, (tensors, groups) = run.state.capture(), run.contents(), run.ids()
    losses = run.steps(2)
    after = run.contents()
    for _ in range(2):
        run.model.add("c")
        run.steps(2)
        run.state.restore(snapshot)
        assert kit.same(run.contents(), before)
        assert run.ids() == (tensors, groups)
        run.state.verify()
        assert run.steps(2) == losses
        assert kit.same(run.contents(), after)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rewind_across_a_removed_branch_brings_it_back(kit: Any, schedule: str) -> None:
    run = Grown(kit, schedule)
    run.model.add("a", width=2)
    run.model.add("c")
    run.steps(2)
    snapshot, before, (tensors, groups) = run.state.capture(), run.contents(), run.ids()
    checksum = snapshot.checksum()
    losses = run.steps(2)
    run.model.remove("a")
    run.model.add("b")
    run.steps(1)
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.owners() == ["host", "a", "c"]
    kept = {name: ids for name, ids in run.ids()[0].items() if "branches.a" not in name}
    assert kept == {name: ids for name, ids in tensors.items() if "branches.a" not in name}
    assert {owner: run.ids()[1][owner] for owner in ("host", "c")} == {owner: groups[owner] for owner in ("host", "c")}
    run.state.verify()
    assert run.steps(2) == losses
    assert snapshot.checksum() == checksum


def test_a_branch_of_the_same_name_that_germinated_anew_is_another(kit: Any) -> None:
    run = Grown(kit)
    run.model.add("a", width=2)
    run.steps(2)
    snapshot, before = run.state.capture(), run.contents()
    run.model.remove("a")
    run.model.add("a", width=5)
    run.steps(2)
    other = run.model.branches["a"]
    run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.model.branches["a"] is not other
    run.steps(1)


def test_the_rates_of_groups_that_changed_places_stay_with_their_owners(kit: Any) -> None:
    """Rate functions are in no state_dict, so that they must follow by owner."""
    run = Grown(kit)
    first, second = (lambda step: 1.0), (lambda step: 0.5)
    run.model.add("a")
    run.model.add("b")
    run.scheduler.lr_lambdas[:] = [first, first, second]
    snapshot = run.state.capture()
    run.model.remove("a")
    assert run.scheduler.lr_lambdas == [first, second]
    run.state.restore(snapshot)
    assert run.owners() == ["host", "a", "b"]
    assert run.scheduler.lr_lambdas == [first, first, second]


@pytest.mark.parametrize("strategy", ["reset", "keep"])
def test_reset_and_keep_follow_the_structure_too(kit: Any, strategy: Any) -> None:
    run = Grown(kit)
    run.model.add("a")
    run.steps(2)
    snapshot, weights = run.state.capture(), kit.tensors(run.model)
    run.model.remove("a")
    run.model.add("b")
    run.steps(2)
    host, rate = dict(run.optimizer.state[run.model.host.weight]), run.group("host")["lr"]
    run.state.restore(snapshot, strategy)
    assert kit.same(kit.tensors(run.model), weights)
    assert run.owners() == ["host", "a"]
    assert run.group("host")["lr"] == rate
    now = dict(run.optimizer.state.get(run.model.host.weight, {}))
    assert kit.same(now, host if strategy == "keep" else {})
    assert len(run.optimizer.state) == (2 if strategy == "keep" else 0)
    run.state.verify()
    run.steps(2)


class Trap:
    """An extra whose load works at first and raises when armed."""

    armed = False

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        if self.armed:
            self.armed = False
            raise RuntimeError("trapped")


@pytest.mark.parametrize(
    ("place", "strategy"),
    [("scaler", "restore"), ("scaler", "adopt"), ("module", "restore"), ("module", "reset"), ("module", "keep")],
)
def test_a_failed_rewind_across_a_change_takes_the_change_back(kit: Any, place: str, strategy: Any) -> None:
    trap = Trap()
    run = Grown(kit, scaler=trap)
    run.model.add("a")
    run.steps(2)
    snapshot = run.state.capture()
    run.model.remove("a")
    run.model.add("b")
    run.steps(2)
    before, ids, moments = run.contents(), run.ids(), {id(p): id(v) for p, v in run.optimizer.state.items()}
    if place == "scaler":
        trap.armed = True
    else:
        snapshot.meta["model"]["model"]["frozen"] = 3  # what makes a reader fail half-way
    with pytest.raises((RuntimeError, TypeError), match=r"trapped|not iterable"):
        run.state.adopt(snapshot) if strategy == "adopt" else run.state.restore(snapshot, strategy)
    assert kit.same(run.contents(), before)
    assert run.ids() == ids
    assert {id(p): id(v) for p, v in run.optimizer.state.items()} == moments
    run.state.verify()
    run.steps(1)


def test_a_structure_the_model_refuses_changes_nothing(kit: Any) -> None:
    run = Grown(kit)
    run.model.numbers["z"] = 7
    run.model.widths["z"] = 7
    snapshot = run.state.capture()
    del run.model.numbers["z"]
    before, ids = run.contents(), run.ids()
    with pytest.raises(StateMismatch, match=r"branches must be a, b or c, got \['z'\]"):
        run.state.restore(snapshot)
    assert kit.same(run.contents(), before)
    assert run.ids() == ids


def test_a_snapshot_does_not_share_the_models_topology(kit: Any) -> None:
    run = Grown(kit)
    run.model.add("a")
    snapshot = run.state.capture()
    run.model.numbers["a"] = 99
    run.model.widths["a"] = 99
    assert snapshot.meta["model"]["model"]["topology"] == {"numbers": {"a": 1}, "widths": {"a": 4}, "born": 1}
    run.state.restore(snapshot)
    run.model.numbers["a"] = 98
    run.state.restore(snapshot)
    assert run.model.numbers == {"a": 1}


@pytest.mark.parametrize("strategy", ["reset", "copy", "rescale", "adaptive"])
def test_another_runs_structure_is_adopted_with_our_own_rates(kit: Any, strategy: Any) -> None:
    source, target = Grown(kit), Grown(kit)
    source.model.add("a")
    source.model.add("c")
    source.steps(3)
    target.model.add("b")
    target.steps(1)
    rate, ids = target.group("host")["lr"], target.ids()
    target.state.adopt(source.state.capture(), strategy)
    assert target.owners() == ["host", "a", "c"]
    assert kit.same(kit.tensors(target.model), kit.tensors(source.model))
    assert target.ids()[0]["host.weight"] == ids[0]["host.weight"]
    assert target.group("host")["lr"] == target.group("a")["lr"] == rate
    assert target.group("c")["lr"] == 0.02
    assert target.group("c")["weight_decay"] == 0.5
    assert len(target.optimizer.state) == (0 if strategy == "reset" else 14)
    if strategy == "copy":
        weight = target.model.branches["c"][0].weight
        theirs = source.optimizer.state[source.model.branches["c"][0].weight]
        assert kit.same(dict(target.optimizer.state[weight]), dict(theirs))
    target.state.verify()
    target.steps(2)


def test_a_checkpoint_rebuilds_the_structure_in_a_fresh_run(kit: Any, tmp_path: Path) -> None:
    run = Grown(kit, "onecycle")
    run.model.add("a", width=2)
    run.steps(2)
    run.model.add("c")
    run.steps(2)
    run.state.save(tmp_path / "c")
    chance = torch.get_rng_state()
    losses, after = run.steps(3), run.contents()
    fresh = Grown(kit, "onecycle")
    fresh.state.load(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), chance)
    assert fresh.steps(3) == losses
    assert kit.same(fresh.contents(), after)
    fresh.state.verify()


def test_a_checkpoint_of_a_structure_that_is_refused_changes_nothing(kit: Any, tmp_path: Path) -> None:
    run, other = Grown(kit), Grown(kit)
    other.model.add("z")
    other.state.save(tmp_path / "c")
    before = run.contents()
    with pytest.raises(CheckpointError, match="c: does not fit this run: branches must be a, b or c"):
        run.state.load(tmp_path / "c")
    assert kit.same(run.contents(), before)


def test_growth_the_optimizer_cannot_follow_is_undone(kit: Any) -> None:
    run = Grown(kit, make=lambda p: torch.optim.LBFGS(p, lr=0.1))
    before, ids = kit.tensors(run.model), [id(p) for p in run.model.parameters()]
    with pytest.raises(StateMismatch, match="LBFGS must keep its parameters"):
        run.model.add("a")
    assert kit.same(kit.tensors(run.model), before)
    assert [id(p) for p in run.model.parameters()] == ids
    run.state.verify()


def test_growth_that_another_follower_refuses_is_undone_in_the_optimizer_too(kit: Any) -> None:
    run = Grown(kit)
    run.model.add("a")
    run.steps(2)
    before, ids = run.contents(), run.ids()

    def refuse() -> None:
        raise RuntimeError("no")

    run.model.on_topology_change(refuse)
    for change in (lambda: run.model.add("c"), lambda: run.model.remove("a")):
        with pytest.raises(RuntimeError, match="no"):
            change()
        run.model.born = 1  # the fake counts what it tried
        assert kit.same(run.contents(), before)
        assert run.ids() == ids
    run.model.followers.pop()
    run.state.verify()
    run.steps(1)


def test_muon_and_adamw_share_what_grows_by_shape(kit: Any) -> None:
    model = Branching()
    optimizers = {
        "matrices": torch.optim.Muon([model.host.weight], lr=0.01),
        "rest": torch.optim.AdamW([model.host.bias], lr=0.01),
    }
    state = TrainingState(model, optimizers)
    model.add("a")
    held = {part: [p.ndim for group in o.param_groups for p in group["params"]] for part, o in optimizers.items()}
    assert held == {"matrices": [2, 2, 2], "rest": [1, 1, 1, 1, 1]}
    state.verify()
    model.remove("a")
    assert [len(o.param_groups) for o in optimizers.values()] == [1, 1]


def test_a_model_frozen_whole_and_thawed_finds_its_optimizer_again() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState(model, optimizer, extras={"ema": nn.Linear(2, 1)})
    model.requires_grad_(False)
    state.reshape()
    assert optimizer.param_groups[0]["params"] == []
    model.requires_grad_(True)
    state.reshape()
    state.verify()
    assert optimizer.param_groups[0]["params"] == [model.weight, model.bias]
