"""A population that was killed goes on to the result of one that was not; damaged snapshots and refusing disks lose nothing."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphogen.errors import MorphogenError
from morphogen.pbt import PBTConfig, PopulationResult, PopulationTrainer
from morphogen.pbt.events import MemberExploited, MemberLost, MemberReported, PopulationReconfigured
from morphogen.pbt.snapshots import SUFFIX
from morphogen.pbt.store import Store
from morphogen.telemetry.events import Event
from morphogen.testing.engine_members import troubled_member
from morphogen.testing.interruptions import PowerCut

Settings = Callable[..., PBTConfig]


def cut_at(number: int) -> Callable[[Event], None]:
    """Return an ``emit`` that ends the run at the n-th event."""
    left = [number]

    def emit(event: Event) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise PowerCut

    return emit


@pytest.fixture
def whole(settings: Settings, tmp_path: Path) -> PopulationResult:
    return PopulationTrainer(troubled_member, settings(), directory=tmp_path / "whole").run()


def snapshots(path: Path) -> list[Path]:
    return sorted(path.glob(f"snapshots/*{SUFFIX}"))


def test_a_directory_changes_no_number_and_keeps_no_more_than_needed(
    settings: Settings, facts_of: Any, whole: PopulationResult, tmp_path: Path
) -> None:
    assert facts_of(whole) == facts_of(PopulationTrainer(troubled_member, settings()).run())
    assert len(snapshots(tmp_path / "whole")) == 5  # those of the last interval
    again = PopulationTrainer(troubled_member, settings(), directory=tmp_path / "whole").run()
    assert facts_of(again) == facts_of(whole)  # nothing was left to do


@pytest.mark.parametrize(
    ("event", "engine"), [*((event, "inline") for event in (1, 4, 5, 6, 7, 12, 18, 23)), (12, "processes")]
)
def test_a_run_cut_off_anywhere_ends_as_if_it_had_not_been(  # noqa: PLR0917
    settings: Settings, facts_of: Any, whole: PopulationResult, tmp_path: Path, event: int, engine: str
) -> None:
    path = tmp_path / "cut"
    with pytest.raises(PowerCut):
        PopulationTrainer(troubled_member, settings(), directory=path, emit=cut_at(event)).run()
    assert len(snapshots(path)) <= 10
    assert facts_of(PopulationTrainer(troubled_member, settings(), engine, directory=path).run()) == facts_of(whole)


def test_cut_off_again_and_again_it_still_does(
    settings: Settings, facts_of: Any, whole: PopulationResult, tmp_path: Path
) -> None:
    choose, cuts = random.Random(5), 0
    for _ in range(40):
        with contextlib.suppress(PowerCut):
            result = PopulationTrainer(
                troubled_member, settings(), directory=tmp_path / "cut", emit=cut_at(choose.randint(1, 7))
            ).run()
            break
        cuts += 1
    assert cuts >= 3 and facts_of(result) == facts_of(whole)


def test_on_their_own_members_go_on_from_where_each_was(settings: Settings, tmp_path: Path) -> None:
    config = settings(synchronous=False)
    with pytest.raises(PowerCut):
        PopulationTrainer(troubled_member, config, directory=tmp_path / "cut", emit=cut_at(9)).run()
    result = PopulationTrainer(troubled_member, config, directory=tmp_path / "cut").run()
    assert result.finished
    for member in range(5):
        assert [report.interval for report in result.reports if report.member == member] == [1, 2, 3, 4]


def test_what_an_exploit_came_to_is_the_interval_after_it_wherever_the_run_was_cut(
    settings: Settings, facts_of: Any, tmp_path: Path
) -> None:
    config = settings(total_steps=18)
    whole = PopulationTrainer(troubled_member, config).run()
    for reports in range(6, 12):
        path = tmp_path / f"{reports}"
        with pytest.raises(PowerCut):
            PopulationTrainer(troubled_member, config, directory=path, emit=cut_at(reports)).run()
        result = PopulationTrainer(troubled_member, config, directory=path).run()
        assert facts_of(result) == facts_of(whole), reports


def test_on_their_own_what_was_undone_is_no_history(settings: Settings, tmp_path: Path) -> None:
    config = settings(synchronous=False, total_steps=30)
    for events in range(6, 40, 5):
        path = tmp_path / f"{events}"
        with pytest.raises(PowerCut):
            PopulationTrainer(troubled_member, config, directory=path, emit=cut_at(events)).run()
        result = PopulationTrainer(troubled_member, config, directory=path).run()
        used = {(report.member, report.interval): report for report in result.reports}
        assert len({(each.member, each.interval) for each in result.exploits}) == len(result.exploits)
        for exploit in result.exploits:
            after = used[exploit.member, exploit.interval + 1]
            assert (after.hyperparameters, after.seed) == (exploit.hyperparameters, exploit.seed)
            assert after.score == exploit.score_after


_SCRIPT = """
import resource, sys
from morphogen.errors import MorphogenError
from morphogen.pbt import PBTConfig, PopulationTrainer
from morphogen.testing.engine_members import troubled_member
from morphogen.testing.interruptions import PowerCut
largest = int(sys.argv[3])
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
try:
    PopulationTrainer(troubled_member, PBTConfig.model_validate_json(sys.argv[2]), directory=sys.argv[1]).run()
except MorphogenError as error:
    sys.exit(str(error))
