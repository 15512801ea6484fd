"""The job that trains a population, end to end on a short budget: what it leaves behind, interruption, replay, faults."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from morphogen.errors import CheckpointError, MorphogenError
from morphogen.pbt import Exploit, MemberReport, PopulationLost
from morphogen.pbt.changes import differences
from morphogen.pbt.snapshots import from_bytes, to_bytes
from morphogen.pbt.store import Store
from morphogen.recipes.pbt import PBTJobResult, resume_population, train_population
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_members import AgentFactory
from morphogen.recipes.pbt_replay import replay_run
from morphogen.recipes.pbt_results import schedule_of
from morphogen.recipes.policy_file import FILE_NAME, load_policy
from morphogen.rl.ppo import PPO
from morphogen.telemetry.events import Json
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power, interrupt, terminate

MEMBERS, INTERVALS, INTERVAL_STEPS = 4, 4, 64
AGENT = {"num_envs": 2, "rollout_steps": 32, "minibatch_size": 32, "epochs": 1}
POPULATION = {
    "population_size": MEMBERS,
    "total_steps": INTERVALS * INTERVAL_STEPS,
    "perturbation_interval": INTERVAL_STEPS,
    "truncation_ratio": 0.25,
    "optimizer_exploit_strategy": "copy",
}
SMALL = PBTJobConfig(env="CartPole-v1", ppo=AGENT, pbt=POPULATION)  # pyright: ignore[reportArgumentType]
GROWTH = PBTJobConfig(
    member="growth",
    task="digits",
    growth_env={"total_steps": 8, "tick_steps": 2},  # pyright: ignore[reportArgumentType]
    ppo={"num_envs": 1, "epochs": 1, "policy": {"memory_width": 8, "hidden": [8]}},  # pyright: ignore[reportArgumentType]
    pbt={**POPULATION, "population_size": 2, "truncation_ratio": 0.5, "total_steps": 8, "perturbation_interval": 4},  # pyright: ignore[reportArgumentType]
)


def log_of(directory: Path) -> list[dict[str, Any]]:
    """The event log without times and paths, by interval; within one, reports before what was decided on them."""
    dropped = ("seconds", "wall_seconds", "cpu_seconds", "command")
    records = read_records(directory / "events.jsonl").records
    ranks = {"PopulationStarted": -1, "MemberReported": 0, "MemberExploited": 1, "PopulationFinished": 2}
    plain = [{name: value for name, value in record.items() if name not in dropped} for record in records]
    return sorted(plain, key=lambda record: (record.get("interval", 99), ranks[record["event"]], record.get("member", 0)))


def tables_of(directory: Path) -> tuple[list[MemberReport], list[Exploit]]:
    """Everything the directory's database holds, times apart."""
    with Store(directory) as store:
        reports, exploits = store.reports(), store.exploits()
    return [dataclasses.replace(report, cpu_seconds=0.0) for report in reports], exploits


def policy_of(directory: Path) -> dict[str, bytes]:
    agent = PPO.load(directory / "policy")
    named = agent.state.capture().named_tensors()
    agent.close()
    kept = {f"{part} {name}": tensor.numpy().tobytes() for part, name, tensor in named if "generators" not in name}
    assert len(kept) > 30
    return kept


