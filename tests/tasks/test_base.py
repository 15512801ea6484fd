"""Tasks: what build gives, and what it refuses before anything is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from morphogen import tasks
from morphogen.growth import Stage
from morphogen.tasks import Task

NAMES = ("digits", "mnist1d")


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return tasks.get(request.param)


def test_names_are_the_registry() -> None:
    assert tasks.names() == NAMES


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"`task` must be one of digits, mnist1d, got 'mnist2d'. Did you mean 'mnist1d'\?"):
        tasks.get("mnist2d")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0", torch.device("cpu", 0)])
def test_devices_come_as_strings_or_objects(task: Task, device: torch.device | str) -> None:
    built = task.build(device)
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
    task: Task, device: Any, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    monkeypatch.setattr(tasks.base, "draw_from", lambda generator: loads.append(1))
    with pytest.raises(kind, match=words):
        task.build(device)
    assert not loads


def test_slots_choose_and_order_the_growth_points(task: Task) -> None:
    assert list(task.build(slots=["block2", "block1"]).model.stages()) == ["block2", "block1"]
    assert list(task.build().model.stages()) == list(task.points)


@pytest.mark.parametrize("slots", [[], ["block1", "block1"], ["block1", "blok2"]])
def test_slots_that_make_no_sense_are_refused(task: Task, slots: list[str]) -> None:
    with pytest.raises(ValueError, match="`slots` must name growth points"):
        task.build(slots=slots)


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
        outputs = built.model(built.data.train.inputs[:500])
        losses.append(task.loss(outputs, built.data.train.targets[:500]).item())
    assert sum(losses) / 5 == pytest.approx(math.log(10), rel=0.08)


def test_the_full_size_reference_has_all_growth_and_shares_the_host(task: Task) -> None:
    small, full = task.build(seed=3), task.build(seed=3, full_size=True)
    assert set(full.model.stages().values()) == {Stage.FOSSILIZED}
    assert full.model.num_parameters() > 3 * small.model.num_parameters()
    host, same = small.model.host.state_dict(), full.model.host.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in host.items())
    x = small.data.test.inputs[:20]
    assert torch.equal(small.model.eval()(x), full.model.eval()(x))  # residuals are zero at birth


def test_fossils_of_different_slots_start_from_different_streams(task: Task) -> None:
    model = task.build(full_size=True).model
    first, second = (model.get_parameter(f"slots.{name}.seed.body.inner.weight") for name in ("block1", "block2"))
    assert not torch.equal(first, second)


def test_every_parameter_is_in_the_optimizer_with_its_owner(task: Task) -> None:
    built = task.build(full_size=True)
    owned = {group["owner"]: len(group["params"]) for group in built.optimizer.param_groups}
    assert owned == {owner: len(pairs) for owner, pairs in built.model.owners().items()}


def test_correct_is_one_for_each_hit(task: Task) -> None:
    outputs = torch.eye(10)[[3, 1, 4]]
    assert task.correct(outputs, torch.tensor([3, 0, 4])).tolist() == [1.0, 0.0, 1.0]


def test_every_sowing_fits_every_point(task: Task) -> None:
    for sowing in task.blueprints:
        model = task.build().model
        for slot in task.points:
            model.germinate(slot, sowing)
            assert model.stages()[slot] is Stage.GERMINATED
