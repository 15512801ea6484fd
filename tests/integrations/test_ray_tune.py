"""Members under Ray Tune: whatever order it calls them in, what is in force is the config that came last."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune
from ray.tune.result import TRIAL_INFO
from ray.tune.schedulers import PopulationBasedTraining

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.integrations.ray_tune import MemberTrainable, trainable
from morphogen.pbt import Trained
from morphogen.testing.engine_members import OTHER, START, TroubledMember

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


class Watched(TroubledMember):
    """Tells with each score what its optimizer and its dropout use."""

    def train(self, until: int) -> Trained:
        trained = super().train(until)
        live = {"live_rate": self.optimizer.param_groups[0]["lr"], "live_dropout": self.model[3].p}
        return Trained(trained.score, trained.scores, {**live, "weight": float(self.model[0].weight.detach().sum())})


def watched(number: int, hyperparameters: Mapping[str, Any], seed: int) -> Watched:
    return Watched(seed, at_step=-1)


def broken(number: int, hyperparameters: Mapping[str, Any], seed: int) -> Watched:
    return Watched(seed, "raises", at_step=2)


Trial = Callable[..., MemberTrainable]


@pytest.fixture
def trial() -> Generator[Trial]:
    """Make a Trainable as Tune makes one for the trial of a number."""
    made: list[MemberTrainable] = []

    def make(number: int, hyperparameters: Mapping[str, Any], factory: Any = watched, **settings: Any) -> MemberTrainable:
        kind = trainable(factory, steps_per_iteration=4, **settings)
        made.append(kind(told(number, hyperparameters)))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def told(number: int, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    return {**hyperparameters, TRIAL_INFO: types.SimpleNamespace(trial_id=f"ab12c_{number:05d}", trial_name="one")}


def in_force(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"learning_rate": result["live_rate"], "dropout": result["live_dropout"]}


def facts(result: Mapping[str, Any]) -> tuple[float, ...]:
    return result["score"], result["weight"], result["timesteps_total"]


def test_a_checkpoint_of_the_same_trial_is_gone_on_from_bit_identically(trial: Trial, tmp_path: Path) -> None:
    first = trial(3, START)
    first.train()
    checkpoint = first.save(str(tmp_path))
    expected = facts(first.train())
    again = trial(3, START)
    again.restore(checkpoint)
    assert facts(again.train()) == expected
    first.restore(checkpoint)
    assert facts(first.train()) == expected
    assert expected[2] == 8


@pytest.mark.parametrize("order", ["reset first", "load first", "new actor"])
def test_the_new_config_is_in_force_after_another_trial_was_taken_over(trial: Trial, tmp_path: Path, order: str) -> None:
    source = trial(0, START)
    source.train()
    checkpoint = source.save(str(tmp_path))
    target = trial(1, OTHER if order == "new actor" else START, optimizer_exploit_strategy="copy")
    if order == "new actor":
        target.restore(checkpoint)
    else:
        target.train()
        target.train()
        calls = [lambda: target.reset(told(1, OTHER)), lambda: target.restore(checkpoint)]
        for call in calls if order == "reset first" else reversed(calls):
            call()
    weight = float(source._members._members[0].model[0].weight.detach().sum())
    assert float(target._members._members[1].model[0].weight.detach().sum()) == weight
    result = target.train()
    assert in_force(result) == OTHER
    assert result["timesteps_total"] == 8, "steps are those of the source, and those since"


def test_a_config_that_changes_alone_changes_nothing_else(trial: Trial) -> None:
    one = trial(0, START)
    weight = one.train()["weight"]
    assert one.reset(told(0, OTHER))
    assert float(one._members._members[0].model[0].weight.detach().sum()) == weight
    assert in_force(one.train()) == OTHER


def test_the_new_config_is_in_force_after_a_checkpoint_of_the_same_trial(trial: Trial, tmp_path: Path) -> None:
    one = trial(0, START)
    one.train()
    checkpoint = one.save(str(tmp_path))
    one.reset(told(0, OTHER))
    one.restore(checkpoint)
    assert in_force(one.train()) == OTHER


def test_children_of_one_source_draw_differently(trial: Trial, tmp_path: Path) -> None:
    source = trial(0, START)
    source.train()
    checkpoint = source.save(str(tmp_path))
    children = [trial(number, START) for number in (1, 2, 1)]
    for child in children:
        child.restore(checkpoint)
    weights = [each.train()["weight"] for each in children]
    assert weights[0] == weights[2] != weights[1]


@pytest.mark.parametrize(("strategy", "is_kept"), [("reset", False), ("copy", True)])
def test_moments_follow_the_strategy(trial: Trial, tmp_path: Path, strategy: str, is_kept: bool) -> None:
    source, target = trial(0, START), trial(1, START, optimizer_exploit_strategy=strategy)
    source.train()
    target.restore(source.save(str(tmp_path)))
    theirs, ours = (
        each._members._members[number].optimizer.state_dict()["state"] for number, each in enumerate((source, target))
    )
    assert bool(ours) == is_kept
    assert not is_kept or all(torch.equal(ours[key]["exp_avg"], theirs[key]["exp_avg"]) for key in theirs)


def test_an_actor_given_to_another_trial_begins_anew(trial: Trial) -> None:
    used = trial(0, START)
    used.train()
    used.reset(told(5, OTHER))
    result = used.train()
    assert facts(result) == facts(trial(5, OTHER).train())
    assert in_force(result) == OTHER


def test_checkpoints_hold_no_pickle_and_damaged_ones_are_refused(trial: Trial, tmp_path: Path) -> None:
    one = trial(0, START)
    one.train()
    one.save(str(tmp_path))
    files = [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert [file.suffix for file in files] == [".safetensors"]
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        one.restore(str(tmp_path))
    files[0].unlink()
    with pytest.raises(CheckpointError, match="must hold one file"):
        one.restore(str(tmp_path))


def test_what_a_member_raises_ends_its_trial(trial: Trial) -> None:
    with pytest.raises(MorphogenError, match="trial ab12c_00007: RuntimeError: this one is broken"):
        trial(7, START, broken).train()


def test_misuse(trial: Trial) -> None:
    with pytest.raises(ValueError, match="`steps_per_iteration` must be at least 1, got 0"):
        trainable(watched, steps_per_iteration=0)
    with pytest.raises(MorphogenError, match="`learning_rat` must be one of learning_rate, dropout"):
        trial(0, {"learning_rat": 0.1}).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Consider boosting PBT performance by enabling `reuse_actors`:UserWarning")
@pytest.mark.parametrize("reuse_actors", [False, True])
def test_population_based_training_by_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse_actors: bool) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    memory = {"object_store_memory": 100_000_000}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, **memory)
    try:
        scheduler = PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=1,
            hyperparam_mutations={"learning_rate": tune.loguniform(1e-4, 1e-1), "dropout": [0.0, 0.25, 0.5]},
            quantile_fraction=0.5,
            synch=True,
        )
        tuner = tune.Tuner(
            trainable(watched, steps_per_iteration=2),
            param_space={"learning_rate": tune.grid_search([1e-3, 1e-1]), "dropout": 0.25},
            tune_config=tune.TuneConfig(scheduler=scheduler, metric="score", mode="max", reuse_actors=reuse_actors),
            run_config=tune.RunConfig(storage_path=str(tmp_path), name="run", stop={"training_iteration": 3}, verbose=0),
        )
        results = tuner.fit()
    finally:
        ray.shutdown()
    assert not results.errors
    histories = [result.metrics_dataframe for result in results]
    # Tune counts the iterations of whoever was taken over: a trial may go from its first to its third.
    assert all(history["training_iteration"].iloc[-1] == 3 for history in histories)
    for history in histories:
        assert (history["live_rate"] == history["config/learning_rate"]).all()
        assert (history["live_dropout"] == history["config/dropout"]).all()
    assert any(history["config/learning_rate"].nunique() > 1 for history in histories), "somebody took over another one"
