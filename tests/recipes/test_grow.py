"""The grow job end to end on a short budget: what it leaves behind, faults, interruption, and the artefact."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from morphogen.errors import MorphogenError
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.config import GrowConfig
from morphogen.recipes.grow import GrowResult, check, grow, resume
from morphogen.telemetry.events import Event, discard
from morphogen.telemetry.jsonl import read_records
from morphogen.testing.interruptions import At, PowerCut, cut_power, interrupt

Small = Callable[..., GrowConfig]


def comparable(result: GrowResult) -> list[dict[str, object]]:
    """Results without what differs from run to run: time."""
    return [{**dataclasses.asdict(arm), "wall_seconds": 0} for arm in result.results]


def log_of(directory: Path) -> list[dict[str, object]]:
    """The event log without times and paths."""
    dropped = ("seconds", "wall_seconds", "command", "rows")
    records = read_records(directory / "events.jsonl").records
    return [{name: value for name, value in record.items() if name not in dropped} for record in records]


def test_every_promised_file_is_there_and_complete(finished: GrowResult) -> None:
    assert finished.finished and not finished.lost_sinks
    for name in ("config.yaml", "events.jsonl", "report.html", "summary.json", "grown.pt2", "grown.safetensors", "networks"):
        assert (finished.directory / name).exists(), name
    assert any((finished.directory / "tensorboard").rglob("events.out*"))
    summary = json.loads((finished.directory / "summary.json").read_text())
    assert summary["finished"] is True
    assert [row["arm"] for row in summary["rows"]] == ["static", "reference", "grown"]
    assert len(summary["results"]) == 6
    assert not any((finished.directory / "checkpoints").glob("*/"))


def test_the_log_is_whole_and_ordered(finished: GrowResult) -> None:
    log = read_records(finished.directory / "events.jsonl")
    assert log.malformed_count == 0
    kinds = [record["event"] for record in log.records]
    assert kinds[0] == "RunStarted" and kinds[-1] == "RunFinished"
    assert kinds.count("ArmStarted") == kinds.count("ArmFinished") == 6


def test_both_faults_were_injected_seen_and_rewound(finished: GrowResult) -> None:
    records = [record for record in read_records(finished.directory / "events.jsonl").records if record.get("arm") == "grown"]
    for repeat in (0, 1):
        own = [record for record in records if record["repeat"] == repeat]
        assert [record["fault"] for record in own if record["event"] == "FaultInjected"] == ["nan", "spike"]
        rewinds = [record for record in own if record["event"] == "Rollback"]
        assert [record["step"] for record in own if record["event"] == "StepSkipped"][:1] == [100]
        assert [record["from_step"] for record in rewinds] == [180]
        assert all(record["to_step"] < record["from_step"] for record in rewinds)  # pyright: ignore
    page = (finished.directory / "report.html").read_text()
    assert "spike" in page and "nan" in page


def test_faults_touch_the_grown_arm_alone(finished: GrowResult) -> None:
    assert [arm.rollbacks for arm in finished.results if arm.arm != "grown"] == [0, 0, 0, 0]
    assert [arm.rollbacks for arm in finished.results if arm.arm == "grown"] == [1, 1]


def test_the_best_grown_network_on_the_decision_split_is_the_artefact(finished: GrowResult) -> None:
    grown = [arm for arm in finished.results if arm.arm == "grown"]
    best = max(grown, key=lambda arm: arm.decision_metric)
    names = ("grown", f"networks/grown-{best.repeat}")
    first, second = ((finished.directory / f"{name}.safetensors").read_bytes() for name in names)
    assert first == second
    weights = load_file(finished.directory / "grown.safetensors")
    assert (
        sum(value.numel() for name, value in weights.items() if "running" not in name and "num_b" not in name)
        == best.parameters
    )


def test_the_artefact_runs_where_morphogen_is_not_installed(finished: GrowResult, tmp_path: Path) -> None:
    run = ArmRun(GrowConfig(task="digits", repeats=1), "static", 0, discard)
    inputs = run.built.data.test.inputs[:40]
    expected = torch.export.load(finished.directory / "grown.pt2").module()(inputs)
    torch.save({"inputs": inputs, "expected": expected}, tmp_path / "case.pt")
    program = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "morphogen":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
network = torch.export.load({str(finished.directory / "grown.pt2")!r}).module()
print(float((network(case["inputs"]) - case["expected"]).abs().max()), "morphogen" in sys.modules)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert printed.stdout.split() == ["0.0", "False"]


def test_the_program_equals_the_model_it_came_from(finished: GrowResult) -> None:
    networks = json.loads((finished.directory / "summary.json").read_text())["networks"]
    assert [entry["max_abs_difference"] for entry in networks.values()] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tick", "act"),
    [
        *((5, interrupt), (15, cut_power), (27, interrupt)),
        *(pytest.param(tick, act, marks=pytest.mark.slow) for tick, act in ((5, cut_power), (15, interrupt), (27, cut_power))),
    ],
)
def test_a_stopped_job_goes_on_bit_identically(
    tick: int, act: Callable[[], None], tmp_path: Path, small_config: Small, whole: GrowResult
) -> None:
    out = tmp_path / "run"
    if act is interrupt:
        stopped = grow(small_config(inject=("spike@120",)), out, sinks=(At("TickMeasured", tick, act),))
        assert not stopped.finished
    else:
        with pytest.raises(PowerCut):
            grow(small_config(inject=("spike@120",)), out, sinks=(At("TickMeasured", tick, act),))
    result = resume(out)
    assert result.finished
    assert comparable(result) == comparable(whole)
    assert log_of(out) == log_of(whole.directory)
    assert (out / "grown.safetensors").read_bytes() == (whole.directory / "grown.safetensors").read_bytes()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, small_config: Small) -> GrowResult:
    """The undisturbed job that stopped ones are compared with."""
    return grow(small_config(inject=("spike@120",)), tmp_path_factory.mktemp("whole") / "run")


def test_resuming_a_finished_job_changes_nothing(whole: GrowResult) -> None:
    before = (whole.directory / "summary.json").read_text()
    again = resume(whole.directory)
    assert again.finished and again.results == whole.results
    assert (whole.directory / "summary.json").read_text() == before


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(tmp_path: Path, small_config: Small) -> None:
    out = tmp_path / "run"
    grow(small_config(), out, sinks=(At("TickMeasured", 25, interrupt),))
    [data] = (out / "checkpoints").rglob("run/model-*.safetensors")
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    log = (out / "events.jsonl").read_bytes()
    with pytest.raises(MorphogenError, match=f"{data.name}: must have {len(content)} bytes"):
        resume(out)
    assert (out / "events.jsonl").read_bytes() == log
    data.write_bytes(content)
    assert resume(out).finished


def test_listening_changes_no_number(small_config: Small) -> None:
    events: list[Event] = []
    finals: list[dict[str, torch.Tensor]] = []
    for emit in (discard, events.append):
        run = ArmRun(small_config(total_steps=150), "grown", 0, emit)
        while not run.done:
            run.run_tick()
        finals.append({name: value.clone() for name, value in run.model.state_dict().items()})
    assert events
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_the_static_arm_is_the_bare_host(small_config: Small) -> None:
    """Dormant slots, governor and evaluation change nothing: the plain loop gives the same weights."""
    run = ArmRun(small_config(total_steps=60), "static", 0, discard)
    plain = ArmRun(small_config(total_steps=60), "static", 0, discard)
    host, task, data = plain.built.model.host, plain.task, plain.built.data
    optimizer = torch.optim.AdamW(host.parameters(), task.learning_rate, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    per_epoch = len(data.train) // task.batch_size
    for step in range(60):
        epoch, place = divmod(step, per_epoch)
        order = torch.from_numpy(plain.built.streams.numpy("data", epoch, 0).permutation(len(data.train)))
        chosen = order[place * task.batch_size : (place + 1) * task.batch_size]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(host(data.train.inputs[chosen]), data.train.targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    while not run.done:
        run.run_tick()
    trained = run.model.host.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in host.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "mnist2d"}, "Did you mean 'mnist1d'"),
        ({"policy": "heuristics"}, "Did you mean 'heuristic'"),
        ({"device": "cuda:9"}, "`device`"),
        ({"device": "tpu"}, "`device` must be one of"),
        ({"inject": ("nan",)}, "nan@STEP"),
        ({"inject": ("nan@99999",)}, "no effect"),
        ({"inject": ("nan@9",), "arms": ("static",)}, "no effect"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(
    changes: dict[str, object], words: str, tmp_path: Path, small_config: Small
) -> None:
    with pytest.raises(ValueError, match=words):
        grow(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_check_accepts_every_task_and_policy() -> None:
    for task in ("digits", "mnist1d"):
        for policy in ("wait", "random", "periodic", "heuristic"):
            check(GrowConfig(task=task, policy=policy))
