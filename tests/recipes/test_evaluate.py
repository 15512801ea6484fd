"""The evaluate job end to end, tiny: pairing, held-out seeds, interruption, transfer, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from morphogen.envs import GrowthVectorEnv
from morphogen.envs.choices import action_config
from morphogen.envs.episode import Episode
from morphogen.errors import CheckpointError, MorphogenError
from morphogen.recipes.evaluate import EvaluateResult, evaluate, resume_evaluation
from morphogen.recipes.evaluate_config import FIRST_HELD_OUT_SEED, EvaluateConfig
from morphogen.rl import PPO, PPOConfig
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power, interrupt


def config_of(file: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(policy=str(file), episodes=3, num_envs=2, resamples=200).replace(**changes)


@pytest.fixture(scope="module")
def finished(small_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    return evaluate(config_of(small_policy), tmp_path_factory.mktemp("evaluate") / "run")


def log_of(directory: Path) -> list[dict[str, Any]]:
    """The event log without times and paths."""
    records = read_records(directory / "events.jsonl").records
    return [{name: value for name, value in record.items() if name not in ("seconds", "command")} for record in records]


def test_every_player_plays_every_held_out_seed_once(finished: EvaluateResult) -> None:
    seeds = [FIRST_HELD_OUT_SEED + place for place in range(3)]
    for player in ("learned", "wait", "random", "periodic", "heuristic"):
        assert sorted(each.seed for each in finished.played if each.player == player) == seeds
    assert all(0 <= each.test_metric <= 1 and each.ticks == 4 for each in finished.played)
    assert [row.player for row in finished.rows] == ["learned", "wait", "random", "periodic", "heuristic"]


def test_what_was_played_is_what_the_environment_gives(finished: EvaluateResult, small_policy: Path) -> None:
    env = GrowthVectorEnv("digits", 1, total_steps=8, tick_steps=2, measure_test=True)
    for episode in (each for each in finished.played if each.player == "wait"):
        env.reset(seed=[episode.seed])
        total, info = 0.0, {}
        for _ in range(4):
            _, reward, _, _, info = env.step(np.zeros((1, 8), dtype=int))
            total += float(reward[0])
        assert episode.total_return == pytest.approx(total)
        assert episode.test_metric == info["final_info"]["test_metric"][0]
        assert episode.parameters == episode.host_parameters and episode.relative_flops == 1.0


def test_training_never_resets_with_a_held_out_seed() -> None:
    env = GrowthVectorEnv("digits", 1)
    for root in (0, 1, 2**31, 2**40):
        agent = PPO(env, PPOConfig(action=action_config(), seed=root))
        assert agent._parts.streams.environments + 10_000 < FIRST_HELD_OUT_SEED
    ranges = [EvaluateConfig(policy="x", seed=seed, episodes=1000).seeds for seed in (0, 1, 2)]
    assert len(set().union(*ranges)) == 3000 and min(map(min, ranges)) == FIRST_HELD_OUT_SEED


def test_it_leaves_a_run_directory(finished: EvaluateResult, small_policy: Path) -> None:
    path = finished.directory
    summary = json.loads((path / "summary.json").read_text())
    assert summary["finished"] and summary["sentences"] == list(finished.sentences) and len(summary["episodes"]) == 15
    assert (path / "policy.safetensors").read_bytes() == small_policy.read_bytes()
    page = (path / "report.html").read_text()
    assert page.count("<svg") >= 2 and "Pareto front of the means" in page and "Too few episodes" in page
    assert "morphogen train --task digits" in page  # how the policy came about


_PROCESSES = pytest.param({"executor": "processes", "num_workers": 1}, marks=pytest.mark.slow)


@pytest.mark.parametrize("changes", [{"num_envs": 1}, {"num_envs": 3}, _PROCESSES])
def test_no_result_depends_on_how_it_is_played(
    finished: EvaluateResult, small_policy: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = config_of(small_policy, against=("random",), **changes)
    result = evaluate(config, tmp_path / "run")
    expected = {(each.player, each.seed): each for each in finished.played if each.player in ("learned", "random")}
    assert {(each.player, each.seed): each for each in result.played} == expected


@pytest.mark.parametrize("episode", [1, 4])
def test_a_killed_evaluation_goes_on_where_it_was(
    finished: EvaluateResult, small_policy: Path, tmp_path: Path, episode: int
) -> None:
    path = tmp_path / "run"
    with pytest.raises(PowerCut):
        evaluate(config_of(small_policy), path, sinks=(At("EpisodePlayed", episode, cut_power),))
    result = resume_evaluation(path)
    assert result.finished and result.rows == finished.rows and result.differences == finished.differences
    assert [record for record in log_of(path) if record["event"] == "EpisodePlayed"] == [
        record for record in log_of(finished.directory) if record["event"] == "EpisodePlayed"
    ]


def test_an_interrupted_evaluation_stops_within_the_batch_and_resumes(
    finished: EvaluateResult, small_policy: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    copy = tmp_path / "policy.safetensors"
    copy.write_bytes(small_policy.read_bytes())
    result = evaluate(config_of(copy), path, sinks=(At("EpisodePlayed", 4, interrupt),))
    assert not result.finished and len(result.played) == 4 and result.rows == () and result.sentences == ()
    copy.unlink()  # what was begun is what is resumed
    again = resume_evaluation(path)
    assert again.rows == finished.rows
    before = (path / "events.jsonl").read_bytes()
    assert resume_evaluation(path).rows == finished.rows  # nothing is left to do
    assert (path / "events.jsonl").read_bytes() == before


def test_an_unfinished_evaluation_has_a_report_without_a_verdict(small_policy: Path, tmp_path: Path) -> None:
    evaluate(config_of(small_policy, against=("wait",)), tmp_path / "run", sinks=(At("EpisodePlayed", 1, interrupt),))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "not finished: 2 of 6 episodes" in page and "No verdict yet" in page


def test_a_policy_is_carried_over_to_another_task(small_policy: Path, tmp_path: Path) -> None:
    config = config_of(small_policy, task="mnist1d", total_steps=4, tick_steps=2, against=("wait",), episodes=2)
    result = evaluate(config, tmp_path / "run")
    assert "trained on digits (transfer)" in result.title and result.title.startswith("mnist1d")
    assert "trained on digits (transfer)" in (tmp_path / "run" / "report.html").read_text()
    assert {each.ticks for each in result.played} == {2}


def test_a_policy_draws_its_choices_unless_told_otherwise(finished: EvaluateResult, small_policy: Path, tmp_path: Path) -> None:
    config = config_of(small_policy, deterministic=True, against=("wait",))
    results = [evaluate(config, tmp_path / name) for name in "ab"]
    assert results[0].played == results[1].played

    def learned(result: EvaluateResult) -> list[object]:
        return [dataclasses.astuple(each) for each in result.played if each.player == "learned"]

    assert learned(results[0]) != learned(finished)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"against": ("wait", "heurstic")}, "Did you mean 'heuristic'"),
        ({"against": ()}, "`against` must"),
        ({"against": ("wait", "wait")}, "`against` must name each policy once"),
        ({"episodes": 1}, "`episodes` must be greater than or equal to 2"),
        ({"task": "mnist1"}, "Did you mean 'mnist1d'"),
        ({"policy": "nowhere"}, "`policy` must be a run directory or a policy file"),
        ({"num_workers": 2}, "`num_workers` must be left out"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    small_policy: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(config_of(small_policy, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_with_more_blueprints_than_the_policy_knows_is_refused(narrow_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(MorphogenError, match="cannot decide about text: `layout.num_blueprints` must be at least 5"):
        evaluate(config_of(narrow_policy, task="text"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_policy_is_refused_before_anything_is_written(small_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(small_policy.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(config_of(tmp_path / "bad.safetensors"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_episode_that_ends_early_counts_once(small_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Episode, "over", property(lambda episode: episode.memory.tick >= (1 if episode.seed % 2 else 4)))
    together, alone = (
        evaluate(config_of(small_policy, against=("random",), episodes=2, num_envs=num_envs), tmp_path / str(num_envs)).played
        for num_envs in (2, 1)
    )
    assert sorted(each.ticks for each in together) == [1, 1, 4, 4]
    assert set(together) == set(alone)
