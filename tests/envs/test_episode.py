"""One episode: what it measures, counts and draws is its own affair, and what is kept of it goes on as it would have."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from morphogen import tasks
from morphogen.control import Op
from morphogen.envs import GrowthEnvConfig
from morphogen.envs.episode import Episode
from morphogen.envs.frames import Frames
from morphogen.growth import Stage
from morphogen.growth.ablation import ablated_values
from morphogen.growth.config import GateConfig, GrowthConfig
from morphogen.tasks import Task, TaskData
from morphogen.tasks.training import TaskTraining

DIGITS = tasks.get("digits")
CONFIG = GrowthEnvConfig(
    total_steps=40,
    tick_steps=2,
    growth=GrowthConfig(
        gates=GateConfig(min_training_ticks=1, min_blending_ticks=1, min_holding_ticks=1, min_contribution=-1.0)
    ),
)
WAIT = np.zeros(8, dtype=np.int64)


def choices(op: Op, slot: int = 0, blueprint: int = 0, style: int = 0) -> np.ndarray:
    return np.array([op, slot, blueprint, style, 0, 2, 0, 0])


GROWING = [choices(Op.GERMINATE, 0), choices(Op.ADVANCE), WAIT, choices(Op.ADVANCE), choices(Op.GERMINATE, 1, 2, 3)]


@pytest.fixture(scope="module")
def dropping() -> Task:
    """A task whose host draws in training."""

    def make_host(data: TaskData) -> nn.Module:
        parts = dict(DIGITS.make_host(data).named_children())
        blocks = {name: parts.pop(name) for name in ("block1", "block2")}
        return nn.Sequential(OrderedDict(blocks | {"dropout": nn.Dropout(0.3)} | parts))

    return dataclasses.replace(DIGITS, make_host=make_host)


def numbers(episode: Episode) -> Frames:
    frames = Frames.empty(1, 4)
    episode.write(frames, 0)
    return frames


def same(left: Frames, right: Frames) -> bool:
    return all(
        np.array_equal(ours, theirs, equal_nan=True)
        for ours, theirs in ((left.runs_NG, right.runs_NG), (left.slots_NSR, right.slots_NSR))
    )


def test_what_others_draw_does_not_matter_and_neither_do_they_notice(dropping: Task) -> None:
    alone = Episode(dropping, CONFIG, 0, 0)
    for action in GROWING:
        alone.step(action)
    torch.rand(7)
    before = torch.get_rng_state()
    first, other = Episode(dropping, CONFIG, 0, 0), Episode(dropping, CONFIG, 1, 0)
    for action in GROWING:
        first.step(action)
        other.step(action)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(numbers(first), numbers(alone))
    assert not same(numbers(other), numbers(alone))


def test_dropout_is_drawn_anew_in_every_step(dropping: Task) -> None:
    episode = Episode(dropping, CONFIG.replace(total_steps=2, tick_steps=1), 0, 0)
    masks: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        masks.append(output == 0.0)

    episode.model.host.get_submodule("dropout").register_forward_hook(keep)
    episode.step(WAIT)
    episode.step(WAIT)
    trained = [mask for mask in masks if len(mask) == DIGITS.batch_size]
    assert len(trained) == 2
    assert not torch.equal(trained[0], trained[1])


def test_what_was_kept_goes_on_as_it_would_have(dropping: Task) -> None:
    episode = Episode(dropping, CONFIG, 3, 1)
    for action in GROWING[:3]:
        episode.step(action)
    before = torch.get_rng_state()
    state = episode.state_dict()
    later = Episode.from_state(dropping, CONFIG, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(numbers(later), numbers(episode))
    for action in GROWING[3:]:
        episode.step(action)
        later.step(action)
        assert same(numbers(later), numbers(episode))


def test_measuring_is_what_the_guarded_way_measures_and_leaves_the_mode() -> None:
    episode = Episode(DIGITS, CONFIG, 0, 0)
    for action in GROWING:
        episode.step(action)
    model = episode.model
    assert [stage.name for stage in model.stages().values()] == ["BLENDING", "GERMINATED"]
    rows = [frozenset[str](), frozenset(["block1"])]
    values_RN = ablated_values(model, episode.training.decision_batches(), DIGITS.per_sample, rows)
    frames = numbers(episode)
    assert frames.run("metric")[0] == float(values_RN[0].mean())
    assert frames.run("all_off_metric")[0] == float(values_RN[1].mean())
    assert frames.slot("contribution")[0, 0] == frames.run("metric")[0] - frames.run("all_off_metric")[0]
    assert all(module.training for module in model.modules())


def test_seeds_train_in_training_mode_and_are_measured_in_eval_mode() -> None:
    episode = Episode(DIGITS, CONFIG, 0, 0)
    for action in GROWING[:2]:
        episode.step(action)
    seed = episode.model.slot("block1").seed
    assert seed is not None
    modes: list[bool] = []
    for module in seed.modules():
        module.register_forward_hook(lambda module, args, output: modes.append(module.training))
    episode.step(choices(Op.ADVANCE))
    assert episode.model.stages()["block1"] is Stage.BLENDING
    assert set(modes[:2]) == {True}
    assert modes[-1] is False


def test_compute_is_that_of_every_step_and_every_ablation_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    episode = Episode(DIGITS, CONFIG, 0, 0)
    whole = TaskTraining(episode.training.built, total_steps=40, newborn=CONFIG.newborn).flops
    backward: Callable[..., object] = episode.training._backward

    def counted(*args: object) -> object:
        return whole.run(("step", number), lambda: backward(*args))

    monkeypatch.setattr(episode.training, "_backward", counted)
    for number, action in enumerate(GROWING):
        episode.step(action)
        acting = [name for name, stage in episode.model.stages().items() if stage in (Stage.BLENDING, Stage.HOLDING)]
        for name in acting:
            batches = episode.training.decision_batches()
            without = partial(ablated_values, episode.model, batches, DIGITS.per_sample, [frozenset([name])])
            whole.run(("off", number, name), without)
    assert episode.training.flops.total == whole.total


def test_parameters_are_those_of_the_seeds_that_are_there() -> None:
    episode = Episode(DIGITS, CONFIG, 0, 0)
    for action in [*GROWING, choices(Op.PRUNE, 1), choices(Op.PRUNE, 0), WAIT]:
        episode.step(action)
        frames, owned = numbers(episode), episode.model.owners()
        counts = {owner: sum(parameter.numel() for _, parameter in pairs) for owner, pairs in owned.items()}
        assert frames.run("host_parameters")[0] == counts["host"]
        assert frames.run("parameters")[0] == sum(counts.values()) == episode.model.num_parameters()
        assert frames.slot("parameters")[0, :2].tolist() == [counts.get("block1", 0), counts.get("block2", 0)]


def test_metrics_of_the_past_are_in_order() -> None:
    episode = Episode(DIGITS, CONFIG, 0, 0)
    metrics = [numbers(episode).run("metric")[0]]
    for _ in range(7):
        episode.step(WAIT)
        metrics.append(numbers(episode).run("metric")[0])
        lags = [numbers(episode).run(f"metric_{lag}")[0] for lag in range(1, 6)]
        known = metrics[-2::-1][:5]
        assert lags[: len(known)] == known
        assert np.isnan(lags[len(known) :]).all()


def test_frames_know_their_numbers() -> None:
    frames = Frames.empty(2, 1)
    frames.write_run(1, {"metric": 0.5})
    frames.write_slot(1, 0, {"stage": 2})
    assert frames.run("metric").tolist()[1] == 0.5
    assert frames.slot("stage")[1, 0] == 2.0
    assert np.isnan(frames.runs_NG).sum() == frames.runs_NG.size - 1
    with pytest.raises(KeyError, match="no number called metrik"):
        frames.write_run(0, {"metrik": 0.5})
