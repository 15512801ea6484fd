"""Tasks: what build gives, and what it refuses before anything is built."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from morphogen import tasks
from morphogen.growth import Stage
from morphogen.tasks import Task

NAMES = (
    "digits",
    "mnist1d",
    "mnist",
    "fashion_mnist",
    "cifar10",
    "cifar10_impaired",
    "cifar10_deep",
    "cifar10_minimal",
    "text",
    "text_byte",
    "tinystories",
)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest, task_named: Callable[[str], Task]) -> Task:
    return task_named(request.param)


@pytest.fixture(params=("digits", "text"))
def one_of_each_kind(request: pytest.FixtureRequest, task_named: Callable[[str], Task]) -> Task:
    return task_named(request.param)


def test_names_are_the_registry() -> None:
    assert tasks.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_task_has_the_name_it_is_got_by(name: str) -> None:
    assert tasks.get(name).name == name


def test_tasks_are_got_without_their_data_packages() -> None:
    code = f"import sys\nfrom morphogen import tasks\nfor name in {NAMES}:\n tasks.get(name)\n"
    code += "print({'sklearn', 'mnist1d', 'datasets', 'pyarrow', 'PIL', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"`task` must be one of digits, mnist1d, .*got 'mnist2d'. Did you mean 'mnist1d'\?"):
        tasks.get("mnist2d")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0", torch.device("cpu", 0)])
def test_devices_come_as_strings_or_objects(one_of_each_kind: Task, device: torch.device | str) -> None:
    built = one_of_each_kind.build(device)
    assert all(parameter.device.type == "cpu" for parameter in built.model.parameters())


@pytest.mark.parametrize(
    ("device", "kind", "words"),
    [
        ("tpu", ValueError, "must be one of cpu, cuda, mps"),
        ("cpu:x", ValueError, "must be one of"),
        ("cpu:1", ValueError, "index below 1"),
        ("meta", ValueError, "must be one of"),
        (torch.device("meta"), ValueError, "must be one of"),
        (0, TypeError, "torch.device or a string"),
        pytest.param("cuda", ValueError, "no cuda device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA")),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_anything_is_built(
    one_of_each_kind: Task, device: Any, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    monkeypatch.setattr(tasks.base, "draw_from", lambda generator: loads.append(1))
    with pytest.raises(kind, match=words):
        one_of_each_kind.build(device)
    assert not loads


def test_slots_choose_and_order_the_growth_points(task: Task) -> None:
    assert list(task.build(slots=["block2", "block1"]).model.stages()) == ["block2", "block1"]
    assert list(task.build().model.stages()) == list(task.points)


@pytest.mark.parametrize("slots", [[], ["block1", "block1"], ["block1", "blok2"]])
def test_slots_that_make_no_sense_are_refused(one_of_each_kind: Task, slots: list[str]) -> None:
    with pytest.raises(ValueError, match="`slots` must name growth points"):
        one_of_each_kind.build(slots=slots)


def test_the_same_seed_builds_the_same_and_another_seed_another(task: Task) -> None:
    first, second, other = (task.build(seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_building_draws_from_no_global_stream(task: Task) -> None:
    before = torch.get_rng_state()
    task.build(full_size=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_loss_is_that_of_guessing(task: Task) -> None:
    losses: list[float] = []
    for seed in range(5):
        built = task.build(seed=seed)
        inputs, targets = built.data.train.rows(slice(500))
        losses.append(task.loss(built.model(inputs), targets).item())
    assert sum(losses) / 5 == pytest.approx(
        math.log(built.data.num_classes), rel=0.08 if task.name in ("digits", "mnist1d") else 0.03
    )


def test_the_full_size_reference_has_all_growth_and_shares_the_host(task: Task) -> None:
    small, full = task.build(seed=3), task.build(seed=3, full_size=True)
    assert set(full.model.stages().values()) == {Stage.FOSSILIZED}
    assert full.model.num_parameters() > 1.2 * small.model.num_parameters()
    host, same = small.model.host.state_dict(), full.model.host.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in host.items())
    x, _ = small.data.test.rows(slice(20))
    assert torch.equal(small.model.eval()(x), full.model.eval()(x))  # residuals are zero at birth


def test_fossils_of_different_slots_start_from_different_streams(task: Task) -> None:
    owned = task.build(full_size=True).model.owners()
    drawn = [
        next(value for _, value in owned[slot] if value.ndim > 1 and value.abs().max() > 0) for slot in ("block1", "block2")
    ]
    first, second = (value.flatten()[:8] for value in drawn)
    assert not torch.equal(first / first.abs().max(), second / second.abs().max())  # the scale may follow the width


def test_every_parameter_is_in_the_optimizer_with_its_owner(task: Task) -> None:
    built = task.build(full_size=True)
    owned = {group["owner"]: len(group["params"]) for group in built.optimizer.param_groups}
    assert owned == {owner: len(pairs) for owner, pairs in built.model.owners().items()}


def test_loss_and_metric_are_those_of_the_objective(task: Task) -> None:
    built = task.build()
    inputs, targets = built.data.decision.rows(slice(8))
    outputs = built.model(inputs)
    assert torch.equal(task.loss(outputs, targets), task.objective.loss(outputs, targets))
    values = task.per_sample(outputs, targets)
    assert values.shape == (len(inputs),)
    assert torch.equal(values, task.objective.per_sample(outputs, targets))
    assert task.metric_name == task.objective.metric_name


def test_a_step_of_training_lowers_the_loss(task: Task) -> None:
    built = task.build()
    inputs, targets = built.data.train.rows(slice(64))
    losses: list[float] = []
    for _ in range(6):
        built.optimizer.zero_grad()
        loss = task.loss(built.model(inputs), targets)
        loss.backward()
        built.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_sowing_fits_every_point(task: Task) -> None:
    for sowing in task.blueprints:
        model = task.build().model
        for slot in task.points:
            model.germinate(slot, sowing)
            assert model.stages()[slot] is Stage.GERMINATED
