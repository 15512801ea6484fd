"""Own detectors, and the conformance suite: it passes the built-in ones and catches those that are wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from morphogen.governor import Action, Detector, ExplosionConfig, Finding, Governor, GovernorConfig, Observation, ProbeConfig
from morphogen.governor.detectors import (
    Collapse,
    DeadGradient,
    Explosion,
    NonFinite,
    Probe,
    RunningStatistics,
    UpdateSize,
    standard_detectors,
)
from morphogen.testing.detectors import DETECTOR_CHECKS, DetectorCase, check_detector, healthy_traces

BUILT_IN: dict[str, Callable[[], Detector]] = {
    "explosion": lambda: Explosion(ExplosionConfig()),
    "update": lambda: UpdateSize(GovernorConfig().update),
    "running_statistics": lambda: RunningStatistics(GovernorConfig().running_statistics),
    "collapse": lambda: Collapse(GovernorConfig().collapse),
    "dead_gradient": lambda: DeadGradient(GovernorConfig().dead_gradient),
    "probe": lambda: Probe(GovernorConfig().probe),
    "explosion, short memory": lambda: Explosion(ExplosionConfig(window_steps=48, loss_spike=20.0, sustained=4.0)),
    "non_finite": NonFinite,
}


@pytest.mark.parametrize("check", DETECTOR_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_detectors_conform(name: str, check: Callable[[DetectorCase], None]) -> None:
    check(DetectorCase(BUILT_IN[name]))


def test_every_standard_detector_is_tested_above() -> None:
    assert {detector.name for detector in standard_detectors(GovernorConfig())} <= set(BUILT_IN)


class LastLoss:
    """A detector to be broken: a loss a hundred above the last clean one."""

    name = "last_loss"

    def __init__(self) -> None:
        self.last: list[float] = []

    def inspect(self, observation: Observation) -> Finding | None:
        if self.last and observation.loss > self.last[0] + 100.0:
            return Finding(detector=self.name, message="a jump", value=observation.loss)
        return None

    def accept(self, observation: Observation) -> None:
        self.last = [observation.loss]

    def forget(self) -> None:
        self.last = []

    def state_dict(self) -> dict[str, Any]:
        return {"last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = list(state["last"])


class Nervous(LastLoss):
    def inspect(self, observation: Observation) -> Finding | None:
        jump = bool(self.last) and observation.loss > 1.01 * self.last[0]
        return Finding(detector=self.name, message="up", value=observation.loss) if jump else None


class LearnsByLooking(LastLoss):
    def inspect(self, observation: Observation) -> Finding | None:
        finding = super().inspect(observation)
        self.last = [observation.loss]
        return finding


class BlindedByNaN(LastLoss):
    def inspect(self, observation: Observation) -> Finding | None:
        if not math.isfinite(observation.loss):
            self.last = []
        return super().inspect(observation)


class FailsOnNaN(LastLoss):
    def inspect(self, observation: Observation) -> Finding | None:
        int(observation.loss)
        return super().inspect(observation)


class SharesItsState(LastLoss):
    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last}

    def accept(self, observation: Observation) -> None:
        self.last[:] = [observation.loss]


class LosesItsState(LastLoss):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = []


class NeverForgets(LastLoss):
    def forget(self) -> None: ...


class NamesAnother(LastLoss):
    def inspect(self, observation: Observation) -> Finding | None:
        finding = super().inspect(observation)
        return finding and Finding(detector="another", message="a jump", value=observation.loss)


class KeepsNumbersThatAreNoData(LastLoss):
    def state_dict(self) -> dict[str, Any]:
        return {"last": set(self.last)}


def test_a_sound_detector_passes() -> None:
    check_detector(LastLoss)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (Nervous, AssertionError, r"a healthy run \(falling\) must raise no alarm, raised \d+: up"),
        (LearnsByLooking, AssertionError, "inspecting after a healthy run .* must teach nothing"),
        (BlindedByNaN, AssertionError, "must not blind it|must teach nothing"),
        (FailsOnNaN, ValueError, "NaN|infinity"),
        (SharesItsState, AssertionError, "`state_dict` must be a copy"),
        (LosesItsState, AssertionError, "with the state loaded must be as the first was"),
        (NeverForgets, AssertionError, "must be as new"),
        (NamesAnother, AssertionError, "a finding must name 'last_loss', names 'another'"),
        (KeepsNumbersThatAreNoData, TypeError, "not JSON serializable"),
    ],
)
def test_a_broken_detector_is_caught(broken: type[LastLoss], error: type[Exception], message: str) -> None:
    with pytest.raises((error, OverflowError), match=message):
        check_detector(broken)


def test_a_detector_of_metrics_is_shown_runs_that_have_them() -> None:
    class Diversity(LastLoss):
        name = "diversity"

        def inspect(self, observation: Observation) -> Finding | None:
            low = observation.metrics.get("entropy", 1.0) < 0.1
            return Finding(detector=self.name, message="collapsed", value=0.0) if low else None

    healthy = {"varied": tuple(Observation(step=step, loss=1.0, metrics={"entropy": 0.9 - step / 1000}) for step in range(100))}
    check_detector(Diversity, healthy)
    collapsed = {"collapsed": (Observation(step=0, loss=1.0, metrics={"entropy": 0.01}),)}
    with pytest.raises(AssertionError, match="collapsed"):
        check_detector(Diversity, collapsed)


def test_healthy_traces_are_equal_for_equal_seeds_and_long_enough_to_be_judged() -> None:
    assert healthy_traces() == healthy_traces() != healthy_traces(seed=1)
    for trace in healthy_traces().values():
        assert len(trace) > ExplosionConfig().min_steps + 50


# -- own detectors in a governor ------------------------------------------------------------------------------------


class Threshold(LastLoss):
    """Alarms when a metric that the loop gives is low; remembers what it accepted."""

    name = "threshold"

    def __init__(self) -> None:
        super().__init__()
        self.accepted: list[int] = []
        self.forgotten = 0

    def inspect(self, observation: Observation) -> Finding | None:
        value = observation.metrics.get("accuracy", 1.0)
        return Finding(detector=self.name, message=f"accuracy {value}", value=value) if value < 0.5 else None

    def accept(self, observation: Observation) -> None:
        self.accepted.append(observation.step)

    def forget(self) -> None:
        self.forgotten += 1

    def state_dict(self) -> dict[str, Any]:
        return {"accepted": list(self.accepted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted = list(state["accepted"])


def test_an_own_detector_stops_steps_and_rewinds(kit: Any) -> None:
    detector = Threshold()
    loop = kit.Loop(GovernorConfig(snapshot_every=10, probation_steps=20), detectors=[detector])
    loop.steps(75, metrics={"accuracy": 0.9})
    verdicts = loop.steps(3, metrics={"accuracy": 0.2})
    assert [verdict.action for verdict in verdicts] == [Action.SKIP, Action.SKIP, Action.REWIND]
    assert verdicts[-1].findings[0].detector == "threshold" and verdicts[-1].rollback.to_step == 49
    assert detector.accepted == list(range(50)), "what it learned goes back with the run"


def test_no_detector_learns_from_what_another_found(kit: Any) -> None:
    detector = Threshold()
    loop = kit.Loop(detectors=[detector])
    loop.steps(10)
    loop.step(loss=kit.nan)
    loop.steps(10)
    assert detector.accepted == [*range(10), *range(11, 21)]
    losses = loop.governor._keeper.memory(0).detectors["explosion"]["loss"]["values"]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    json.dumps(loop.governor._keeper.memory(0).detectors, allow_nan=False)


def test_own_detectors_forget_with_the_others_when_a_level_is_accepted(kit: Any) -> None:
    detector = Threshold()
    loop = kit.Loop(GovernorConfig(snapshot_every=10, probation_steps=20), detectors=[detector], batch_size=256)
    loop.steps(200)
    loop.steps(30, loss=kit.times(100.0))
    assert detector.forgotten == 1


@pytest.mark.parametrize("config", [GovernorConfig(probe=ProbeConfig(spike=2.0)), GovernorConfig(sensors={"probe_every": 5})])
def test_settings_of_a_probe_that_is_not_there_are_refused(kit: Any, config: GovernorConfig) -> None:
    with pytest.raises(ValueError, match="`probe` must be given"):
        kit.Loop(config)
    state = kit.Loop().state
    assert Governor(state, config, probe=lambda: 0.5).config is config