def summary_of(directory: Path) -> dict[str, Any]:
    summary = json.loads((directory / "summary.json").read_text())
    return {name: value for name, value in summary.items() if not name.endswith("_seconds")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PBTJobResult:
    """The undisturbed job that stopped ones are compared with."""
    return train_population(SMALL, tmp_path_factory.mktemp("whole") / "run")


def test_every_promised_file_is_there_and_complete(whole: PBTJobResult) -> None:
    assert whole.finished and not whole.lost_sinks and whole.policy == "policy"
    names = {path.name for path in whole.directory.iterdir()}
    promised = {"config.yaml", "events.jsonl", "report.html", "summary.json", "schedule.yaml", "policy", "population.db"}
    assert promised | {"snapshots", "tensorboard"} <= names
    assert "checkpoints" not in names
    assert len(list((whole.directory / "snapshots").iterdir())) == MEMBERS, "retention keeps those of the last interval"
    assert "CartPole-v1: a population of 4" in (whole.directory / "report.html").read_text()
    folders = {path.name for path in (whole.directory / "tensorboard").iterdir()}
    assert folders == {f"member-{member}" for member in range(MEMBERS)}


def test_the_log_tells_of_everybody(whole: PBTJobResult) -> None:
    log = read_records(whole.directory / "events.jsonl")
    kinds = [record["event"] for record in log.records]
    assert log.malformed_count == 0 and (kinds[0], kinds[-1]) == ("PopulationStarted", "PopulationFinished")
    assert kinds.count("MemberReported") == MEMBERS * INTERVALS
    _, exploits = tables_of(whole.directory)
    assert kinds.count("MemberExploited") == len(exploits) >= 1, "this seed exploits; else the other tests say little"


def test_the_summary_and_the_schedule_are_those_of_the_best_member(whole: PBTJobResult) -> None:
    reports, exploits = tables_of(whole.directory)
    summary, schedule = summary_of(whole.directory), yaml.safe_load((whole.directory / "schedule.yaml").read_text())
    final = {report.member: report.score for report in reports if report.interval == INTERVALS}
    assert whole.score == max(final.values()) == final[whole.best or 0] == summary["best"]["score"]
    assert summary["scores"] == {f"{member}": score for member, score in final.items()}
    assert summary["exploits"] == sum(exploit.is_exploit for exploit in exploits)
    assert schedule["member"] == whole.best == summary["best"]["member"]
    stretches = schedule["stretches"]
    assert stretches[0]["first_step"] == 0 and stretches[-1]["last_step"] == INTERVALS * INTERVAL_STEPS
    assert [each["last_step"] for each in stretches[:-1]] == [each["first_step"] for each in stretches[1:]]
    assert stretches[-1]["hyperparameters"] == whole.hyperparameters == summary["best"]["hyperparameters"]


def test_the_saved_policy_is_the_best_member_and_goes_on_as_it_would(whole: PBTJobResult) -> None:
    agent = PPO.load(whole.directory / "policy")
    assert agent.num_steps == INTERVALS * INTERVAL_STEPS
    assert {name: getattr(agent.config, name) for name in whole.hyperparameters} == whole.hyperparameters
    [report] = [
        report for report in tables_of(whole.directory)[0] if (report.member, report.interval) == (whole.best, INTERVALS)
    ]
    state = from_bytes((whole.directory / "snapshots" / f"{report.snapshot}.safetensors").read_bytes())
    member = AgentFactory(SMALL.model_dump(mode="json"))(report.member, report.hyperparameters, report.seed)
    member.load_state_dict(state["member"])
    assert [part.learn(64).recent_returns for part in (agent, member.agent)][0] == member.agent.recent_returns
    agent.close()
    member.close()


def test_a_schedule_follows_takeovers_and_explorations() -> None:
    reports = [
        MemberReport(member, interval, 10 * interval, float(interval), {"lr": rate}, seed=0)
        for member, interval, rate in ((0, 1, 1.0), (0, 2, 1.0), (0, 3, 3.0), (1, 1, 5.0), (1, 2, 6.0), (1, 3, 9.0))
    ]
    base: dict[str, Any] = {
        "source_step": 0,
        "score_before": 0.0,
        "source_score": 1.0,
        "strategy": "reset",
        "moves": {},
    }
    exploits = [
        Exploit(event=0, member=1, interval=1, reason="explore", source=1, source_interval=1,
                hyperparameters_before={}, hyperparameters={}, seed=1, **base),
        Exploit(event=1, member=0, interval=2, reason="worse", source=1, source_interval=2,
                hyperparameters_before={}, hyperparameters={}, seed=1, **base),
    ]  # fmt: skip
    found = [
        (each.member, each.first_step, each.last_step, each.began, each.hyperparameters["lr"])
        for each in schedule_of(0, reports, exploits)
    ]
    assert found == [(1, 0, 10, "start", 5.0), (1, 10, 20, "explored", 6.0), (0, 20, 30, "took over", 3.0)]


# -- interruption


@pytest.mark.parametrize(
    ("kind", "number", "act"),
    [
        ("PopulationStarted", 1, cut_power),
        ("MemberReported", 3, cut_power),
        ("MemberReported", MEMBERS, cut_power),
        ("MemberExploited", 1, cut_power),
        ("MemberReported", 2 * MEMBERS + 2, cut_power),
        ("MemberReported", INTERVALS * MEMBERS, cut_power),
        ("PopulationFinished", 1, cut_power),
        ("MemberReported", 2, interrupt),
        ("MemberReported", MEMBERS + 1, terminate),
    ],
)
def test_a_stopped_job_comes_to_the_same(
    kind: str, number: int, act: Callable[[], None], tmp_path: Path, whole: PBTJobResult
) -> None:
    out = tmp_path / "run"
    if act is cut_power:
        with pytest.raises(PowerCut):
            train_population(SMALL, out, sinks=(At(kind, number, act),))
    else:
        stopped = train_population(SMALL, out, sinks=(At(kind, number, act),))
        assert not stopped.finished and stopped.best is None
    assert not (out / "summary.json").exists()
    result = resume_population(out)
    assert result.finished and (result.best, result.score) == (whole.best, whole.score)
    assert tables_of(out) == tables_of(whole.directory)
    assert log_of(out) == log_of(whole.directory)
    assert summary_of(out) == summary_of(whole.directory)
    assert (out / "schedule.yaml").read_text() == (whole.directory / "schedule.yaml").read_text()
    assert policy_of(out) == policy_of(whole.directory)


def test_a_job_may_be_stopped_again_and_again(tmp_path: Path, whole: PBTJobResult) -> None:
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        train_population(SMALL, out, sinks=(At("MemberReported", 1, cut_power),))
    for _ in range(4):
        with pytest.raises(PowerCut):
            resume_population(out, sinks=(At("MemberReported", 3, cut_power),))
    resume_population(out)
    assert tables_of(out) == tables_of(whole.directory) and log_of(out) == log_of(whole.directory)


def test_resuming_a_finished_job_changes_nothing(whole: PBTJobResult) -> None:
    before = {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()}
    again = resume_population(whole.directory)
    assert (again.best, again.score, again.hyperparameters) == (whole.best, whole.score, whole.hyperparameters)
    assert {file: file.read_bytes() for file in whole.directory.rglob("*") if file.is_file()} == before


def test_a_job_goes_on_with_another_engine_but_with_no_other_config(tmp_path: Path, whole: PBTJobResult) -> None:
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        train_population(SMALL, out, sinks=(At("MemberReported", 5, cut_power),))
    log, config = (out / "events.jsonl").read_bytes(), yaml.safe_load((out / "config.yaml").read_text())
    other = {**config, "ppo": {**config["ppo"], "gamma": 0.5}, "pbt": {**config["pbt"], "seed": 3}}
    (out / "config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(MorphogenError, match=r"ppo\.gamma: 0\.99 -> 0\.5; pbt\.seed: 0 -> 3\. Put it back"):
        resume_population(out)
    assert (out / "events.jsonl").read_bytes() == log
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "engine": "processes", "num_workers": 1}))
    assert resume_population(out).finished
    assert tables_of(out) == tables_of(whole.directory)


