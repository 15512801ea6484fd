"""A plain function trains step by step, and is called anew when it is to go on with other values."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from morphogen.errors import MorphogenError
from morphogen.pbt import FunctionMember, PBTConfig, PopulationTrainer, Trained
from morphogen.pbt.member import bind
from morphogen.pbt.snapshots import from_bytes, to_bytes

CALLS: list[tuple[dict[str, Any], Any]] = []


@pytest.fixture(autouse=True)
def _no_calls() -> Any:
    CALLS.clear()
    before = threading.active_count()
    yield
    for _ in range(100):
        if threading.active_count() <= before:
            return
        time.sleep(0.01)
    raise AssertionError("a function still runs")


def climb(hyperparameters: Mapping[str, Any], state: Any, report: Any) -> None:
    CALLS.append((dict(hyperparameters), state))
    state = {"weights": torch.zeros(2)} if state is None else state
    while True:
        state["weights"] += hyperparameters["step"]
        report({"score": float(state["weights"][0]), "twice": 2 * float(state["weights"][0])}, state=state)


def member(step: float = 0.5, function: Any = climb) -> FunctionMember:
    made = FunctionMember(function)
    bind(made, {"step": step}, "member 0")
    return made


def test_each_report_is_a_step_and_the_function_waits_in_between() -> None:
    one = member()
    assert CALLS == []
    assert one.train(2) == Trained(1.0, metrics={"score": 1.0, "twice": 2.0})
    assert one.train(2).score == 1.0 and one.train(5).score == 2.5
    assert len(CALLS) == 1
    one.close()


def test_it_goes_on_from_the_state_of_another_one_with_other_values() -> None:
    source, target = member(1.0), member(0.25)
    source.train(4)
    target.train(4)
    values = source.get_parameters()
    target.set_parameters(values)
    bind(target, {"step": 0.5}, "member 1")
    assert target.train(6).score == 5.0
    assert CALLS[2][0] == {"step": 0.5}
    source.train(5)
    assert torch.equal(values["state"]["weights"], torch.full((2,), 4.0))  # nothing is shared, in either direction
    assert torch.equal(target.get_parameters()["state"]["weights"], torch.full((2,), 5.0))
    assert source.get_parameters()["num_steps"] == 5
    source.close()
    target.close()


def test_one_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    one = member()
    one.train(3)
    state = from_bytes(to_bytes(one.state_dict()))
    other = FunctionMember(climb)
    other.load_state_dict(state)
    assert other.train(3) == one.train(3)  # the last result is there without a call
    assert other.train(6) == one.train(6)
    one.close()
    other.close()


def test_what_it_raises_is_raised_where_it_is_waited_for_and_again() -> None:
    def fails(hyperparameters: Any, state: Any, report: Any) -> None:
        report(1.0)
        raise OSError("no data")

    one = member(function=fails)
    assert one.train(1).score == 1.0
    for _ in range(2):
        with pytest.raises(OSError, match="no data"):
            one.train(2)
    one.close()


def test_one_that_leaves_the_process_ends_nobody_else() -> None:
    one = member(function=lambda hyperparameters, state, report: sys.exit(3))
    with pytest.raises(SystemExit):
        one.train(1)
    one.close()


def test_one_that_returns_stays_where_it_is() -> None:
    def brief(hyperparameters: Any, state: Any, report: Any) -> None:
        for number in range(3):
            report(float(number), state=number)

    one = member(function=brief)
    assert one.train(5).score == 2.0 and one.train(9).score == 2.0
    assert one.get_parameters() == {"state": 2, "num_steps": 3}
    one.close()


def test_one_that_never_reports_is_told_to() -> None:
    one = member(function=lambda hyperparameters, state, report: None)
    with pytest.raises(MorphogenError, match="returned without a report"):
        one.train(1)


def test_a_report_without_the_metric_is_refused() -> None:
    def loses(hyperparameters: Any, state: Any, report: Any) -> None:
        while True:
            report({"loss": 1.0})

    one = member(function=loses)
    with pytest.raises(ValueError, match="`metric` must be one of loss"):
        one.train(1)
    one.close()


def test_torch_uses_as_many_threads_in_it_as_outside() -> None:
    seen: list[int] = []

    def looks(hyperparameters: Any, state: Any, report: Any) -> None:
        seen.append(torch.get_num_threads())
        report(0.0)

    one = member(function=looks)
    one.train(1)
    one.close()
    assert seen == [torch.get_num_threads()]


def test_a_population_of_functions_climbs_and_a_second_one_alike() -> None:
    def noisy(hyperparameters: Any, state: Any, report: Any) -> None:
        height = state or 0.0
        while True:
            height += hyperparameters["step"] + 0.01 * float(torch.randn(()))
            report(height, state=height)

    config = PBTConfig(
        population_size=4,
        total_steps=20,
        perturbation_interval=5,
        truncation_ratio=0.25,
        synchronous=True,
        hyperparameters={"step": {"kind": "float", "low": 0.0, "high": 1.0}},
    )
    results = [PopulationTrainer(lambda *_: FunctionMember(noisy), config).run() for _ in range(2)]
    assert results[0].score == results[1].score and results[0].exploits == results[1].exploits
    best = max(report.hyperparameters["step"] for report in results[0].reports if report.interval == 1)
    assert results[0].exploits and results[0].score > 0.9 * 20 * best
