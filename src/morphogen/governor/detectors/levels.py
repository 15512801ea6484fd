"""One rule for many quantities: far above its own recent past, whatever its scale. Detectors say which quantities."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from morphogen.governor.config import HistoryConfig
from morphogen.governor.findings import Finding, Observation

_REFRESH_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Level:
    """Where a quantity was lately, and how far above that it went: ``median`` and ``spread`` = highest - median, floored."""

    median: float
    spread: float

    def limit(self, factor: float) -> float:
        """Return median + factor * spread."""
        return self.median + factor * self.spread


def level_of(values: Sequence[float], relative_floor: float, absolute_floor: float) -> Level:
    """Return median (the upper one) and max(highest - median, relative_floor * |median|, absolute_floor) of ``values``.

    Example:
        >>> level_of([1.0, 2.0, 1.5, 1.5, 1.0], relative_floor=0.1, absolute_floor=0.0)
        Level(median=1.5, spread=0.5)
    """
    array = np.asarray(values, dtype=np.float64)
    middle = len(array) // 2
    median = float(np.partition(array, middle)[middle])  # by selection: much cheaper than numpy.median on short arrays
    return Level(median, max(float(array.max()) - median, relative_floor * abs(median), absolute_floor))


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is asked of one quantity.

    Attributes:
        name: For messages.
        read: Returns the quantity as a person knows it, or None where it was not measured.
        scale: Turns it into what is judged, or None where it says nothing.
        spike: The limit for a single value, in spreads above the median.
        relative_floor: Least spread, as a share of the median's size.
        absolute_floor: Least spread.
        undo: Turns a limit back.
        sustained: The limit for a run of values; the config's if 0.
        witness: Key of the quantity that must be high too in a run of values that are none of them a spike.
        witness_factor: How high: in spreads above its median.
        lone_run_steps: Length of a run that needs no witness.
        in_state: Whether it tells of the run itself, so that skipping a step does not help.
    """

    name: str
    read: Callable[[Observation], float | None]
    spike: float
    scale: Callable[[float], float | None] = float
    relative_floor: float = 0.0
    absolute_floor: float = 0.0
    undo: Callable[[float], float] = float
    sustained: float = 0.0
    witness: str = ""
    witness_factor: float = 0.0
    lone_run_steps: int = 1
    in_state: bool = False

    def value_of(self, observation: Observation) -> float | None:
        """Return what is judged of ``observation``, if anything."""
        seen = self.read(observation)
        return None if seen is None else self.scale(seen)