@pytest.mark.parametrize("cut", [3, 7, 11, 14])
def test_an_asynchronous_job_goes_on_with_a_log_that_says_everything_once(tmp_path: Path, cut: int) -> None:
    out, apart = tmp_path / "run", SMALL.replace(pbt={**POPULATION, "synchronous": False})
    with pytest.raises(PowerCut):
        train_population(apart, out, sinks=(At("MemberReported", cut, cut_power),))
    assert resume_population(out).finished
    records = read_records(out / "events.jsonl").records
    reported = sorted((r["member"], r["interval"]) for r in records if r["event"] == "MemberReported")
    assert reported == [(member, interval + 1) for member in range(MEMBERS) for interval in range(INTERVALS)]
    reports, exploits = tables_of(out)
    assert sorted((each.member, each.interval) for each in reports) == reported
    said = sorted((r["event_number"], r["member"], r["source"]) for r in records if r["event"] == "MemberExploited")
    assert said == sorted((each.event, each.member, each.source) for each in exploits)


def test_a_finished_job_goes_on_for_longer_where_it_is_asked_to(tmp_path: Path, whole: PBTJobResult) -> None:
    out = tmp_path / "run"
    assert train_population(SMALL, out).finished
    config = yaml.safe_load((out / "config.yaml").read_text())
    steps = config["pbt"]["total_steps"]
    longer = {**config, "pbt": {**config["pbt"], "total_steps": 2 * steps}}
    (out / "config.yaml").write_text(yaml.safe_dump(longer))
    assert resume_population(out).finished  # it is done, and nothing is asked for
    with pytest.raises(MorphogenError, match=rf"`ppo.schedule_steps` must be {steps}: .*new run"):
        resume_population(out, accept_changes=True)
    (out / "config.yaml").write_text(yaml.safe_dump({**longer, "ppo": {**config["ppo"], "schedule_steps": steps}}))
    result = resume_population(out, accept_changes=True)
    assert result.finished
    expected = train_population(
        SMALL.replace(pbt={**POPULATION, "total_steps": 2 * steps}, ppo={**config["ppo"], "schedule_steps": steps}),
        tmp_path / "expected",
    )
    assert (result.best, result.score, result.hyperparameters) == (expected.best, expected.score, expected.hyperparameters)
    assert replay_run(out).is_same
    events = [record["event"] for record in read_records(out / "events.jsonl").records]
    assert events.count("PopulationReconfigured") == 1 and events.count("PopulationFinished") == 1


