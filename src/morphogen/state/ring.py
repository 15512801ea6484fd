"""A ring of snapshots of one run, each with the step it was taken at and whether it has proved itself."""

from __future__ import annotations

import dataclasses

from morphogen.state.snapshot import Snapshot


@dataclasses.dataclass(frozen=True)
class Generation:
    """One snapshot in the ring.

    Attributes:
        step: The caller's step at which it was taken; may repeat after a rewind.
        snapshot: The run at that moment.
        observed: How many steps had been observed by then; never repeats.
        good: Whether it has proved itself.
    """

    step: int
    snapshot: Snapshot
    observed: int
    good: bool = False


@dataclasses.dataclass(frozen=True)
class Ring:
    """Generations, oldest first: at most ``capacity`` good ones and one candidate still on probation.

    A value: each operation returns a new ring. Buffers of generations that fall out are reused by the next capture.
    """

    capacity: int = 2
    generations: tuple[Generation, ...] = ()

    def __post_init__(self) -> None:
        """Check the capacity."""
        if self.capacity < 1:
            raise ValueError(f"`capacity` must be at least 1, got {self.capacity}. Two let a rewind go further back.")

    @property
    def good(self) -> tuple[Generation, ...]:
        """The generations a rewind may go to, oldest first."""
        return tuple(generation for generation in self.generations if generation.good)

    @property
    def candidate(self) -> Generation | None:
        """The generation on probation, if any."""
        return next((generation for generation in self.generations if not generation.good), None)

    def with_candidate(self, step: int, snapshot: Snapshot, observed: int | None = None) -> Ring:
        """Return the ring with a new candidate in place of the present one; ``observed`` is ``step`` unless told."""
        newcomer = Generation(step, snapshot, step if observed is None else observed)
        return dataclasses.replace(self, generations=(*self.good, newcomer))

    def promoted(self) -> Ring:
        """Return the ring with the candidate made good and the oldest good generation dropped beyond ``capacity``."""
        promoted = tuple(dataclasses.replace(generation, good=True) for generation in self.generations)
        return dataclasses.replace(self, generations=promoted[-self.capacity :])

    def before(self, generation: Generation) -> Ring:
        """Return the ring of the generations older than ``generation``."""
        return dataclasses.replace(self, generations=self.generations[: self.generations.index(generation)])
