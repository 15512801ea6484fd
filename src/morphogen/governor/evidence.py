"""What the governor itself has to say, beside its detectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from morphogen.governor.findings import Finding
from morphogen.governor.verdicts import Penalty, WatchState


def penalty_of(step: int, amount: float, finding: Finding, owner: str | None = None) -> Penalty:
    """Return the penalty for a finding; of the whole run without an ``owner``."""
    return Penalty(step=step, amount=amount, owner=owner, reason=finding.message, ends_episode=owner is None)


def quarantined_part(owner: str) -> Finding:
    """A part that did not act yet was not finite."""
    message = f"the part in {owner!r} is not finite; it did not act on the outputs yet and was taken out"
    return Finding(detector="quarantine", message=message, value=math.nan, non_finite=True)


def passed_over_batch(watch: WatchState) -> Finding:
    """A batch of the bad window was not trained on."""
    message = f"one of the batches that led to a fault, which came back after {watch.rewinds} rewinds; not trained on again"
    return Finding(detector="bad_window", message=message, value=float(watch.position))


def damaged_in_window() -> Finding:
    """The state changed in the bad window, where no step is taken."""
    message = "the state changed while no step was taken, so it is not the data that is at fault"
    return Finding(detector="bad_window", message=message, value=math.nan, in_state=True)


def damaged_snapshot(damage: Sequence[str]) -> Finding:
    """A snapshot on probation holds what is not finite."""
    return Finding(
        detector="snapshot",
        message=f"not finite in a snapshot on probation: {', '.join(damage[:3])}{' and more' if len(damage) > 3 else ''}",
        value=math.nan,
        non_finite=True,
    )
