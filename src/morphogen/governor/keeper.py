"""The keeper of snapshots: takes them, lets them prove themselves, and puts the run back to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from morphogen.errors import StateMismatch
from morphogen.governor.config import GovernorConfig
from morphogen.governor.consensus import Consensus
from morphogen.governor.detectors import Detector
from morphogen.governor.recovery import Memory, Recovered, fits, live_damage, put_back, snapshot_damage
from morphogen.state import Generation, Ring, Snapshot, TrainingState


@dataclasses.dataclass(frozen=True)
class Rewound:
    """A rewind that was made.

    Attributes:
        target: The generation the run was put back to.
        recovered: How its parts were put back.
        learning_rate_factor: Factor applied to every learning rate afterwards.
        memory: What was known when the generation was taken.
    """

    target: Generation
    recovered: Recovered
    learning_rate_factor: float
    memory: Memory


class Keeper:
    """Keeps a ring of snapshots of one run, and what the detectors knew at each.

    Raises:
        StateMismatch: The run is not finite: there is nothing to rewind to.
    """

    def __init__(
        self, state: TrainingState, config: GovernorConfig, detectors: Sequence[Detector], consensus: Consensus
    ) -> None:
        """Take the first snapshot, which is trusted: nothing has been trained yet, or it was loaded."""
        self._state = state
        self._config = config
        self._detectors = detectors
        self._consensus = consensus
        first = state.capture()
        damage = snapshot_damage(state, first, None)
        if damage:
            raise StateMismatch("the run must be finite when a governor starts to watch it.", tuple(damage))
        self.memories: dict[int, Memory] = {0: self.memory(0)}
        self.ring = Ring(capacity=config.generations).with_candidate(0, first, 0).promoted()

    @property
    def newest_good(self) -> Snapshot:
        """The newest snapshot that proved good."""
        return self.ring.good[-1].snapshot

    def memory(self, position: int) -> Memory:
        """Return what is known now."""
        return Memory(position, {detector.name: detector.state_dict() for detector in self._detectors})

    def live_damage(self) -> bool:
        """Whether the models hold values that are not finite but should be, in any process."""
        return self._consensus.any([bool(live_damage(self._state, self.newest_good))])[0]

    def candidate_damage(self) -> list[str]:
        """Return what is not finite in the candidate but should be; in another process, if nothing is in this one."""
        candidate = self.ring.candidate
        assert candidate is not None
        damage = snapshot_damage(self._state, candidate.snapshot, self.newest_good)
        is_anywhere = self._consensus.any([bool(damage)])[0]  # asked in every process
        return damage or (["a tensor of another process"] if is_anywhere else [])

    def promote(self) -> Generation:
        """Make the candidate good; the oldest good generation may go."""
        candidate = self.ring.candidate
        assert candidate is not None
        self.ring = self.ring.promoted()
        self._forget_dropped()
        return candidate

    def take(self, step: int, observed: int, position: int) -> None:
        """Capture the run as the new candidate."""
        self.ring = self.ring.with_candidate(step, self._state.capture(), observed)
        self.memories[observed] = self.memory(position)
        self._forget_dropped()

    def rewind(self, count: int, *, for_good: bool = False) -> Rewound:
        """Put the run back, one generation further with each ``count`` >= 1, and the detectors with it.

        ``for_good`` is to the oldest generation at once: nothing will be tried from there.
        """
        good = self.ring.good
        target = good[0 if for_good else max(0, len(good) - count)]
        self._consensus.check_same("generation", target.observed)
        recovered = put_back(self._state, target.snapshot, self._config.optimizer)
        # Learning rates that were not put back still carry the penalties of earlier rewinds.
        penalties = count - 1 if recovered.rates_restored else min(1, count - 1)
        factor = self._config.learning_rate_penalty**penalties
        if factor != 1.0:
            self._state.scale_learning_rates(factor)
        memory = self.memories[target.observed]
        load_detectors(self._detectors, memory.detectors)
        self.ring = dataclasses.replace(self.ring, generations=good[: good.index(target) + 1])
        self._forget_dropped()
        return Rewound(target, recovered, factor, memory)

    def can_rewind(self) -> bool:
        """Whether the newest good snapshot still fits models that cannot change their structure by themselves."""
        return self._consensus.any([not fits(self._state, self.newest_good)]) == [False]

    def restart(self, step: int, observed: int, position: int) -> None:
        """Drop every snapshot and trust the run as it is, after a change of structure that no snapshot can be put back over."""
        self.ring = Ring(capacity=self._config.generations).with_candidate(step, self._state.capture(), observed).promoted()
        self.memories = {observed: self.memory(position)}

    def _forget_dropped(self) -> None:
        kept = {generation.observed for generation in self.ring.generations}
        self.memories = {observed: memory for observed, memory in self.memories.items() if observed in kept}


def load_detectors(detectors: Sequence[Detector], states: Mapping[str, object]) -> None:
    """Give each detector its state among ``states``; one that has none there starts anew."""
    for detector in detectors:
        if detector.name in states:
            detector.load_state_dict(states[detector.name])  # pyright: ignore[reportArgumentType]
        else:
            detector.forget()