"""


def in_a_process(path: Path, config: PBTConfig, largest_file: int = 0) -> subprocess.Popen[str]:
    text = config.model_dump_json(exclude_unset=True)
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(path), text, str(largest_file)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_killed_for_good_it_goes_on(settings: Settings, facts_of: Any, tmp_path: Path) -> None:
    config, path = settings(total_steps=600, perturbation_interval=6), tmp_path / "killed"
    process = in_a_process(path, config)
    give_up = time.monotonic() + 120
    while len(snapshots(path)) < 5 and time.monotonic() < give_up:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = PopulationTrainer(troubled_member, config, directory=path).run()
    assert facts_of(result) == facts_of(PopulationTrainer(troubled_member, config).run())


def test_a_disk_that_refuses_is_said_and_nothing_is_lost(
    settings: Settings, facts_of: Any, whole: PopulationResult, tmp_path: Path
) -> None:
    path = tmp_path / "full"
    process = in_a_process(path, settings(), largest_file=90_000)  # the write-ahead log needs more
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "cannot be" in said and "Traceback" not in said
    assert facts_of(PopulationTrainer(troubled_member, settings(), directory=path).run()) == facts_of(whole)


@pytest.mark.parametrize("damage", ["deleted", "truncated", "a bit flipped"])
def test_a_damaged_snapshot_costs_its_member_alone(settings: Settings, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cut"
    with pytest.raises(PowerCut):
        PopulationTrainer(troubled_member, settings(), directory=path, emit=cut_at(6)).run()
    file = snapshots(path)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(content if damage == "a bit flipped" else content[:-9])
    events = list[Event]()
    result = PopulationTrainer(troubled_member, settings(), directory=path, emit=events.append).run()
    assert result.finished and all(report.score == report.score for report in result.reports if report.interval > 1)
    lost = [event for event in events if isinstance(event, MemberLost)]
    exploits = [event for event in events if isinstance(event, MemberExploited)]
    assert len(lost) == 1 and ("sha256" in lost[0].problem or "cannot be read" in lost[0].problem)
    assert [event.reason for event in exploits if event.member == lost[0].member][:1] == ["lost"]


def test_two_runs_in_one_directory_are_refused(settings: Settings, tmp_path: Path) -> None:
    seen = list[str]()

    def try_another(event: Event) -> None:
        if isinstance(event, MemberReported) and not seen:
            with pytest.raises(MorphogenError) as caught:
                PopulationTrainer(troubled_member, settings(), directory=tmp_path / "run")
            seen.append(str(caught.value))

    result = PopulationTrainer(troubled_member, settings(), directory=tmp_path / "run", emit=try_another).run()
    assert result.finished and "is in use by another run" in seen[0]


def test_another_config_is_refused_with_the_difference(settings: Settings, whole: PopulationResult, tmp_path: Path) -> None:
    with pytest.raises(MorphogenError, match=r"another config: min_gap: 0.0 -> 0.5; seed: 3 -> 4"):
        PopulationTrainer(troubled_member, settings(seed=4, min_gap=0.5), directory=tmp_path / "whole")
    assert PopulationTrainer(troubled_member, settings(), directory=tmp_path / "whole").run().finished


def test_a_change_that_was_asked_for_is_made_and_said(settings: Settings, facts_of: Any, tmp_path: Path) -> None:
    longer, path, events = settings(total_steps=21), tmp_path / "run", list[Event]()
    uninterrupted = PopulationTrainer(troubled_member, longer).run()
    assert PopulationTrainer(troubled_member, settings(), directory=path).run().finished
    with pytest.raises(MorphogenError, match=r"total_steps: 12 -> 21\. .*or accept the change"):
        PopulationTrainer(troubled_member, longer, directory=path)
    trainer = PopulationTrainer(troubled_member, longer, directory=path, accept_changes=True, emit=events.append)
    assert facts_of(trainer.run()) == facts_of(uninterrupted)
    said = [event for event in events if isinstance(event, PopulationReconfigured)]
    assert [event.changes for event in said] == [("total_steps: 12 -> 21",)] and said[0].config["total_steps"] == 21
    assert facts_of(PopulationTrainer(troubled_member, longer, directory=path).run()) == facts_of(uninterrupted)


def test_what_is_decided_again_is_decided_by_the_new_settings(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(PowerCut):
        PopulationTrainer(troubled_member, settings(), directory=path, emit=cut_at(8)).run()
    with Store(path) as store:
        assert [exploit.interval for exploit in store.exploits()] == [1]
    PopulationTrainer(troubled_member, settings(min_gap=1e9), directory=path, accept_changes=True).run()
    with Store(path) as store:
        assert store.exploits() == []


def test_what_members_were_trained_with_cannot_change_whoever_asks(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert PopulationTrainer(troubled_member, settings(total_steps=10), directory=path).run().finished
    for changed, what in (({"seed": 4}, "seed: 3 -> 4"), ({"total_steps": 20}, "total_steps: 10 -> 20, as the last interval")):
        with pytest.raises(MorphogenError, match=rf"another config: {what}.*Use that config, or a new directory\.$"):
            config = settings(**{"total_steps": 10, "min_gap": 0.5, **changed})
            PopulationTrainer(troubled_member, config, directory=path, accept_changes=True)
    assert PopulationTrainer(troubled_member, settings(total_steps=10), directory=path).run().finished


def test_a_process_that_dies_while_its_member_is_saved_is_replaced(settings: Settings, tmp_path: Path) -> None:
    factory = functools.partial(troubled_member, troubles={2: "dies when saved"})
    trainer = PopulationTrainer(factory, settings(), "processes", directory=tmp_path / "run", options={"num_workers": 2})
    result = trainer.run()
    assert result.finished
    died = {report.member for report in result.reports if report.problem}
    assert 2 in died and {report.interval for report in result.reports if report.problem} == {2}
    assert all(math.isfinite(report.score) for report in result.reports if report.interval == 4)


def test_a_file_that_is_no_population_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "population.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(MorphogenError, match=r"population.db: cannot be used"):
        PopulationTrainer(troubled_member, settings(), directory=tmp_path / "run")