def test_a_change_is_refused_unless_asked_for(tmp_path: Path, whole: PBTJobResult) -> None:
    out = tmp_path / "run"
    with pytest.raises(PowerCut):
        train_population(SMALL, out, sinks=(At("MemberReported", 5, cut_power),))
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "pbt": {**config["pbt"], "min_gap": 1.0}}))
    with pytest.raises(MorphogenError, match=r"pbt\.min_gap: 0\.0 -> 1\.0\. .*--accept-changes"):
        resume_population(out)
    log, seed = (out / "events.jsonl").read_bytes(), {**config["pbt"], "seed": 9}
    written = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "pbt": seed}))
    for accept_changes in (False, True):  # this one nobody can ask for, and nothing is touched
        with pytest.raises(MorphogenError, match=r"pbt\.seed: 0 -> 9\. Put it back, or begin a new run"):
            resume_population(out, accept_changes=accept_changes)
        assert (out / "events.jsonl").read_bytes() == log
    (out / "config.yaml").write_text(written)
    assert resume_population(out, accept_changes=True).finished
    assert resume_population(out).finished


def test_a_job_under_way_is_not_run_twice(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said: list[str] = []

    def try_it() -> None:
        with pytest.raises(MorphogenError, match="in use by another run") as caught:
            resume_population(out)
        said.append(str(caught.value))

    train_population(SMALL.replace(pbt={**POPULATION, "total_steps": 128}), out, sinks=(At("MemberReported", 1, try_it),))
    assert len(said) == 1


def test_differences_are_shown_setting_by_setting() -> None:
    before: dict[str, Json] = {"a": 1, "in": {"b": [1], "c": None}}
    assert differences(before, {"a": 1, "in": {"b": [2], "c": None}, "d": 3}) == ["in.b: [1] -> [2]", "d: None -> 3"]


# -- replay


def test_the_best_lineage_alone_comes_to_the_same(whole: PBTJobResult) -> None:
    replayed = replay_run(whole.directory)
    assert replayed.is_same and replayed.same_parameters is True
    assert [each.interval for each in replayed.intervals] == list(range(1, INTERVALS + 1))
    assert replayed.verdict == "4 of 4 scores are bit-identical to those of the run; so are the parameters at the end."


@pytest.mark.parametrize("score", ["training", "evaluation"])
def test_a_lineage_that_goes_through_takeovers_is_replayed(score: str, tmp_path: Path) -> None:
    population = {**POPULATION, "population_size": 3, "truncation_ratio": 0.34, "total_steps": 320, "seed": 2}
    result = train_population(SMALL.replace(pbt=population, score=score), tmp_path / "run")
    lineage = summary_of(result.directory)["best"]["lineage"]
    assert len(lineage) > 1, "this seed's best member took another one over; choose one whose does"
    replayed = replay_run(result.directory)
    assert {each.member for each in replayed.intervals} == {*lineage}
    assert replayed.is_same and replayed.same_parameters is True


def test_a_replay_says_what_differs(whole: PBTJobResult, tmp_path: Path) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "population.db") as database:
        database.execute("UPDATE reports SET score = score + 1 WHERE interval = 1")
    replayed = replay_run(tmp_path / "run")
    assert not replayed.is_same and replayed.verdict.startswith("3 of 4 scores")
    for file in (tmp_path / "run" / "snapshots").iterdir():
        file.write_bytes(b"")
    assert replay_run(tmp_path / "run").same_parameters is None


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    apart = SMALL.replace(pbt={**POPULATION, "total_steps": 128, "synchronous": False})
    train_population(apart, tmp_path / "apart")
    with pytest.raises(ValueError, match="`synchronous` must be True"):
        replay_run(tmp_path / "apart")
    train_population(SMALL, tmp_path / "stopped", sinks=(At("MemberReported", 1, interrupt),))
    with pytest.raises(MorphogenError, match="must be a finished run to be replayed. Go on with it first"):
        replay_run(tmp_path / "stopped")
    with pytest.raises(MorphogenError, match="cannot be read"):
        replay_run(tmp_path / "nowhere")


