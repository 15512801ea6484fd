"""Explosion: loss or gradient norm far above its own recent past, by one one-sided rule that knows no units."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from morphogen.governor.config import ExplosionConfig
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
class _Rule:
    """What is asked of one quantity."""

    name: str
    spike: float
    relative_floor: float = 0.0
    absolute_floor: float = 0.0


class _Track:
    """One quantity's recent clean values, and the level they set."""

    def __init__(self, rule: _Rule, config: ExplosionConfig) -> None:
        self.rule = rule
        self._config = config
        self._values: collections.deque[float] = collections.deque(maxlen=config.window_steps + config.lag_steps)
        self._level: Level | None = None
        self._since_refresh = 0

    def exceeded(self, value: float) -> float | None:
        """Return the limit that ``value`` crosses, or None."""
        if self._level is None:
            return None
        high, spike = (self._level.limit(factor) for factor in (self._config.sustained, self.rule.spike))
        if value > spike:
            return spike
        before = self._newest(self._config.run_steps - 1)
        return high if value > high and all(past > high for past in before) else None

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
        self._values.clear()
        self._level, self._since_refresh = None, 0

    @property
    def num_values(self) -> int:
        return len(self._values)

    def state_dict(self) -> dict[str, Any]:
        level = None if self._level is None else [self._level.median, self._level.spread]
        return {"values": list(self._values), "level": level, "since_refresh": self._since_refresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values, level, since_refresh = list(state["values"]), state["level"], int(state["since_refresh"])
        self._level = None if level is None else Level(*level)
        self._since_refresh = since_refresh
        self._values.clear()
        self._values.extend(values)


class Explosion:
    """Finds a loss or a log gradient norm above its limits; see :class:`ExplosionConfig` for the rule.

    One rule serves losses of any scale and sign. A level that jumps and stays, spikes that alternate with normal values, and
    growth of 5 % per step are found alike, as flagged values never enter the statistics and the last ``lag_steps`` are judged
    by those before. Exact zeros (hinge and triplet losses, units at rest) say nothing about scale and are not remembered.

    False alarms at the defaults: 0.15 per 1,000 steps (25 single batches in 168,000 steps of 28 kinds of small healthy runs, at
    seeds the defaults were not chosen on; half of them losses or gradients with heavy tails), and no rewind.
    """

    name = "explosion"

    def __init__(self, config: ExplosionConfig) -> None:
        """Start with no past."""
        self._loss = _Track(_Rule("loss", config.loss_spike, relative_floor=config.loss_floor), config)
        log_norm = _Rule("gradient norm", config.log_norm_spike, absolute_floor=config.log_norm_floor)
        self._log_norm = _Track(log_norm, config)

    def inspect(self, observation: Observation) -> Finding | None:
        """Return a finding for the loss first, then for the gradient norm."""
        limit = self._loss.exceeded(observation.loss)
        if limit is not None:
            return self._finding(self._loss, observation.loss, limit)
        limit = self._log_norm.exceeded(math.log(observation.grad_norm)) if observation.grad_norm else None
        if limit is None or observation.grad_norm is None:
            return None
        return self._finding(self._log_norm, observation.grad_norm, math.exp(min(limit, 700.0)))

    def _finding(self, track: _Track, value: float, limit: float) -> Finding:
        return Finding(
            detector=self.name,
            message=f"{track.rule.name} {value:.4g} exceeds {limit:.4g}, the limit set by its recent past",
            value=value,
            threshold=limit,
            window_steps=track.num_values,
            lasted_steps=1 + max(self._loss.num_steps_high(), self._log_norm.num_steps_high()),
        )

    def accept(self, observation: Observation) -> None:
        """Remember a clean loss and gradient norm."""
        if observation.loss:
            self._loss.learn(observation.loss)
        if observation.grad_norm:
            self._log_norm.learn(math.log(observation.grad_norm))

    def forget(self) -> None:
        """Start with no past: after a lasting change of level was accepted."""
        self._loss.forget()
        self._log_norm.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered values and levels."""
        return {"loss": self._loss.state_dict(), "log_norm": self._log_norm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self._loss.load_state_dict(state["loss"])
        self._log_norm.load_state_dict(state["log_norm"])
