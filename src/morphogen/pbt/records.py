"""What is known of members, and what is decided about them, as frozen records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from morphogen.pbt.spaces import Value

Hyperparameters = Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class MemberRecord:
    """A member when it was last seen.

    Attributes:
        member: Its place in the population, from 0.
        score: As reported, on the scale of the metric; NaN or infinite ranks last.
        hyperparameters: Those the score was earned with.
        step: How far it had come.
        scores: Single results behind the score, such as returns of episodes, latest last.
        is_alive: Whether there is such a member; one that raised, hung or died is not, and waits to be replaced.
        is_recent: Whether it was heard of lately; one that was not is no source.
    """

    member: int
    score: float
    hyperparameters: Hyperparameters
    step: int = 0
    scores: tuple[float, ...] = ()
    is_alive: bool = True
    is_recent: bool = True

    @property
    def is_sound(self) -> bool:
        """Whether it is there, and its score is a number."""
        return self.is_alive and math.isfinite(self.score)


@dataclasses.dataclass(frozen=True)
class Source:
    """Whom a member takes over, and what it goes on with.

    Attributes:
        member: The source; the member itself where it only explores.
        step: How far the source had come.
        score: Of the source.
        hyperparameters: What the member is to use from now on.
        moves: Name of each hyperparameter that explored -> "perturbed" or "resampled".
    """

    member: int
    step: int
    score: float
    hyperparameters: Hyperparameters
    moves: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is to become of one member.

    Attributes:
        event: Number of the decision, from 0; chance in it hangs on this number.
        member: Whom it is about.
        reason: "worse", "not finite", "lost" or "explore".
        score: Of the member before.
        hyperparameters: Of the member before.
        sources: To be tried in this order, since the snapshot of one may turn out to be damaged.
    """

    event: int
    member: int
    reason: str
    score: float
    hyperparameters: Hyperparameters
    sources: tuple[Source, ...]

    @property
    def is_exploit(self) -> bool:
        """Whether another member is taken over."""
        return self.reason != "explore"