# -- members


def test_members_may_be_made_anywhere() -> None:
    factory = AgentFactory(SMALL.model_dump(mode="json"))
    for made_by in (factory, pickle.loads(pickle.dumps(factory))):
        member = made_by(0, {}, 11)
        assert member.agent.config == SMALL.agent(11)
        assert (member.agent.config.schedule_steps, member.agent.config.num_threads) == (INTERVALS * INTERVAL_STEPS, 1)
        member.close()


def test_the_arguments_of_the_environments_reach_training_and_evaluation(tmp_path: Path) -> None:
    agent = {**AGENT, "num_envs": 1, "rollout_steps": 64}
    config = SMALL.replace(
        env="Pendulum-v1", env_kwargs={"max_episode_steps": 16}, ppo=agent, score="evaluation", evaluation_episodes=2,
        pbt={**POPULATION, "total_steps": 128},
    )  # fmt: skip
    result = train_population(config, tmp_path / "run")
    assert result.finished
    agent = AgentFactory(config.model_dump(mode="json"))(0, {}, 1)
    env = agent._evaluation_env()  # pyright: ignore
    assert agent.agent.evaluate(2, env).lengths == (16, 16)
    env.close()
    agent.close()


def test_a_population_of_growth_controllers_leaves_a_policy(tmp_path: Path) -> None:
    result = train_population(GROWTH, tmp_path / "run")
    assert result.finished and result.policy == "policy.safetensors"
    policy = load_policy(tmp_path / "run")
    assert policy.origin.task == "digits" and policy.origin.facts["steps"] == 8
    records = read_records(tmp_path / "run" / "events.jsonl").records
    reported = [record for record in records if record["event"] == "MemberReported"]
    assert len(reported) == 4
    metrics: Any = reported[-1]["metrics"]
    assert 0.0 <= metrics["metric"] <= 1.0 and metrics["parameters"] > 0
    assert replay_run(tmp_path / "run").is_same
    assert AgentFactory(GROWTH.model_dump(mode="json"))(0, {}, 1).agent.config.rollout_steps == 4, "one whole episode"


def test_a_population_of_growth_controllers_goes_on(tmp_path: Path) -> None:
    plain = train_population(GROWTH, tmp_path / "whole")
    with pytest.raises(PowerCut):
        train_population(GROWTH, tmp_path / "run", sinks=(At("MemberReported", 3, cut_power),))
    again = resume_population(tmp_path / "run")
    assert (again.best, again.score) == (plain.best, plain.score)
    first, second = (load_file(tmp_path / name / FILE_NAME) for name in ("whole", "run"))
    assert len(first) > 10 and all(torch.equal(first[name], second[name]) for name in first)


# -- faults


def test_members_that_all_fail_are_one_clear_line_and_the_run_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the motor is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(PPO, "learn", fail)
        with pytest.raises(PopulationLost, match="the motor is on fire") as caught:
            train_population(SMALL, tmp_path / "run")
    assert caught.value.__notes__ == [f"What was done is saved. Go on with: morphogen resume {tmp_path / 'run'}"]
    log = read_records(tmp_path / "run" / "events.jsonl").records
    assert [record["event"] for record in log][-1] == "PopulationFaulted"
    assert "Stopped by PopulationLost" in (tmp_path / "run" / "report.html").read_text()


def test_a_best_member_whose_snapshot_is_gone_is_an_error_with_a_way_on(tmp_path: Path) -> None:
    def lose() -> None:
        for file in (tmp_path / "run" / "snapshots").glob("*.safetensors"):
            file.unlink()

    with pytest.raises(CheckpointError, match="cannot be read"):
        train_population(SMALL, tmp_path / "run", sinks=(At("MemberReported", INTERVALS * MEMBERS, lose),))


def test_bytes_of_parameters_are_the_same_for_the_same_parameters() -> None:
    values = {"a": torch.arange(3.0)}
    assert to_bytes(values) == to_bytes({"a": torch.arange(3.0)}) != to_bytes({"a": torch.arange(1.0, 4.0)})
