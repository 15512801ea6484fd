"""The conformance suite of detectors: silent on healthy runs, unmoved by what they inspect, and as good after a reload.

Call :func:`check_detector` for a detector of your own, or let pytest show each check by itself::

    @pytest.mark.parametrize("check", DETECTOR_CHECKS, ids=lambda check: check.__name__)
    def test_detector(check):
        check(DetectorCase(MyDetector))
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from morphogen.governor import Detector, Finding, Observation

Trace = tuple[Observation, ...]
_NUM_STEPS = 300
_WILD = (1e30, -1e30, 0.0)
_BROKEN = (math.nan, math.inf, -math.inf)


@dataclasses.dataclass(frozen=True)
class DetectorCase:
    """A kind of detector, and the healthy runs it is shown.

    Attributes:
        make: Returns a new detector.
        traces: Name -> a healthy run; by default :func:`healthy_traces`. A detector of metrics needs runs that have them.
    """

    make: Callable[[], Detector]
    traces: Mapping[str, Trace] = dataclasses.field(default_factory=lambda: healthy_traces())

    def trained(self, trace: Trace) -> Detector:
        """Return a detector that has seen ``trace``, as a governor shows it."""
        detector = self.make()
        _show(detector, trace)
        return detector


def healthy_traces(num_steps: int = _NUM_STEPS, seed: int = 0) -> dict[str, Trace]:
    """Return made-up healthy runs: losses of several scales and signs, with and without gradients and signals."""
    chance = np.random.default_rng(seed)
    steps = np.arange(num_steps)
    fall = np.exp(-steps / (num_steps / 4))
    noise = chance.lognormal(0.0, 0.2, num_steps)
    losses = {
        "falling": (0.1 + 2.2 * fall) * noise,
        "falling to nothing": np.exp(-steps / (num_steps / 10)) * noise,
        "level at 0.01": 0.01 * noise,
        "level at 10": 10.0 * noise,
        "heavy-tailed": chance.lognormal(0.0, 0.6, num_steps),
        "below zero": -3.0 + 0.2 * chance.standard_normal(num_steps),
        "crossing zero": 3.0 - 6.0 * steps / num_steps + 0.2 * chance.standard_normal(num_steps),
        "around zero": 0.05 * chance.standard_normal(num_steps),
        "constant": np.full(num_steps, 0.7),
    }
    norms = (0.2 + fall) * chance.lognormal(0.0, 0.3, num_steps)
    signals = {
        "update": 1e-3 * (0.2 + fall) * chance.lognormal(0.0, 0.1, num_steps),
        "update_per_rate": (0.2 + fall) * chance.lognormal(0.0, 0.1, num_steps),
        "buffer_change": 0.02 * chance.lognormal(0.0, 0.3, num_steps),
        "dead_share": np.full(num_steps, 0.25),
        "output_spread": (3.0 - 2.5 * fall) * chance.lognormal(0.0, 0.1, num_steps),
        "prediction_entropy": 2.2 + 0.03 * chance.standard_normal(num_steps),
        "label_entropy": 2.2 + 0.03 * chance.standard_normal(num_steps),
        "weight_norm": 15.0 + 0.01 * steps,
        "probe_loss": 0.1 + 2.2 * fall,
    }
    traces = {name: _trace(values, norms, signals) for name, values in losses.items()}
    return {**traces, "without gradients": _trace(losses["falling"], None, {})}


def check_detector(make_detector: Callable[[], Detector], traces: Mapping[str, Trace] | None = None) -> None:
    """Run every check on a detector.

    Args:
        make_detector: Returns a new detector, equal each time.
        traces: Name -> a healthy run; by default :func:`healthy_traces`.

    Raises:
        AssertionError: A check failed; the message says which, and what was expected and found.
    """
    case = DetectorCase(make_detector) if traces is None else DetectorCase(make_detector, traces)
    for check in DETECTOR_CHECKS:
        check(case)


def check_named(case: DetectorCase) -> None:
    """Every detector of the kind has the same name, which its findings carry."""
    first, second = case.make(), case.make()
    assert first.name and first.name == second.name, f"`name` must be one text, got {first.name!r} and {second.name!r}."
    for trace in case.traces.values():
        for finding in _findings(case.trained(trace), _probes(trace)):
            found = None if finding is None else finding.detector
            assert found in (None, first.name), f"a finding must name {first.name!r}, names {found!r}."


def check_silent_on_healthy_runs(case: DetectorCase) -> None:
    """No finding in any healthy run."""
    for name, trace in case.traces.items():
        findings = _show(case.make(), trace)
        assert not findings, f"a healthy run ({name}) must raise no alarm, raised {len(findings)}: {findings[0].message}."


def check_learns_from_accept_alone(case: DetectorCase) -> None:
    """However often and whatever it inspects, a detector answers the same afterwards."""
    for name, trace in case.traces.items():
        plain, nosy = case.trained(trace), case.trained(trace)
        for extreme in _variants(trace[-1], _WILD):
            for observation in (*_probes(trace), extreme):
                nosy.inspect(observation)
            _same(f"inspecting after a healthy run ({name}) must teach nothing", nosy, plain, trace)


def check_survives_non_finite(case: DetectorCase) -> None:
    """NaN and Inf raise no error at any time and leave the detector as sharp as before."""
    for name, trace in case.traces.items():
        plain, hurt = case.make(), case.make()
        for observation in trace:
            for detector in (plain, hurt):
                _show(detector, (observation,))
            for broken in _variants(observation, _BROKEN):
                hurt.inspect(broken)
        _same(f"NaN and Inf in a healthy run ({name}) must not blind it", hurt, plain, trace)


def check_goes_on_after_reload(case: DetectorCase) -> None:
    """What was learned goes through JSON, is not changed by what follows, and makes another detector go on identically."""
    for name, trace in case.traces.items():
        head, tail = trace[: len(trace) // 2], trace[len(trace) // 2 :]
        first = case.trained(head)
        state = first.state_dict()
        written = json.dumps(state)
        _show(first, tail)
        assert json.dumps(state) == written, f"`state_dict` must be a copy: it changed as the run ({name}) went on."
        for what, second in (("a new detector", case.make()), ("a used detector", case.trained(tail))):
            second.load_state_dict(json.loads(written))
            _same(f"{what} with the state loaded must be as the first was ({name})", second, case.trained(head), trace)
            _show(second, tail)
            _same(f"{what} with the state loaded must go on as the first ({name})", second, first, trace)


def check_forgets(case: DetectorCase) -> None:
    """After ``forget`` a detector is as new."""
    for name, trace in case.traces.items():
        detector = case.trained(trace)
        detector.forget()
        _same(f"a detector that forgot a run ({name}) must be as new", detector, case.make(), trace)


DETECTOR_CHECKS: tuple[Callable[[DetectorCase], None], ...] = (
    check_named,
    check_silent_on_healthy_runs,
    check_learns_from_accept_alone,
    check_survives_non_finite,
    check_goes_on_after_reload,
    check_forgets,
)
"""Every check of the suite; each takes a :class:`DetectorCase` and raises AssertionError."""


def _trace(losses: np.ndarray, norms: np.ndarray | None, signals: Mapping[str, np.ndarray]) -> Trace:
    return tuple(
        Observation(
            step=step,
            loss=float(loss),
            grad_norm=None if norms is None else float(norms[step]),
            signals={name: float(values[step]) for name, values in signals.items()},
        )
        for step, loss in enumerate(losses)
    )


def _show(detector: Detector, trace: Trace) -> list[Finding]:
    """Show ``trace`` as a governor does: what raises no alarm is accepted."""
    findings: list[Finding] = []
    for observation in trace:
        finding = detector.inspect(observation)
        if finding is None:
            detector.accept(observation)
        else:
            findings.append(finding)
    return findings


def _variants(observation: Observation, values: Sequence[float]) -> list[Observation]:
    """``observation`` with loss, gradient norm, one signal or every metric replaced by each of ``values``."""
    metrics, signals = observation.metrics, observation.signals
    return [
        changed
        for value in values
        for changed in (
            dataclasses.replace(observation, loss=value),
            dataclasses.replace(observation, grad_norm=abs(value)),
            dataclasses.replace(observation, metrics={name: value for name in metrics}),
            *(dataclasses.replace(observation, signals={**signals, name: value}) for name in signals),
        )
    ]


def _probes(trace: Trace) -> list[Observation]:
    """Observations from harmless to absurd, after the end of ``trace``."""
    last = trace[-1]
    raised = [dataclasses.replace(last, loss=last.loss + by) for by in (0.0, 0.1, 1.0, 10.0, 1e3)]
    norms = [dataclasses.replace(last, grad_norm=norm) for norm in (None, 1e-6, 1.0, 1e3, 1e12)]
    return [*raised, *norms, *_variants(last, _WILD)]


def _findings(detector: Detector, observations: Sequence[Observation]) -> list[Finding | None]:
    return [detector.inspect(observation) for observation in observations]


def _same(what: str, found: Detector, expected: Detector, trace: Trace) -> None:
    """Compare two detectors by their states and by what they say of probes, twice."""
    assert found.state_dict() == expected.state_dict(), f"{what}: the states differ."
    for _ in range(2):
        ours, theirs = (_findings(detector, _probes(trace)) for detector in (found, expected))
        assert repr(ours) == repr(theirs), f"{what}: findings differ."
