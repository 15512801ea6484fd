"""What becomes of optimizer state when one member takes over another."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["reset", "copy", "rescale", "adaptive"] | tuple[str, ...]
"""Four words of :meth:`morphogen.state.TrainingState.adopt`, or the keys of the moments to copy, the others being zero."""


def text_of(strategy: Strategy) -> str:
    """Return ``strategy`` as one word, for records.

    Example:
        >>> text_of(("exp_avg_sq", "step"))
        'exp_avg_sq+step'
    """
    return strategy if isinstance(strategy, str) else "+".join(strategy)
