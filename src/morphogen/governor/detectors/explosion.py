"""Explosion: loss or gradient norm far above its own recent past, by robust one-sided statistics."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from morphogen.governor.config import ExplosionConfig
from morphogen.governor.findings import Finding, Observation

_REFRESH_STEPS = 8
_MAD_TO_SIGMA = 1.4826  # for a normal distribution


def robust_limit(values: Sequence[float], sigmas: float, relative_floor: float, absolute_floor: float) -> float:
    """Return median + sigmas * max(1.4826 * MAD, relative_floor * |median|, absolute_floor) of ``values``.

    Example:
        >>> robust_limit([1.0, 1.0, 1.0, 9.0, 1.0], sigmas=10.0, relative_floor=0.1, absolute_floor=0.0)
        2.0
    """
    array = np.asarray(values, dtype=np.float64)
    median = _median(array)
    spread = max(_MAD_TO_SIGMA * _median(np.abs(array - median)), relative_floor * abs(median), absolute_floor)
    return median + sigmas * spread


def _median(array: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """The upper median, by selection: much cheaper than ``numpy.median`` on short arrays."""
    middle = len(array) // 2
    return float(np.partition(array, middle)[middle])


class _Track:
    """One quantity's recent clean values, and the limit they set."""

    def __init__(self, window_steps: int) -> None:
        self.values: collections.deque[float] = collections.deque(maxlen=window_steps)
        self.limit: float | None = None
        self.since_refresh = 0


class Explosion:
    """Finds a loss or a log gradient norm above its robust limit; see :class:`ExplosionConfig` for the rule.

    One rule serves losses of any scale, also at and below zero. A level that jumps and stays, and spikes that alternate with
    normal values, are found alike, as flagged values never enter the statistics.
    """

    name = "explosion"

    def __init__(self, config: ExplosionConfig) -> None:
        """Start with no past."""
        self._config = config
        self._loss = _Track(config.window_steps)
        self._log_norm = _Track(config.window_steps)

    def inspect(self, observation: Observation) -> Finding | None:
        """Return a finding for the loss first, then for the gradient norm."""
        config = self._config
        limit = self._limit(self._loss, config.loss_sigmas, config.loss_floor, 1e-12)
        if limit is not None and observation.loss > limit:
            return self._finding("loss", observation.loss, limit)
        limit = self._limit(self._log_norm, config.log_norm_sigmas, 0.0, config.log_norm_floor)
        if limit is not None and observation.grad_norm is not None and _log(observation.grad_norm) > limit:
            return self._finding("gradient norm", observation.grad_norm, math.exp(min(limit, 700.0)))
        return None

    def _finding(self, what: str, value: float, limit: float) -> Finding:
        message = f"{what} {value:.4g} exceeds {limit:.4g}, the limit set by its recent past"
        window = len(self._loss.values)
        return Finding(detector=self.name, message=message, value=value, threshold=limit, window_steps=window)

    def _limit(self, track: _Track, sigmas: float, relative_floor: float, absolute_floor: float) -> float | None:
        if len(track.values) < self._config.min_steps:
            return None
        if track.limit is None or track.since_refresh >= _REFRESH_STEPS:
            track.limit = robust_limit(track.values, sigmas, relative_floor, absolute_floor)  # pyright: ignore[reportArgumentType]
            track.since_refresh = 0
        return track.limit

    def accept(self, observation: Observation) -> None:
        """Remember a clean loss and gradient norm."""
        for track, value in ((self._loss, observation.loss), (self._log_norm, observation.grad_norm)):
            if value is not None:
                track.values.append(_log(value) if track is self._log_norm else value)
                track.since_refresh += 1

    def forget(self) -> None:
        """Start with no past: after a lasting change of level was accepted."""
        self._loss = _Track(self._config.window_steps)
        self._log_norm = _Track(self._config.window_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered values and limits."""
        return {
            name: {"values": list(track.values), "limit": track.limit, "since_refresh": track.since_refresh}
            for name, track in (("loss", self._loss), ("log_norm", self._log_norm))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        for name, track in (("loss", self._loss), ("log_norm", self._log_norm)):
            track.values.clear()
            track.values.extend(state[name]["values"])
            track.limit, track.since_refresh = state[name]["limit"], state[name]["since_refresh"]


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
