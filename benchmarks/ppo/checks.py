"""What runs come to, and what is asked of them; pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm trained with one seed.

    Attributes:
        steps: Environment steps of training, all environments together.
        cpu_seconds: Process CPU time of training alone.
        update_cpu_seconds: The part of it in everything but rollouts.
        returns: Of each evaluation episode.
        training_return: Mean of the last 100 training episodes; None if there was none.
        invalid_actions: In training, where the environment counts them.
    """

    arm: str
    seed: int
    steps: int
    cpu_seconds: float
    update_cpu_seconds: float
    returns: Sequence[float]
    training_return: float | None
    invalid_actions: int | None

    @property
    def speed(self) -> float:
        """Steps per CPU-second."""
        return self.steps / self.cpu_seconds

    @property
    def mean_return(self) -> float:
        """Mean return in evaluation."""
        return statistics.fmean(self.returns)


@dataclass(frozen=True)
class Outcome:
    """What was asked, what was found, and whether that is enough."""

    asked: str
    found: str
    met: bool


class Check(Protocol):
    """Something that is asked of the runs of a row."""

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        """Judge the runs."""
        ...


@dataclass(frozen=True)
class Speed:
    """Steps per CPU-second of ``arm`` over those of ``other``: the median of the ratios of runs that were neighbours."""

    arm: str
    other: str
    at_least: float

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        ratio = statistics.median(ratios(runs, self.arm, self.other, lambda run: run.speed))
        return Outcome(f"{self.arm} / {self.other}: speed >= {self.at_least:g}", f"{ratio:.2f}", ratio >= self.at_least)


@dataclass(frozen=True)
class UpdateCost:
    """CPU time in updates per step, in the same way."""

    arm: str
    other: str
    at_most: float

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        ratio = statistics.median(ratios(runs, self.arm, self.other, lambda run: run.update_cpu_seconds / run.steps))
        return Outcome(f"{self.arm} / {self.other}: update <= {self.at_most:g}", f"{ratio:.2f}", ratio <= self.at_most)


@dataclass(frozen=True)
class ReturnAtLeast:
    """The mean return over all seeds; with ``of_five``, the return of so many of five seeds, and as large a part of others."""

    arm: str
    value: float
    of_five: int | None = None

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        asked = f"{self.arm}: return >= {self.value:g}"
        found = returns(runs, self.arm)
        if self.of_five is None:
            mean = statistics.fmean(found)
            return Outcome(asked, f"{mean:.1f}", mean >= self.value)
        enough = sum(one >= self.value for one in found)
        met = enough >= self.of_five / 5 * len(found)
        return Outcome(f"{asked} on {self.of_five} of 5 seeds", f"{enough} of {len(found)}", met)


@dataclass(frozen=True)
class ReturnBelow:
    """The mean return over all seeds: ``arm`` must fail."""

    arm: str
    value: float

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        mean = statistics.fmean(returns(runs, self.arm))
        return Outcome(f"{self.arm}: return < {self.value:g}", f"{mean:.1f}", mean < self.value)


@dataclass(frozen=True)
class NotBelow:
    """The mean return of ``arm`` is that of ``other`` minus its standard error over seeds, or more."""

    arm: str
    other: str

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        mean, base = (statistics.fmean(returns(runs, name)) for name in (self.arm, self.other))
        error = standard_error(returns(runs, self.other))
        found = f"{mean:.1f} against {base:.1f} +- {error:.1f}"
        return Outcome(f"{self.arm}: return not below {self.other} - 1 s.e.", found, mean >= base - error)


@dataclass(frozen=True)
class NoInvalidActions:
    """Not one action of training was invalid."""

    arm: str

    def outcome(self, runs: Sequence[Run]) -> Outcome:
        counts = [run.invalid_actions for run in runs if run.arm == self.arm]
        found = "not counted" if None in counts else str(sum(count or 0 for count in counts))
        return Outcome(f"{self.arm}: invalid actions 0", found, found == "0")


def returns(runs: Iterable[Run], arm: str) -> list[float]:
    """Return the mean return of each run of ``arm``."""
    return [run.mean_return for run in runs if run.arm == arm]


def standard_error(values: Sequence[float]) -> float:
    """Return that of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def ratios(runs: Sequence[Run], arm: str, other: str, quantity: Callable[[Run], float]) -> list[float]:
    """Return ``quantity`` of ``arm`` over that of ``other``, seed by seed."""
    base = {run.seed: quantity(run) for run in runs if run.arm == other}
    return [quantity(run) / base[run.seed] for run in runs if run.arm == arm and run.seed in base]


def spread(values: Sequence[float], digits: int) -> dict[str, float | list[float]]:
    """Return median, range and all values as JSON data."""
    by_seed = [round(value, digits) for value in values]
    return {"median": round(statistics.median(values), digits), "low": min(by_seed), "high": max(by_seed), "by_seed": by_seed}


def summary(runs: Sequence[Run]) -> dict[str, object]:
    """Return the numbers of the runs of one arm as JSON data."""
    means = [run.mean_return for run in runs]
    trained = [run.training_return for run in runs if run.training_return is not None]
    counted = [run.invalid_actions for run in runs if run.invalid_actions is not None]
    return {
        "seeds": [run.seed for run in runs],
        "steps": runs[0].steps,
        "steps_per_cpu_second": spread([run.speed for run in runs], 1),
        "update_cpu_part": spread([run.update_cpu_seconds / run.cpu_seconds for run in runs], 3),
        "evaluation_return": {"mean": round(statistics.fmean(means), 3), **spread(means, 3)},
        "last_100_training_episodes": spread(trained, 3) if trained else None,
        "invalid_actions": sum(counted) if counted else None,
    }
