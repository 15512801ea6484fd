"""Alpha ramps: how the weight of a seed moves from one value to another, tick by tick. Pure.

alpha_i = start + (target - start) * e(i / num_ticks) for i = 1 .. num_ticks; the last tick assigns the target itself.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Curve = Literal["linear", "cosine", "sigmoid"]
CURVES: tuple[Curve, ...] = ("linear", "cosine", "sigmoid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """A ramp under way.

    Attributes:
        start: Alpha before the first tick, in [0, 1].
        target: Alpha after the last tick, in [0, 1].
        num_ticks: Length, >= 1.
        tick: Ticks done, in [0, num_ticks).
        curve: "linear", "cosine" or "sigmoid".
        steepness: Of the sigmoid, >= 0.1; without effect on the other curves.
    """

    start: float
    target: float
    num_ticks: int
    tick: int = 0
    curve: Curve = "sigmoid"
    steepness: float = 12.0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("start", "target"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}. Alpha is a share.")
        if self.num_ticks < 1:
            raise ValueError(f"`num_ticks` must be >= 1, got {self.num_ticks}. Without a ramp, assign alpha.")
        if not 0 <= self.tick < self.num_ticks:
            raise ValueError(f"`tick` must be in [0, {self.num_ticks}), got {self.tick}. A ramp that is over is None.")
        if self.curve not in CURVES:
            raise ValueError(f"`curve` must be one of {', '.join(CURVES)}, got {self.curve!r}. Choose one of them.")
        if not 0.1 <= self.steepness < math.inf:
            raise ValueError(f"`steepness` must be >= 0.1 and finite, got {self.steepness}. The default is 12.")

    def ticked(self) -> tuple[float, Ramp | None]:
        """Return alpha after one more tick, and the ramp that remains: None once the target is reached.

        Example:
            >>> Ramp(start=0.0, target=1.0, num_ticks=2, curve="linear").ticked()[0]
            0.5
        """
        tick = self.tick + 1
        if tick >= self.num_ticks:
            return self.target, None
        share = eased(tick / self.num_ticks, self.curve, self.steepness)
        alpha = self.start + (self.target - self.start) * share
        low, high = sorted((self.start, self.target))  # rounding may overshoot by one place
        return min(high, max(low, alpha)), dataclasses.replace(self, tick=tick)


def eased(t: float, curve: Curve, steepness: float = 12.0) -> float:
    """Return e(t) for t in [0, 1]: 0 at 0, 1 at 1, monotone.

    linear t; cosine (1 - cos(pi t)) / 2; sigmoid (L(k (t - 1/2)) - L(-k/2)) / (L(k/2) - L(-k/2)) with the logistic L and
    k = ``steepness``.
    """
    if curve == "linear":
        return t
    if curve == "cosine":
        return (1.0 - math.cos(math.pi * t)) / 2.0
    low, high = _logistic(-steepness / 2.0), _logistic(steepness / 2.0)
    return (_logistic(steepness * (t - 0.5)) - low) / (high - low)


def _logistic(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
