"""Training a built task: its batches, what a step costs, and that nothing of it depends on how it is fetched or counted."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from morphogen import tasks
from morphogen.growth import GrowthConfig, Sowing, Stage
from morphogen.growth.newborn import NewbornConfig
from morphogen.tasks import Task, training as training_module
from morphogen.tasks.training import TaskTraining
from morphogen.testing import LENIENT, lead_to

DIGITS = tasks.get("digits")
STEPS_AN_EPOCH = 1000 // DIGITS.batch_size


def begun(task: Task = DIGITS, growth: GrowthConfig = LENIENT, seed: int = 0) -> TaskTraining:
    return TaskTraining(task.build(seed=seed, config=growth), total_steps=1000, newborn=NewbornConfig())


def take_step(training: TaskTraining) -> None:
    training.backward(*training.batch(), training.structure())
    training.step()
    training.cursor.step += 1


def rows_of(training: TaskTraining, inputs: Tensor) -> list[int]:
    """Find the training samples in a batch."""
    train = training.built.data.train.inputs.flatten(1)
    return [int((train == sample).all(1).nonzero()[0]) for sample in inputs.flatten(1)]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_sample_at_most_once_and_the_next_in_another_order() -> None:
    training = begun()
    epochs: list[list[int]] = []
    for _ in range(2):
        shown: list[Tensor] = []
        for _ in range(STEPS_AN_EPOCH):
            inputs, targets = training.batch()
            assert inputs.shape == (64, 1, 8, 8)
            assert torch.equal(targets, training.built.data.train.targets[rows_of(training, inputs)])
            shown.append(inputs)
            training.cursor.step += 1
        epochs.append(rows_of(training, torch.cat(shown)))
    assert all(len(epoch) == STEPS_AN_EPOCH * 64 for epoch in epochs)
    # digits has a few images twice
    assert all(len(set(epoch)) > 0.98 * len(epoch) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("block_bytes", [1, 40_000, 2**20])
def test_batches_are_a_function_of_step_and_shuffle_however_many_are_gathered_at_once(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = begun()
    places = [0, 3, 2, STEPS_AN_EPOCH - 1, STEPS_AN_EPOCH, 5 * STEPS_AN_EPOCH + 7, 0]
    expected: dict[tuple[int, int], Tensor] = {}
    for step, shuffle in itertools.product(range(max(places) + 1), (0, 1)):
        straight.cursor.step = step
        expected[step, shuffle] = straight.batch(shuffle)[0].clone()
    monkeypatch.setattr(training_module, "_BLOCK_BYTES", block_bytes)
    jumping = begun()
    for step, shuffle in itertools.product(places, (1, 0)):
        jumping.cursor.step = step
        assert torch.equal(jumping.batch(shuffle)[0], expected[step, shuffle])
    assert not torch.equal(expected[3, 0], expected[3, 1])


# -- costs ------------------------------------------------------------------------------------------------------------


def test_costs_of_parts_add_up_to_what_a_whole_step_counts() -> None:
    training = begun()
    model = training.built.model
    inputs, _ = training.batch()
    kinds = [("conv3x3", "add"), ("squeeze_excite", "gate"), ("depthwise", "scale"), ("mlp", "add")]
    stages = [Stage.DORMANT, Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED]
    for (blueprint, operator), (early, late) in zip(itertools.cycle(kinds), itertools.product(stages, repeat=2), strict=False):
        training = begun()
        model = training.built.model
        for slot, stage in (("block1", early), ("block2", late)):
            if stage is not Stage.DORMANT:
                model.germinate(slot, Sowing(blueprint=blueprint, operator=operator))
                lead_to(model, slot, stage, inputs)
        model.train()
        before = training.flops.total
        training.backward(*training.batch(), training.structure())
        assert sum(training.step_flops().values()) == training.flops.total - before, (blueprint, early, late)


def test_a_kind_of_seed_is_counted_once_and_costs_what_it_is() -> None:
    training = begun()
    model = training.built.model
    host = training.step_flops()
    assert set(host) == {"host", "block1", "block2"}
    assert host["block1"] == host["block2"] == 0 < host["host"]
    costs: list[int] = []
    for expansion in (2, 4):
        model.germinate("block1", Sowing(blueprint="conv3x3", options={"expansion": expansion}))
        lead_to(model, "block1", Stage.HOLDING, training.batch()[0])
        costs.append(training.step_flops()["block1"])
        assert training.step_flops(backward=False)["block1"] < costs[-1]
        model.prune("block1")
        while model.stages()["block1"] is not Stage.DORMANT:
            model.tick()
    assert costs[1] == 2 * costs[0]
    assert training.step_flops() == host


def test_counts_are_shared_between_runs_of_a_task_and_not_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    begun().step_flops()
    half = dataclasses.replace(DIGITS, batch_size=32)
    assert begun(half).step_flops()["host"] * 2 == begun().step_flops()["host"]
    monkeypatch.setattr(training_module, "count_flops", None)  # nothing is left to count
    begun(seed=1).step_flops()
    with pytest.raises(TypeError):
        begun(dataclasses.replace(DIGITS, batch_size=16)).step_flops()


def test_a_count_does_not_change_the_run() -> None:
    counted, plain = begun(), begun()
    for _ in range(3):
        counted.step_flops()
        counted.step_flops(backward=False)
        take_step(counted)
        plain.backward(*plain.batch(), None)
        plain.step()
        plain.cursor.step += 1
    pairs = zip(counted.built.model.state_dict().values(), plain.built.model.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert plain.flops.total == 0 < counted.flops.total


def test_measuring_counts_by_which_slots_are_switched_off() -> None:
    training = begun()
    model = training.built.model
    take_step(training)
    for slot in ("block1", "block2"):
        model.germinate(slot, "conv3x3")
        lead_to(model, slot, Stage.HOLDING, training.batch()[0])
    costs: list[int] = []
    for slots in ([], ["block1"], ["block1", "block2"], ["block1"]):
        before = training.flops.total
        training.measure(slots)
        costs.append(training.flops.total - before)
    assert costs[0] == 0 < costs[1] == costs[3]
    assert costs[2] == 2 * costs[1]


# -- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "newborn",
    [NewbornConfig(), NewbornConfig(learning_rate_scale=0.5, warmup_steps=3), NewbornConfig(learning_rate="restart")],
    ids=["inherit", "scaled", "restart"],
)
def test_rates_in_closed_form_are_those_of_the_scheduler(newborn: NewbornConfig) -> None:
    runs = [
        TaskTraining(DIGITS.build(config=LENIENT), total_steps=40, newborn=newborn, closed_form=closed_form)
        for closed_form in (False, True)
    ]
    for step in range(40):
        rates: list[dict[str, float]] = []
        for run in runs:
            if step in (7, 20):
                run.built.model.germinate("block1" if step == 7 else "block2", "conv3x3")
            run.backward(*run.batch(), None)
            rates.append(run.state.learning_rates())
            run.step()
            run.cursor.step += 1
        assert rates[0].keys() == rates[1].keys()
        assert rates[1] == pytest.approx(rates[0], rel=1e-6, abs=1e-12)
        assert runs[0].newborn.ages_steps == runs[1].newborn.ages_steps
    assert len(rates[0]) == 3
    assert all(rate == pytest.approx(0.0, abs=1e-9) for run in runs for rate in run.state.learning_rates().values())


def test_a_run_in_closed_form_goes_back_and_on_to_the_same(tmp_path: Path) -> None:
    run = TaskTraining(DIGITS.build(config=LENIENT), total_steps=40, newborn=NewbornConfig(), closed_form=True)
    finals: list[dict[str, Tensor]] = []
    for step in (*range(12), *range(6, 12)):
        if run.cursor.step == 6 and not finals:
            run.built.model.germinate("block1", "conv3x3")
            run.state.save(tmp_path / "run")
        run.backward(*run.batch(), None)
        run.step()
        run.cursor.step += 1
        if step == 11:
            finals.append({name: value.clone() for name, value in run.built.model.state_dict().items()})
            run.state.load(tmp_path / "run")
            assert run.cursor.step == 6
    assert all(torch.equal(finals[0][name], value) for name, value in finals[1].items())