class Track:
    """One quantity's recent clean values, and the level they set."""

    def __init__(self, rule: Rule, config: HistoryConfig) -> None:
        self.rule = rule
        self._config = config
        self._values: collections.deque[float] = collections.deque(maxlen=config.window_steps + config.lag_steps)
        self._level: Level | None = None
        self._since_refresh = 0

    def exceeded_by_one(self, value: float) -> float | None:
        """Return the limit of a single value if ``value`` crosses it, else None."""
        limit = None if self._level is None else self._level.limit(self.rule.spike)
        return limit if limit is not None and value > limit else None

    def exceeded_by_run(self, value: float, is_corroborated: bool) -> float | None:
        """Return the limit of a run of values if ``value`` is the last of one that crosses it, else None."""
        limit = None if self._level is None else self._level.limit(self.rule.sustained or self._config.sustained)
        if limit is None or not value > limit:
            return None
        steps = self._config.run_steps if is_corroborated else self.rule.lone_run_steps
        before = self._newest(steps - 1)
        return limit if len(before) == steps - 1 and all(past > limit for past in before) else None

    def corroborates(self, value: float, factor: float) -> bool:
        """Whether ``value`` is more than ``factor`` spreads above the median; True where there is nothing to go by.

        A norm that was clipped is always the same and says nothing.
        """
        if self._level is None or max(self._values) - min(self._values) < 1e-6:
            return True
        return value > self._level.limit(factor)

    def num_steps_high(self) -> int:
        """Return for how many of the newest values most were higher than all that set the limits, the first of them too."""
        if self._level is None:
            return 0
        highest, num_high, lasted = self._level.limit(1.0), 0, 0
        for count, past in enumerate(self._newest(self._config.lag_steps), start=1):
            num_high += past > highest
            if past > highest and 2 * num_high >= count:
                lasted = count
        return lasted

    def _newest(self, count: int) -> list[float]:
        return [self._values[-1 - back] for back in range(min(count, len(self._values)))]

    def learn(self, value: float) -> None:
        """Remember a clean value."""
        if not math.isfinite(value):
            return
        self._values.append(value)
        self._since_refresh += 1
        due = self._level is None or self._since_refresh >= _REFRESH_STEPS
        if due and len(self._values) >= self._config.min_steps:
            past = list(self._values)[: -self._config.lag_steps]
            self._level = level_of(past, self.rule.relative_floor, self.rule.absolute_floor)
            self._since_refresh = 0

    def forget(self) -> None:
        """Start with no past."""
        self._values.clear()
        self._level, self._since_refresh = None, 0

    @property
    def num_values(self) -> int:
        """How many values are remembered."""
        return len(self._values)

    def state_dict(self) -> dict[str, Any]:
        """Return values and level as plain data."""
        level = None if self._level is None else [self._level.median, self._level.spread]
        return {"values": list(self._values), "level": level, "since_refresh": self._since_refresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        values, level, since_refresh = list(state["values"]), state["level"], int(state["since_refresh"])
        self._level = None if level is None else Level(*level)
        self._since_refresh = since_refresh
        self._values.clear()
        self._values.extend(values)


class LevelDetector:
    """Finds quantities above the limits that their recent past sets; see :class:`HistoryConfig` for the rule.

    A level that jumps and stays, spikes that alternate with normal values, and slow growth are found alike, as flagged values
    never enter the statistics and the last ``lag_steps`` are judged by those before.
    """

    def __init__(self, name: str, rules: Mapping[str, Rule], config: HistoryConfig) -> None:
        """Start with no past; ``rules`` by the name their past is saved under."""
        self.name = name
        self._tracks = {key: Track(rule, config) for key, rule in rules.items()}

    def inspect(self, observation: Observation) -> Finding | None:
        """Return a finding for the first quantity that is out of bounds."""
        for track in self._tracks.values():
            value = track.rule.value_of(observation)
            if value is None:
                continue
            limit = track.exceeded_by_one(value)
            if limit is None:
                limit = track.exceeded_by_run(value, self._is_corroborated(track.rule, observation))
            if limit is not None:
                return self._finding(track, observation, limit)
        return None

    def _is_corroborated(self, rule: Rule, observation: Observation) -> bool:
        """Whether the witness is high too, or there is none."""
        witness = self._tracks.get(rule.witness)
        value = None if witness is None else witness.rule.value_of(observation)
        return witness is None or value is None or witness.corroborates(value, rule.witness_factor)

    def _finding(self, track: Track, observation: Observation, limit: float) -> Finding:
        rule = track.rule
        seen, crossed = rule.read(observation), rule.undo(limit)
        assert seen is not None
        relation = "exceeds" if seen >= crossed else "is below"
        return Finding(
            detector=self.name,
            message=f"{rule.name} {seen:.4g} {relation} {crossed:.4g}, the limit set by its recent past",
            value=seen,
            threshold=crossed,
            window_steps=track.num_values,
            lasted_steps=1 + max(track.num_steps_high() for track in self._tracks.values()),
            in_state=rule.in_state,
        )

    def accept(self, observation: Observation) -> None:
        """Remember what was measured of a clean observation."""
        for track in self._tracks.values():
            value = track.rule.value_of(observation)
            if value is not None:
                track.learn(value)

    def forget(self) -> None:
        """Start with no past: after a lasting change of level was accepted."""
        for track in self._tracks.values():
            track.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered values and levels."""
        return {key: track.state_dict() for key, track in self._tracks.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        for key, track in self._tracks.items():
            track.load_state_dict(state[key])


def log_of(value: float) -> float | None:
    """Return the natural logarithm of a positive value, NaN of one that is not a number; None for 0, which has no scale."""
    return None if value == 0.0 else math.log(value) if value > 0.0 else math.nan


def negative_log_of(value: float) -> float | None:
    """Return minus the natural logarithm, so that small values are high; see :func:`log_of`."""
    logarithm = log_of(value)
    return None if logarithm is None else -logarithm


def exponential(value: float) -> float:
    """Return e to the power of ``value``, at most about 1e304."""
    return math.exp(min(value, 700.0))


def negative_exponential(value: float) -> float:
    """Return e to the power of minus ``value``."""
    return exponential(-value)


def signal(name: str) -> Callable[[Observation], float | None]:
    """Return what reads the signal ``name``."""
    return lambda observation: observation.signals.get(name)
