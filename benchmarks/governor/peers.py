"""Published detectors, as rules over loss and gradient norm; re-implemented from what their sources do, at their defaults.

Each answers one question a step: would it have reacted? Where a rule ends the run, it goes on here, as after a restart.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Peer(Protocol):
    """A detector with its own memory."""

    def alarmed(self, loss: float, norm: float | None) -> bool:
        """Judge one step and learn from it as the rule does."""
        ...


class NonFinite:
    """torchtitan (2026-08): loss and gradient norm must be finite before the step."""

    def alarmed(self, loss: float, norm: float | None) -> bool:
        return not (math.isfinite(loss) and (norm is None or math.isfinite(norm)))


class Lightning:
    """lightning 2.6.6, lightning/fabric/utilities/spike.py, ``SpikeDetection``.

    From the second batch on: not finite; or above the last value and at least twice the size of the mean of the last 10 away
    from it. What was flagged is not remembered.
    """

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=10)
        self._last, self._batches = 0.0, 0

    def alarmed(self, loss: float, norm: float | None) -> bool:
        self._batches += 1
        if self._batches > 1 and self._is_spike(loss):
            return True
        self._recent.append(loss)
        self._last = loss
        return False

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        mean = sum(self._recent) / len(self._recent)
        return loss > self._last and abs(loss - mean) >= abs(2.0 * mean)


class OLMo:
    """OLMo-core (2026-06), olmo_core/optim/skip_step_optimizer.py; Levanter's optim/skipstep.py has the same arithmetic.

    Once half a window is known: loss or gradient norm more than 6 standard deviations above the mean of the last 128. All
    values enter the window, flagged and NaN ones too, and no comparison with NaN lets a step pass.
    """

    def __init__(self) -> None:
        self._losses, self._norms = _Window(128), _Window(128)

    def alarmed(self, loss: float, norm: float | None) -> bool:
        known = len(self._losses.values) + 1 >= 64
        sound = self._losses.holds(loss) and (norm is None or self._norms.holds(norm))
        self._losses.values.append(loss)
        if norm is not None:
            self._norms.values.append(norm)
        return known and not sound


class _Window:
    def __init__(self, length: int) -> None:
        self.values: collections.deque[float] = collections.deque(maxlen=length)

    def holds(self, value: float) -> bool:
        if len(self.values) < 2:
            return True
        past = np.fromiter(self.values, dtype=np.float64)
        with np.errstate(all="ignore"):
            return bool(value - past.mean() <= 6.0 * past.std(ddof=1))


class Megatron:
    """Megatron-LM (2026-08), megatron/core/rerun_state_machine.py, with its check for spiky losses switched on.

    Not finite; or at least 10 times the largest of the first 100 sizes of the loss. Gradient norms have the same check.
    """

    def __init__(self) -> None:
        self._largest, self._counts = {"loss": 0.0, "norm": 0.0}, {"loss": 0, "norm": 0}

    def alarmed(self, loss: float, norm: float | None) -> bool:
        found = [self._is_large("loss", loss)]
        if norm is not None:
            found.append(self._is_large("norm", norm))
        return any(found)

    def _is_large(self, name: str, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if self._counts[name] < 100:
            self._counts[name] += 1
            self._largest[name] = max(self._largest[name], abs(value))
            return False
        return abs(value) >= 10.0 * self._largest[name]


class ZClip:
    """ZClip (2025-10), zclip.py: the gradient norm's z-score against moving averages exceeds 2.5 after 25 steps.

    The averages then take the clipped norm; a NaN makes them NaN for good.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean, self._variance = 0.0, 0.0

    def alarmed(self, loss: float, norm: float | None) -> bool:
        if norm is None:
            return False
        if len(self._first) < 25:
            self._first.append(norm)
            self._mean = float(np.mean(self._first))
            self._variance = float(np.var(self._first))
            return False
        deviation = self._variance**0.5
        z = (norm - self._mean) / (deviation + 1e-6)
        clipped = self._mean + 2.5 * deviation / (z / 2.5) if z > 2.5 else norm
        self._mean = 0.97 * self._mean + 0.03 * clipped
        self._variance = 0.97 * self._variance + 0.03 * (clipped - self._mean) ** 2
        return z > 2.5


class LLMFoundry:
    """llm-foundry (2025-07), llmfoundry/callbacks/kill_loss_spike_callback.py.

    Against a full window of 100: five losses in a row of at least twice the mean; or, from step 200 on, half of the window
    above a loss of 10. Every loss enters the window.
    """

    def __init__(self) -> None:
        self._window: collections.deque[float] = collections.deque(maxlen=100)
        self._outliers, self._steps = 0, 0

    def alarmed(self, loss: float, norm: float | None) -> bool:
        found = len(self._window) == 100 and self._judge(loss)
        self._window.append(loss)
        self._steps += 1
        return found

    def _judge(self, loss: float) -> bool:
        if loss >= 2.0 * float(np.mean(self._window)):
            self._outliers += 1
            if self._outliers > 4:
                return True
        else:
            self._outliers = 0
        return self._steps >= 200 and sum(past > 10.0 for past in self._window) >= 50


PEERS: dict[str, Callable[[], Peer]] = {
    "non-finite only (torchtitan)": NonFinite,
    "Megatron-LM 10x": Megatron,
    "llm-foundry": LLMFoundry,
    "Lightning": Lightning,
    "ZClip as an alarm": ZClip,
    "OLMo / Levanter": OLMo,
}
