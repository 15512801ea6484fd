"""What a population leaves behind: its best member as a file, that member's schedule, the summary."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from morphogen.pbt.engines.hosting import one_thread
from morphogen.pbt.history import Exploit, MemberReport, lineage, success_by_strategy
from morphogen.pbt.snapshots import read_snapshot
from morphogen.pbt.trainer import PopulationResult
from morphogen.recipes.pbt_config import PBTJobConfig
from morphogen.recipes.pbt_members import AgentFactory, growth_of
from morphogen.recipes.policy_file import FILE_NAME, save_policy
from morphogen.recipes.run_directory import RunDirectory, write_text
from morphogen.rl.ppo import PPO
from morphogen.telemetry.events import to_json

SCHEDULE = "schedule.yaml"
"""What the schedule is called in a run directory."""
SNAPSHOTS = "snapshots"
_POLICY = "policy"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps of a lineage with the same hyperparameters.

    Attributes:
        first_step: Where it begins.
        last_step: Where it ends.
        member: Whose place it was.
        began: How it began: "start", "took over" or "explored".
        reason: Why; empty at the start.
        hyperparameters: In use.
        score: At its end.
    """

    first_step: int
    last_step: int
    member: int
    began: str
    reason: str
    hyperparameters: Mapping[str, Any]
    score: float


def schedule_of(member: int, reports: Sequence[MemberReport], exploits: Sequence[Exploit]) -> list[Stretch]:
    """Return what ``member`` was trained with from the start of its lineage to its last report."""
    known = {(report.member, report.interval): report for report in reports}
    changes = {(exploit.member, exploit.interval): exploit for exploit in exploits}
    last = max(report.interval for report in reports if report.member == member)
    stretches: list[Stretch] = []
    step = 0
    for segment in lineage(member, last, exploits):
        for interval in range(segment.first, segment.last + 1):
            report, change = known[segment.member, interval], changes.get((segment.member, interval - 1))
            stretch = Stretch(
                first_step=step,
                last_step=report.step,
                member=segment.member,
                began="start" if change is None else "took over" if change.is_exploit else "explored",
                reason="" if change is None else change.reason,
                hyperparameters=report.hyperparameters,
                score=report.score,
            )
            if change is None and stretches:
                begun = stretches.pop()
                stretch = dataclasses.replace(begun, last_step=stretch.last_step, score=stretch.score)
            stretches.append(stretch)
            step = report.step
    return stretches


def best_report(result: PopulationResult) -> MemberReport:
    """Return the last report of the best member."""
    return max((report for report in result.reports if report.member == result.best), key=lambda report: report.interval)


@contextlib.contextmanager
def best_agent(config: PBTJobConfig, directory: Path, report: MemberReport) -> Generator[PPO]:
    """Give the agent of ``report`` with all it had at that moment, episodes under way included.

    Raises:
        CheckpointError: Its snapshot is gone or damaged.
    """
    state = read_snapshot(str(directory / SNAPSHOTS), report.snapshot or "")
    member = AgentFactory(config.model_dump(mode="json"))(report.member, report.hyperparameters, report.seed)
    with one_thread(), contextlib.closing(member):
        member.load_state_dict(state["member"])
        yield member.agent


def save_best(config: PBTJobConfig, directory: RunDirectory, result: PopulationResult) -> str:
    """Write the best member and its schedule; returns the name of the first."""
    report = best_report(result)
    with best_agent(config, directory.path, report) as agent:
        if config.member == "ppo":
            name = _POLICY
            agent.save(directory.path / name)
        else:
            name = FILE_NAME
            facts = {"steps": report.step, "score": report.score, "config": config.model_dump(mode="json")}
            save_policy(agent, growth_of(agent), directory.path / name, facts)
    stretches = schedule_of(result.best, result.reports, result.exploits)
    content = {"member": result.best, "score": result.score, "stretches": [dataclasses.asdict(each) for each in stretches]}
    write_text(directory.path / SCHEDULE, yaml.safe_dump(to_json(content), sort_keys=False))
    return name


def summary_of(config: PBTJobConfig, result: PopulationResult, *, policy: str, wall_seconds: float) -> dict[str, Any]:
    """Return what ``summary.json`` says of a finished job."""
    last = max(report.interval for report in result.reports)
    final = [report for report in result.reports if report.interval == last]
    summary: dict[str, Any] = {
        "finished": True,
        "member": config.member,
        "env" if config.member == "ppo" else "task": config.subject,
        "population_size": config.pbt.population_size,
        "steps_per_member": config.pbt.total_steps,
        "best": {
            "member": result.best,
            "score": result.score,
            "hyperparameters": dict(result.hyperparameters),
            "lineage": [segment.member for segment in lineage(result.best, last, result.exploits)],
        },
        "scores": {f"{report.member}": report.score for report in final},
        "exploits": sum(exploit.is_exploit for exploit in result.exploits),
        "explorations": sum(not exploit.is_exploit for exploit in result.exploits),
        "lost": sum(bool(report.problem) for report in result.reports),
        "success_by_strategy": [dataclasses.asdict(row) for row in success_by_strategy(result.exploits, mode=config.pbt.mode)],
        "policy": policy,
        "schedule": SCHEDULE,
        "cpu_seconds": sum(report.cpu_seconds for report in result.reports),
        "wall_seconds": wall_seconds,
    }
    return cast("dict[str, Any]", to_json(summary))
